"""The rows that the settings name: read, split into training and held-out, batched, shown."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from lorafit.config import DataConfig, ModelConfig
from lorafit.data.batches import Batches
from lorafit.data.chat import IGNORE, Example
from lorafit.data.read import read_examples
from lorafit.errors import UsageError

EVERY = 5.0  # seconds between two lines where there is no terminal to draw a bar on


def read_rows(model: ModelConfig, data: DataConfig, tokenizer: Any, seed: int) -> tuple[list[Example], list[Example]]:
    """The rows to train on and those held out: `eval_data`, or `eval_rows` of the data drawn by `seed`."""
    rows = _read(data.data, model, data, tokenizer) if data.data else []
    if data.eval_data:
        return rows, _read(data.eval_data, model, data, tokenizer)
    if data.eval_rows and data.eval_rows >= len(rows):
        raise UsageError(f"eval_rows must leave rows to train on: it is {data.eval_rows} of {len(rows)}")
    drawn = set(random.Random(seed).sample(range(len(rows)), data.eval_rows))
    return [r for i, r in enumerate(rows) if i not in drawn], [r for i, r in enumerate(rows) if i in drawn]


def make_batches(rows: Sequence[Example], data: DataConfig, *, seed: int = 0, shuffle: bool = True) -> Batches:
    """`Batches` of the size that the settings name."""
    return Batches(
        rows,
        batch_size=data.batch_size,
        accumulate=data.accumulate,
        seed=seed,
        packing=data.packing,
        max_tokens_per_pack=data.max_tokens_per_pack,
        shuffle=shuffle,
    )


def largest_pass(batches: Batches) -> int:
    """The most tokens that one forward pass of the first epoch holds."""
    windows = (batches.window(step) for step in range(batches.steps_per_epoch))
    return max(batch.input_ids.numel() for window in windows for batch in window)


def summary(rows: Sequence[Example], held_out: Sequence[Example]) -> str:
    """How many rows and tokens there are, and how many of them carry loss."""
    lengths = sorted(len(row.ids) for row in rows)
    carry = sum(label != IGNORE for row in rows for label in row.labels)
    return (
        f"{len(rows):,} rows to train on, {len(held_out):,} held out; {sum(lengths):,} tokens, {carry:,} of "
        f"them carry loss; rows of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    )


def rendered(row: Example, tokenizer: Any, colour: bool) -> Text:
    """The text of `row`; what carries loss is green, or between ⟦ and ⟧ where there is no colour."""
    text, end, shown = Text(), 0, ""
    for carries, group in groupby(row.labels, key=lambda label: label != IGNORE):
        end += len(list(group))
        so_far = tokenizer.decode(row.ids[:end])
        piece, shown = so_far[len(shown) :], so_far
        if carries and not colour:
            piece = f"⟦{piece}⟧"
        text.append(piece, style="bold green" if carries else "dim")
    return text


def _read(source: str, model: ModelConfig, data: DataConfig, tokenizer: Any) -> list[Example]:
    with counted(f"reading {source}") as progress:
        return read_examples(
            source,
            tokenizer,
            max_length=data.max_length,
            loss_on=data.loss_on,
            chat_template=model.chat_template,
            allow_dropped=data.allow_dropped,
            on_note=print,
            progress=progress,
        )


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with (done, in all): a bar on a terminal, elsewhere a line now and then."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
            task = bar.add_task(what)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            console.print(f"{what}: {done:,} of {total:,} rows")

    yield tell
