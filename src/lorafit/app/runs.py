"""A training run as a person sees it: progress on the terminal, and what it leaves in its folder.

out/adapter/      the adapter, in PEFT's format
out/checkpoints/  the newest states of the run, to go on from
out/config.yaml   every setting, as resolved; `--config` reads it again
out/log.jsonl     one JSON object per optimizer step
out/about.json    what the data were, what was learned, and answers from before and after
out/loss.png      the picture of it
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafit.app.rows import EVERY
from lorafit.errors import CheckpointError, DiskError, UsageError
from lorafit.files import append_line, write_text

Record = Mapping[str, Any]
ADAPTER, CHECKPOINTS, CONFIG, LOG, PICTURE = "adapter", "checkpoints", "config.yaml", "log.jsonl", "loss.png"
ABOUT = "about.json"


def check_free(folder: Path, resume: bool = False) -> None:
    """Refuse to begin a run where there is one already."""
    from lorafit.training.checkpoint import state_folders

    if resume:
        return
    if (folder / ADAPTER).exists():
        raise DiskError(f"{folder} already holds a trained adapter: choose another --out, or remove the folder")
    if state_folders(folder / CHECKPOINTS):
        raise CheckpointError(f"{folder} holds an unfinished run: go on with it by --resume, or choose another --out")


def start(folder: Path, settings: Mapping[str, Any], resume: bool = False) -> int:
    """Make the folder of a run, with its settings and the log so far; returns how many steps stand in it."""
    import yaml

    from lorafit.training.checkpoint import saved_records

    check_free(folder, resume)
    records = saved_records(folder / CHECKPOINTS) if resume else []
    if not records:
        lines = yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, allow_unicode=True)
        write_text(folder / CONFIG, lines)
    write_text(folder / LOG, "".join(f"{json.dumps(record)}\n" for record in records))
    return len(records)


@contextmanager
def progress(
    console: Console, steps: int, log: Path, done: int = 0, tell: Callable[[Record], None] = lambda record: None
) -> Iterator[Callable[[Record], None]]:
    """Yields the `on_step` that logs each record, tells it, and shows it: as a bar, or in a line now and then."""
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("starting", total=steps, completed=done)

            def draw(record: Record) -> None:
                append_line(log, record)
                tell(record)
                bar.update(task, advance=1, description=sentence(record))
                if "eval_loss" in record:
                    bar.print(f"step {record['step'] + 1}: held-out loss {number(record['eval_loss'], '.4f')}")

            yield draw
        return
    last = -EVERY

    def write(record: Record) -> None:
        nonlocal last
        append_line(log, record)
        tell(record)
        step, now = record["step"] + 1, time.monotonic()
        if now - last >= EVERY or step == steps or "eval_loss" in record:
            last = now
            console.print(f"step {step}/{steps}  {sentence(record)}")

    yield write


def sentence(record: Record) -> str:
    """A step's record for a person."""
    parts = [
        f"loss {number(record['loss'], '.4f')}",
        f"grad {number(record['grad_norm'], '.3g')}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:.0f} tok/s",
        f"{record['memory_mb']:.0f} MB",
    ]
    if "eval_loss" in record:
        parts.append(f"held-out {number(record['eval_loss'], '.4f')}")
    return "  ".join(parts)


def number(value: float | None, form: str) -> str:
    """A number that a record holds, or the word for what is none."""
    return "not finite" if value is None else format(value, form)


def epochs_table(losses: Sequence[float], evaluations: Mapping[int, float], steps_per_epoch: int) -> Table:
    """Per epoch the mean training loss and the last held-out loss, beside the mean since the start."""
    table = Table("epoch", "training loss", "mean since the start", "held-out loss")
    for epoch, loss in enumerate(losses):
        held_out = [evaluations[step] for step in sorted(evaluations) if step // steps_per_epoch == epoch]
        mean = sum(losses[: epoch + 1]) / (epoch + 1)
        table.add_row(str(epoch + 1), f"{loss:.4f}", f"{mean:.4f}", f"{held_out[-1]:.4f}" if held_out else "–")
    return table


def draw_losses(history: Sequence[Record], path: Path, title: str = "") -> None:
    """The loss of each step (light), its running mean, and the held-out loss."""
    from matplotlib.figure import Figure

    steps = [record["step"] + 1 for record in history if record["loss"] is not None]
    losses = [record["loss"] for record in history if record["loss"] is not None]
    span = max(1, min(50, len(losses) // 10))
    mean = [sum(losses[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(losses))]
    held_out = {record["step"] + 1: record["eval_loss"] for record in history if record.get("eval_loss") is not None}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"training, mean of {span} steps")
    if held_out:
        axes.plot(*zip(*held_out.items(), strict=True), "o-", color="tab:orange", label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# --- a run that is over ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PastRun:
    """What stands in the folder of a run. `about` is empty for a run that was not finished."""

    folder: Path
    settings: Mapping[str, Any]
    records: Sequence[Record]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> Collection[str]:
        """The settings that were paths when the run was made."""
        found: Collection[str] = self.about.get("local", ())
        return found

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step that was taken."""
        return [(record["step"], record["loss"]) for record in self.records if record.get("loss") is not None]

    @property
    def evaluations(self) -> dict[int, float]:
        """{step: held-out loss}, where it is a number."""
        return {r["step"]: r["eval_loss"] for r in self.records if r.get("eval_loss") is not None}


def read_run(folder: Path) -> PastRun:
    """The run in `folder`; UsageError if there is none, or what is there cannot be read."""
    import yaml

    folder = folder.expanduser()
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no run: there is no {CONFIG} in it; give what train had as --out")
    file = folder / CONFIG
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        file = folder / LOG
        lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else [""]
        records = [json.loads(line) for line in lines[:-1]]  # behind the last line's end: one that was cut off
        file = folder / ABOUT
        about = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read: {type(error).__name__}") from error
    if not isinstance(settings, dict) or not isinstance(about, dict) or not all(isinstance(r, dict) for r in records):
        raise UsageError(f"{folder}: its files are not what a run leaves")
    return PastRun(folder, settings, records, about)
