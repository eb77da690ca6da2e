"""Cases done by forked processes: the imports of the parent are theirs, a crash or a hang is one failed case."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

Run = Callable[[int, Path], str | None]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `failure` is None or a sentence; `error` says that the case itself went wrong."""

    case: int
    failure: str | None = None
    error: bool = False


def run_cases(
    run: Run, cases: Iterable[int], *, jobs: int, scratch: Path, limit: float
) -> Generator[Outcome | None, None, None]:
    """The outcome of every case as it comes, from `jobs` processes; None when a second has passed without one."""
    todo = iter(cases)
    workers: list[_Worker] = []
    try:
        for case in todo:
            workers.append(_Worker(run, scratch, case))
            if len(workers) == jobs:
                break
        while workers:
            wait([handle for worker in workers for handle in (worker.pipe, worker.process.sentinel)], timeout=1)
            found = False
            for place, worker in reversed(list(enumerate(workers))):
                outcome = worker.outcome(limit)
                if outcome is None:
                    continue
                found = True
                following = next(todo, None)
                if following is not None and worker.process.is_alive():
                    worker.give(following)
                else:
                    worker.end()
                    workers[place : place + 1] = [] if following is None else [_Worker(run, scratch, following)]
                yield outcome
            if not found:
                yield None
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process with one case at a time. It leads a session of its own, so that it can be ended with all it started
    and a Ctrl-C at the terminal reaches the parent alone."""

    def __init__(self, run: Run, scratch: Path, case: int) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = fork(_serve, run, scratch, theirs, self.pipe)
        theirs.close()
        self.give(case)

    def give(self, case: int) -> None:
        self.case, self.began = case, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died, which `outcome` will say
            self.pipe.send(case)

    def outcome(self, limit: float) -> Outcome | None:
        """What became of the case, if that is known by now."""
        try:
            if self.pipe.poll():
                received: Outcome = self.pipe.recv()
                return received
        except (EOFError, ConnectionResetError):
            self.process.join(5)
        if not self.process.is_alive():
            return Outcome(self.case, f"case {self.case}: the process died with {self.process.exitcode}")
        if time.monotonic() - self.began > limit:
            self.end()
            return Outcome(self.case, f"case {self.case}: not done after {limit:g} s")
        return None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def fork(target: Callable[..., None], *args: Any) -> ForkProcess:
    """A started child process of this one."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; those here are idle
        process.start()
    return process


def _serve(run: Run, scratch: Path, pipe: Connection, parents: Connection) -> None:
    os.setsid()
    parents.close()  # else this process would never see that the parent is gone
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)  # it is removed, whatever becomes of this process
    while True:
        try:
            case = pipe.recv()
        except EOFError:  # the parent is gone
            return
        folder = Path(tempfile.mkdtemp(prefix=f"{case}-"))
        try:
            outcome = Outcome(case, run(case, folder))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            outcome = Outcome(case, f"case {case}: {type(error).__name__} at {place}: {error}", error=True)
        shutil.rmtree(folder, ignore_errors=True)
        pipe.send(outcome)
