"""A fair comparison: plain LoRA and every method there is, each at its own learning rate, three seeds, one budget.

    python -m benchmarks.methods --budget 120              # two hours of it, the most informative runs first
    python -m benchmarks.methods                           # all of it: a night and more on two cores
    python -m benchmarks.methods --only dora,pissa         # these, and plain LoRA to compare with
    python -m benchmarks.methods --table                   # the table again, from the runs that there are
    python -m benchmarks.methods --quick                   # a few steps of a few methods: does it work?

Each run is a process of its own and leaves one file; what is there, made on this machine with these settings, is not
made again. The table and the picture go into docs/methods.md.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.methods.methods import BASE, all_methods
from benchmarks.methods.plan import Cell, Record, count_left, missing_cells
from benchmarks.methods.report import read_records, write
from benchmarks.methods.run import add_settings, settings_of
from benchmarks.methods.tasks import TASKS
from benchmarks.speed.__main__ import names
from benchmarks.speed.measure import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "methods.md"
QUICK = {"rows": 8, "held_out": 4, "epochs": 1}


def main() -> None:
    asked = _arguments()
    console = Console(highlight=False)
    settings = settings_of(asked) | (QUICK if asked.quick else {})
    results = ROOT / "build" / "methods-quick" if asked.quick else RESULTS
    folder = results / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: why for name in asked.tasks if (why := TASKS[name].missing())}
    for name, why in missing.items():
        console.print(f"{name}: left out, {why}")
    tasks = [name for name in asked.tasks if name not in missing]
    methods = list(dict.fromkeys([BASE, *asked.only]))
    if not asked.table:
        work(folder, settings, tasks, methods, asked.budget, console)
    records = read_records(folder, machine(torch.get_num_threads()), settings)
    print(write(records, results, results / "methods.md" if asked.quick else PAGE))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names(all_methods()), default=list(all_methods()), help="methods, with commas")
    parser.add_argument("--tasks", type=names(TASKS), default=list(TASKS), help="tasks, with commas")
    parser.add_argument("--budget", type=float, default=None, help="minutes: begin no run that would end later")
    parser.add_argument("--table", action="store_true", help="run nothing, only report")
    parser.add_argument("--quick", action="store_true", help="a few rows, into build/methods-quick")
    add_settings(parser)
    return parser.parse_args()


def work(
    folder: Path, settings: Record, tasks: list[str], methods: list[str], minutes: float | None, console: Console
) -> None:
    """Run what is missing, one after another, until all is there or the budget is spent."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    failed: set[Cell] = set()
    while True:
        records = read_records(folder, machine(torch.get_num_threads()), settings)
        cells = [cell for cell in missing_cells(records, tasks, methods) if cell not in failed]
        if not cells:
            return
        cell = next((one for one in cells if fits(one, records, end, time.monotonic())), None)
        if cell is None:
            console.print(f"the budget is spent; {count_left(records, tasks, methods)} runs or more are left")
            return
        left = count_left(records, tasks, methods)
        console.print(f"{said(cell)}  … {left} runs left{time_left(left, records)}")
        problem = _run(cell, folder, settings)
        if problem:
            failed.add(cell)
            console.print(f"{said(cell)}  failed: {problem}", markup=False)


def said(cell: Cell) -> str:
    return f"{cell.task:12} {cell.method:14} lr {cell.lr:<7g} seed {cell.seed}"


def expected(cell: Cell, records: list[Record]) -> float:
    """Seconds, by what like runs took; 0 where nothing is known."""
    alike = [r for r in records if r["task"] == cell.task]
    same = [r["seconds"] for r in alike if r["method"] == cell.method]
    return float(statistics.median(same or [r["seconds"] for r in alike] or [0.0]))


def fits(cell: Cell, records: list[Record], end: float | None, now: float) -> bool:
    return end is None or now + expected(cell, records) <= end


def time_left(left: int, records: list[Record]) -> str:
    if not records:
        return ""
    seconds = left * statistics.fmean(record["seconds"] for record in records)
    return f", about {seconds / 3600:.1f} h" if seconds > 5400 else f", about {seconds / 60:.0f} min"


def _run(cell: Cell, folder: Path, settings: Record) -> str | None:
    """What went wrong, if something did."""
    out = folder / f"{cell.task}-{cell.method}-{cell.lr:g}-{cell.seed}.json"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.methods.run", "--out", str(out), *flags]
    command += [f"--{key}={value}" for key, value in cell._asdict().items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["it was killed"])[-1] if done.returncode else None


if __name__ == "__main__":
    main()
