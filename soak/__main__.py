"""`python -m soak`: run the parts case by case, go on where the last run was stopped, and write down what came out."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread costs more than it brings
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import importlib
import pkgutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import soak
from soak.state import ROOT, Progress, State, source_of, write_results
from soak.workers import Outcome, Run, run_cases

HEAVY = ("torch", "transformers", "peft", "lorafit", "pytest", "hypothesis")  # imported once, before any fork
SAVE_EVERY = 5.0  # seconds
LINE_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Part:
    """One module of the package that tests a promise."""

    name: str
    what: str
    count: int
    long: int
    run: Run
    share: float
    limit: float
    sources: tuple[str, ...]

    @classmethod
    def of(cls, module: ModuleType) -> "Part":
        return cls(
            name=module.NAME,
            what=module.WHAT,
            count=module.COUNT,
            long=module.LONG,
            run=module.run,
            share=getattr(module, "PASS", 1.0),
            limit=getattr(module, "LIMIT", 600.0),
            sources=getattr(module, "SOURCES", ("src", "soak")),
        )

    def holds(self, progress: Progress) -> bool:
        """Whether enough cases kept the promise; a case that itself went wrong is never made up for."""
        errors = any(failure.error for failure in progress.failures)
        return not errors and len(progress.failures) <= (1 - self.share) * progress.done + 1e-9


def parts() -> dict[str, Part]:
    """Every part of the package, by name."""
    modules = [importlib.import_module(f"soak.{m.name}") for m in pkgutil.iter_modules(soak.__path__)
               if not m.name.startswith("_")]  # fmt: skip
    found = [Part.of(module) for module in modules if hasattr(module, "COUNT")]
    return {part.name: part for part in found}


class Display:
    """One line that is rewritten on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.last = -LINE_EVERY

    def show(self, text: str, final: bool = False) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r\x1b[K{text}", end="\n" if final else "", flush=True)
        elif final or now - self.last >= LINE_EVERY:
            print(text, flush=True)
            self.last = now

    def say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, flush=True)


def run_part(part: Part, count: int, state: State, jobs: int, display: Display) -> Progress:
    """Do what is left of the first `count` cases; the state is saved as it goes, and when this is interrupted."""
    source = source_of(part.sources)
    progress = state.parts.get(part.name)
    if progress is None or progress.source != source:
        if progress is not None and progress.done:
            display.say(f"{part.name}: {' or '.join(part.sources)} has changed, its {progress.done} cases start anew")
        progress = state.parts[part.name] = Progress(source)
    elif progress.done:
        display.say(f"{part.name}: goes on behind {progress.done} cases")
    began, before, spent = time.monotonic(), progress.done, progress.seconds
    saved, fresh = began, 0
    try:
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True))
            cases = range(progress.done, count)
            running = run_cases(part.run, cases, jobs=jobs, scratch=Path(scratch), limit=part.limit)
            stack.callback(running.close)
            for outcome in running:
                now = time.monotonic()
                progress.seconds = spent + now - began
                if outcome is not None:
                    fresh += 1
                    progress.add(outcome)
                    if outcome.failure is not None:
                        display.say(f"{part.name} FAILED: {outcome.failure}")
                display.show(status(part, progress, before + fresh, count, fresh / max(now - began, 1e-9)))
                if now - saved >= SAVE_EVERY:
                    state.save()
                    saved = now
    finally:
        state.save()
    display.show(status(part, progress, progress.done, count, fresh / max(progress.seconds - spent, 1e-9)), final=True)
    return progress


def status(part: Part, progress: Progress, finished: int, count: int, rate: float) -> str:
    failed = len(progress.failures) + sum(outcome.failure is not None for outcome in progress.beyond.values())
    left = duration((count - finished) / rate) if rate else "?"
    return f"{part.name}: {finished:,}/{count:,} cases, {failed} failed, {rate:.3g}/s, {left} left"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def entry(part: Part, progress: Progress) -> dict[str, Any]:
    """What the results say about a part."""
    return {
        "what": part.what,
        "cases": progress.done,
        "failed": len(progress.failures),
        "required": part.share,
        "holds": part.holds(progress),
        "seconds": round(progress.seconds, 1),
        "source": progress.source,
        "failures": [failure.failure for failure in progress.failures],
    }


def table(entries: dict[str, dict[str, Any]]) -> str:
    rows = [("part", "cases", "failed", "time", "", "promise")]
    for name, found in entries.items():
        numbers = f"{found['cases']:,}", f"{found['failed']:,}", duration(found["seconds"])
        rows.append((name, *numbers, "ok" if found["holds"] else "BROKEN", found["what"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [text.rjust(width) if place in (1, 2, 3) else text.ljust(width)
         for place, (text, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]  # fmt: skip
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def arguments(argv: Sequence[str] | None, known: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak", description="Try every promise very many times.")
    parser.add_argument("--only", action="append", metavar="NAME", choices=known, help=", ".join(known))
    parser.add_argument("--count", type=int, help="cases per part, in place of the part's own number")
    parser.add_argument("--long", action="store_true", help="the part's long number of cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (1)")
    parser.add_argument("--case", type=int, help="do this one case of each part and say what became of it")
    parser.add_argument("--state", type=Path, default=ROOT / "soak/state.json", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=ROOT / "soak/results", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def one_case(chosen: Sequence[Part], case: int) -> int:
    outcomes: list[Outcome | None] = []
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as scratch:
        for part in chosen:
            done = run_cases(part.run, [case], jobs=1, scratch=Path(scratch), limit=part.limit)
            outcomes += [outcome for outcome in done if outcome is not None]
            print(f"{part.name}: {(outcomes[-1] and outcomes[-1].failure) or f'case {case} holds'}")
    return int(any(outcome and outcome.failure for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    for name in HEAVY:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    known = parts()
    options = arguments(argv, list(known))
    chosen = [known[name] for name in dict.fromkeys(options.only or known)]
    if options.case is not None:
        return one_case(chosen, options.case)
    state, display = State(options.state), Display()
    entries: dict[str, dict[str, Any]] = {}
    try:
        for part in chosen:
            count = options.count or (part.long if options.long else part.count)
            entries[part.name] = entry(part, run_part(part, count, state, options.jobs, display))
    except KeyboardInterrupt:
        display.say("stopped; the same command goes on from here")
        return 130
    path = write_results(options.results, entries)
    for name in entries:  # what is written down starts anew next time
        del state.parts[name]
    state.save()
    print(f"\n{table(entries)}\n\nwritten to {os.path.relpath(path)}")
    return 0 if all(found["holds"] for found in entries.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
