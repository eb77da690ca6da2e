"""SIGTERM, SIGINT and SIGUSR1 at random moments from the start of main on; a second one ends the run at once."""

import random
import signal
import time
from pathlib import Path

from soak import training

NAME = "signals"
WHAT = "a run that gets SIGTERM, SIGINT or SIGUSR1 saves its last whole step, ends with 75, and is resumed exactly"
COUNT, LONG = 200, 2000
PATIENCE = 30.0  # seconds to end in; a step takes a hundredth of one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run(case: int, folder: Path) -> str | None:
    """A run of kind `case` that is stopped one to three times; in every fifth case the last time by two signals."""
    draw, kind = random.Random(case), case % 24
    problem = training.until_one_lands(lambda out: cut(case, kind, draw, out), folder)
    return problem and f"case {case}: {problem}"


def cut(case: int, kind: int, draw: random.Random, out: Path) -> tuple[int, str | None]:
    """How many signals stopped the run in `out`, and what was wrong, if anything."""
    arguments, output = training.command(kind, out), out.with_suffix(".output")
    told, landed = [], 0
    times = draw.randint(1, 3)
    for number in range(times):
        fresh, twice = case % 10 == 0, case % 5 == 4 and number == times - 1
        child = (training.started if fresh else training.forked)(arguments, output)
        while not child.caught() and not child.ended():
            time.sleep(0.0005)
        which = draw.choice(SIGNALS)
        moment = training.wait_for_a_moment(child, out, kind, draw, 4.0 if fresh else 0.0)
        told.append(f"{which.name} at {moment}{' twice' if twice else ''}")
        steps = training.steps_in(out)
        child.send(which)
        if twice:
            time.sleep(draw.uniform(0, 0.01))
            child.send(draw.choice(SIGNALS))
        until = time.monotonic() + PATIENCE
        while not child.ended() and time.monotonic() < until:
            time.sleep(0.002)
        if not child.ended():
            child.send(signal.SIGKILL)
            child.wait()
            return landed, f"({told}) still running after {PATIENCE:g} s: {output.read_text()[-500:]}"
        code = child.wait()
        landed += code != 0
        if code not in (75, 0) and not (twice and -code in SIGNALS):
            return landed, f"({told}) exit {code}: {output.read_text()[-500:]}"
        if code == 0 and steps < training.whole(kind).steps - 1:
            return landed, f"({told}) it went on after step {steps} as if there had been no signal"
    if (code := training.forked(arguments, output).wait()) != 0:
        return landed, f"({told}) the resume ended with {code}: {output.read_text()[-500:]}"
    problem = training.wrong(out, kind)
    return landed, problem and f"({told}) {problem}"
