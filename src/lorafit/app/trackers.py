"""Programs that a run can be followed in. `log.jsonl` is always written; these are told the same, step by step.

A tracker is a function: it gets the run, begins, and returns what is to be called with (step, numbers) and what to call
at the end. Registered with `@tracker`, `--track` knows it; the package of the same name is imported when it is asked
for. What it is told of the settings has no path of this machine in it.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorafit.app.card import public_settings
from lorafit.errors import UsageError, nearest
from lorafit.files import write_json

PROJECT = "lorafit"
IDENTITY = "track.json"

Tell = Callable[[int, Mapping[str, float]], Any]
Tracker = Callable[["Followed"], tuple[Tell, Callable[[], Any]]]
TRACKERS: dict[str, Tracker] = {}


@dataclass(frozen=True)
class Followed:
    """The run: its folder, its settings as others may see them, how many steps are done, an id that stays on resume."""

    folder: Path
    settings: Mapping[str, Any]
    done: int
    id: str

    @property
    def name(self) -> str:
        return f"{self.folder.resolve().name}-{self.id}"


def tracker(name: str) -> Callable[[Tracker], Tracker]:
    """Register a tracker under the name of the package it needs."""

    def register(function: Tracker) -> Tracker:
        TRACKERS[name] = function
        return function

    return register


@tracker("tensorboard")
def tensorboard(run: Followed) -> tuple[Tell, Callable[[], Any]]:
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.done or None)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return tell, writer.close


@tracker("wandb")
def wandb(run: Followed) -> tuple[Tell, Callable[[], Any]]:
    """A run of the project `lorafit`, or of what WANDB_PROJECT says; its own files go to RUN/wandb."""
    import wandb

    began = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=run.id,
        resume="allow",
        dir=str(run.folder),
        config=dict(run.settings),
    )
    return lambda step, numbers: began.log(dict(numbers), step=step), began.finish


@tracker("trackio")
def trackio(run: Followed) -> tuple[Tell, Callable[[], Any]]:
    """A run of the project `lorafit`, on this machine, or in the Space that TRACKIO_SPACE_ID names."""
    import trackio

    trackio.init(project=PROJECT, name=run.name, resume="allow", config=dict(run.settings), embed=False)
    return lambda step, numbers: trackio.log(dict(numbers), step=step), trackio.finish


def check_trackers(names: Sequence[str]) -> None:
    """UsageError, before anything is loaded, for a name that is no tracker or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--track knows no '{name}'{nearest(name, TRACKERS)}: there are {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UsageError(f"--track {name} needs the package {name}: pip install {name}")


@contextmanager
def following(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], done: int, note: Callable[[str], None]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what is to be called with each step's record. A tracker that fails is left out, the run goes on."""
    tells: dict[str, Tell] = {}
    ends: dict[str, Callable[[], Any]] = {}
    run = Followed(folder, public_settings(settings), done, identity(folder, done)) if names else None
    try:
        for name in names:
            try:
                tells[name], ends[name] = TRACKERS[name](run)  # type: ignore[arg-type]
            except Exception as error:
                raise UsageError(f"--track {name}: it does not start: {_first_line(error)}") from error

        def follow(record: Mapping[str, Any]) -> None:
            for name, tell in list(tells.items()):
                try:
                    tell(record["step"], numbers(record))
                except Exception as error:
                    del tells[name]
                    note(f"{name} is not told any more ({_first_line(error)}); log.jsonl goes on")

        yield follow
    finally:
        for name, end in ends.items():
            try:
                end()
            except Exception as error:
                note(f"{name} did not end well: {_first_line(error)}")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What there is to plot in a step's record; a loss that is not finite is not in it."""
    told = {name: value for name, value in record.items() if name != "step" and value is not None}
    return {"eval/loss" if name == "eval_loss" else f"train/{name}": value for name, value in told.items()}


def identity(folder: Path, done: int) -> str:
    """The id of the run in `folder`: a new one where it begins, the same where it goes on."""
    file = folder / IDENTITY
    if done and file.is_file():
        return str(json.loads(file.read_bytes())["id"])
    made = uuid.uuid4().hex[:8]
    write_json(file, {"id": made})
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:240]
