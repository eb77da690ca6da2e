"""SIGKILL at random moments: in the start, in steps, saves and evaluation; resumed as often as needed."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.files import SYSTEM
from soak import training

NAME = "kills"
WHAT = "a run that is killed at random moments and resumed ends in the adapter of the uninterrupted run, byte for byte"
COUNT, LONG = 200, 5000


def at_call(k: int) -> Callable[[], None]:
    """Dies at its k-th call that changes the disk."""

    def prepare() -> None:
        left = [k]
        for name, call in list(vars(SYSTEM).items()):

            def counted(*given: Any, call: Callable[..., Any] = call) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given)

            setattr(SYSTEM, name, counted)

    return prepare


def at_poll(k: int) -> Callable[[], None]:
    """Dies before its k-th forward pass, of a step or of an evaluation."""

    def prepare() -> None:
        from lorafit.app import signals

        left = [k]

        def polled() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        signals.reason = polled

    return prepare


def run(case: int, folder: Path) -> str | None:
    """A run of kind `case` that is killed one to five times, in one of three ways each time."""
    draw, kind = random.Random(case), case % 24
    problem = training.until_one_lands(lambda out: cut(case, kind, draw, out), folder)
    return problem and f"case {case}: {problem}"


def cut(case: int, kind: int, draw: random.Random, out: Path) -> tuple[int, str | None]:
    """How many kills found the run in `out` alive, and what was wrong in the end, if anything."""
    arguments, output = training.command(kind, out), out.with_suffix(".output")
    told, landed = [], 0
    for _ in range(draw.randint(1, 5)):
        way = draw.choice(("time", "call", "pass"))
        if way == "time":
            fresh = case % 20 == 0  # a process from its first import on; the others begin where main does
            child = (training.started if fresh else training.forked)(arguments, output)
            told.append(training.wait_for_a_moment(child, out, kind, draw, 5.0 if fresh else 0.0))
            child.send(signal.SIGKILL)
        else:
            k = draw.randint(1, 60 if way == "call" else 30)
            told.append(f"{way} {k}")
            child = training.forked(arguments, output, at_call(k) if way == "call" else at_poll(k))
        code = child.wait()
        landed += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            return landed, f"({told}) exit {code}: {output.read_text()[-500:]}"
    if (code := training.forked(arguments, output).wait()) != 0:
        return landed, f"({told}) the last resume ended with {code}: {output.read_text()[-500:]}"
    problem = training.wrong(out, kind)
    return landed, problem and f"(killed at {told}) {problem}"
