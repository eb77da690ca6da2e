"""Seconds, tokens and memory of a training step: lorafit beside the tutorial's loop, PEFT and TRL.

    python -m benchmarks.speed                             # all of it: hours on two cores
    python -m benchmarks.speed --only W1 --peers lorafit,peft
    python -m benchmarks.speed --only W1 --ladder          # from the tutorial's layer to lorafit, one change at a time
    python -m benchmarks.speed --table                     # the table again, from the runs that there are

First every peer takes one step of a tiny model; one whose loss or gradient is not lorafit's is named and not timed.
Then each run is a process of its own, in the opposite order in every other round. A run that is there already, made on
this machine with these settings, is not made again.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import transformers
from rich.console import Console

from benchmarks.speed.gate import gate
from benchmarks.speed.measure import machine
from benchmarks.speed.peers import BUILDERS, LADDER, PEERS
from benchmarks.speed.report import Record, read_records, write
from benchmarks.speed.run import add_settings, precision
from benchmarks.speed.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "speed"


def main() -> None:
    asked = _arguments()
    console = Console(highlight=False)
    dtype = str(precision(asked.dtype)).removeprefix("torch.")
    settings = {"steps": asked.steps, "warmup": asked.warmup, "layers": asked.layers}
    refused: dict[str, str] = {}
    if not asked.table:
        peers = [*asked.peers, *(LADDER if asked.ladder else ())]
        refused = _quiet_gate(peers)
        for name, why in refused.items():
            console.print(f"{name:12} {why or 'same loss and gradients as lorafit'}")
        able = [name for name in peers if not refused[name]]
        RUNS.mkdir(parents=True, exist_ok=True)
        for workload, peer, number in _plan(asked.only, able, asked.rounds):
            _run(workload, peer, number, dtype, settings, console)
    wrong = {name: why for name, why in refused.items() if why}
    records = [one for one in read_records(RUNS, machine(), dtype, settings) if one["peer"] not in wrong]
    print(write(records, wrong, RESULTS, ROOT / "README.md"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names(WORKLOADS), default=list(WORKLOADS), help="workloads, with commas")
    parser.add_argument("--peers", type=names(BUILDERS), default=list(PEERS), help="peers, with commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ladder", action="store_true", help="W1 also for each step from the tutorial to lorafit")
    parser.add_argument("--table", action="store_true", help="run nothing, only report")
    add_settings(parser)
    return parser.parse_args()


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between them, each of them known."""
    able = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in able]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(able)}")
        return names

    return parse


def _quiet_gate(peers: list[str]) -> dict[str, str]:
    """The gate, without the other libraries' advice."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gate(peers)


def _plan(workloads: list[str], peers: list[str], rounds: int) -> Iterator[tuple[str, str, int]]:
    """A B C, then C B A: a machine that slows down meanwhile slows all of them alike."""
    for workload in workloads:
        for number in range(rounds):
            for peer in peers if number % 2 == 0 else peers[::-1]:
                if peer not in LADDER or workload == "W1":
                    yield workload, peer, number


def _run(workload: str, peer: str, number: int, dtype: str, settings: Record, console: Console) -> None:
    out = RUNS / f"{workload}-{peer}-{dtype}-{number}.json"
    label = f"{workload}  round {number + 1}  {peer:12}"
    if _is_there(out, settings):
        console.print(f"{label} is there already")
        return
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.speed.run", "--workload", workload, "--peer", peer, "--out", str(out)]
    command += ["--round", str(number), "--dtype", dtype, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(f"{label} failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}", markup=False)
        return
    seconds = sorted(json.loads(out.read_text())["seconds"])
    console.print(f"{label} {seconds[len(seconds) // 2]:.3f} s per step ({seconds[0]:.3f} to {seconds[-1]:.3f})")


def _is_there(path: Path, settings: Record) -> bool:
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    return bool(record["settings"] == settings and record["machine"] == machine())


if __name__ == "__main__":
    main()
