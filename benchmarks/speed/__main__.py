"""Seconds, tokens and memory of a training step: lorafit beside the tutorial's loop, PEFT and TRL.

    python -m benchmarks.speed                             # all of it: hours on two cores
    python -m benchmarks.speed --only W1 --peers lorafit,peft
    python -m benchmarks.speed --only W1 --ladder          # from the tutorial's layer to lorafit, one change at a time
    python -m benchmarks.speed --table                     # the table again, from the runs that there are
    python -m benchmarks.speed --quick --rounds 1          # a tiny model: whether everything works

First every peer takes three steps of a tiny model; one whose loss or gradient is not lorafit's is named and not timed.
Then each run is a process of its own, in the opposite order in every other round. A run that is there already, made on
this machine with these settings (and, if it is lorafit's, with this code), is not made again.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from benchmarks.speed.gate import Verdict, gate
from benchmarks.speed.ladder import LADDER
from benchmarks.speed.measure import machine
from benchmarks.speed.peers import EXTRA, PEERS
from benchmarks.speed.report import TITLES, read_records, told, write
from benchmarks.speed.run import SETTINGS, add_settings, precision
from benchmarks.speed.runs import ROOT, Record, code, read, run_once
from benchmarks.speed.workloads import WORKLOADS
from lorafit.files import write_json

RESULTS = ROOT / "benchmarks" / "results"
QUICK = ROOT / "runs" / "benchmarks"
GATE = "gate.json"


def main() -> None:
    asked = _arguments()
    console = Console(highlight=False, soft_wrap=True)
    settings = {key: getattr(asked, key) for key in SETTINGS}
    results = QUICK if asked.quick else RESULTS
    runs = results / "speed"
    dtype = str(precision(asked.dtype)).removeprefix("torch.")
    like = {"dtype": dtype, "settings": settings, "machine": machine(asked.threads)}
    readable = {"dtype": dtype, "machine": like["machine"], "settings": {**settings, "steps": None, "warmup": None}}
    refused: dict[str, str] = (read(runs / GATE) or {}).get("refused", {})
    if not asked.table:
        refused |= _gated([*asked.peers, *asked.ladder], console)
        runs.mkdir(parents=True, exist_ok=True)
        write_json(runs / GATE, {"refused": refused})
        plan = [run for run in _plan(asked.only, asked.peers, asked.ladder, asked.rounds) if not refused[run[1]]]
        for number, (workload, peer, round_) in enumerate(plan, 1):
            label = f"[{number}/{len(plan)}] {workload} round {round_ + 1} {peer:21}"
            out = runs / f"{workload}-{peer}-{dtype}-{round_}.json"
            _run(workload, peer, round_, like, out, asked.fresh, label, console)
    print(write(read_records(runs, readable), refused, results, None if asked.quick else ROOT / "README.md"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names(WORKLOADS), default=list(WORKLOADS), help="workloads, with commas")
    parser.add_argument("--peers", type=names(PEERS | EXTRA), default=list(PEERS), help="peers, with commas")
    parser.add_argument("--rounds", type=int, default=2)
    rungs: dict[str, Any] = {"nargs": "?", "const": list(LADDER), "default": [], "type": _rungs}
    parser.add_argument("--ladder", **rungs, help="W1 also rung by rung up to lorafit: all of them, or 0,4,7")
    parser.add_argument("--table", action="store_true", help="run nothing, only report")
    parser.add_argument("--fresh", action="store_true", help="make also those runs again that are there")
    add_settings(parser)
    asked = parser.parse_args()
    if asked.ladder and "W1" not in asked.only:
        parser.error("the ladder is climbed on W1: --only has to name it")
    return asked


def _rungs(text: str) -> list[str]:
    return names(LADDER)(",".join(f"ladder-{rung}" for rung in text.split(",")))


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between them, each of them known."""
    able = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in able]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(able)}")
        return names

    return parse


def _gated(peers: list[str], console: Console) -> dict[str, str]:
    """What the gate says of `peers`; without the other libraries' advice."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: verdict for peer in peers for name, verdict in gate([peer]).items()}
    for name, verdict in found.items():
        console.print(f"{TITLES[name]}: {_said(verdict)}", markup=False)
    return {name: verdict.wrong for name, verdict in found.items()}


def _said(verdict: Verdict) -> str:
    return f"REFUSED, {verdict.wrong}" if verdict.wrong else f"same losses and gradients; {told(verdict.config)}"


def _plan(workloads: list[str], peers: list[str], rungs: list[str], rounds: int) -> Iterator[tuple[str, str, int]]:
    """A B C, then C B A: a machine that slows down meanwhile slows all of them alike."""
    for workload in workloads:
        for number in range(rounds):
            names = [*peers, *(rungs if workload == "W1" else ())]
            for peer in names if number % 2 == 0 else names[::-1]:
                yield workload, peer, number


def _run(
    workload: str, peer: str, number: int, like: Record, out: Path, fresh: bool, label: str, console: Console
) -> None:
    ours = peer.startswith("lorafit") or peer in LADDER
    like = like | ({"code": code(["src/lorafit"])} if ours else {})
    what = {"workload": workload, "peer": peer, "round": number}
    flags = what | like["settings"] | {"dtype": like["dtype"], "threads": like["machine"]["threads"]}
    began = time.perf_counter()
    with console.status(label):
        record, was_there = run_once("benchmarks.speed.run", flags, out, what | like, fresh=fresh)
    if "failed" in record:
        console.print(f"{label} failed: {record['failed']}", markup=False)
        return
    seconds = record["seconds"]
    took = "was there" if was_there else f"took {time.perf_counter() - began:.0f} s"
    said = f"{statistics.median(seconds):.3f} s per step ({min(seconds):.3f} to {max(seconds):.3f}), {took}"
    console.print(f"{label} {said}", markup=False)


if __name__ == "__main__":
    main()
