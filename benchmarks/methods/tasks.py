"""What the methods are compared on: rows to train on, rows to choose a learning rate by, rows to report.

The last two are different rows, so that a method with more rates to choose from is not thereby the better one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from lorafit import Batches, evaluate, read_examples
from lorafit.app.demo import score
from lorafit.app.demo_data import OPENING, make_rows
from lorafit.data.chat import Example

BIOINSTRUCT = Path(__file__).resolve().parents[3] / "shared" / "data" / "bioinstruct"
LONGEST = 256
BATCH = 2  # rows a step: the budget is small, and many steps of it tell more than few


@dataclass(frozen=True)
class Rows:
    """One task's rows; `exact` counts the answers to the reported rows that are right, where that can be said."""

    train: list[Example]
    tuning: list[Example]
    reported: list[Example]
    exact: Callable[[nn.Module], int] | None = None

    def loss(self, model: nn.Module, which: list[Example]) -> float:
        return evaluate(model, Batches(which, BATCH, shuffle=False))


@dataclass(frozen=True)
class Task:
    """A task by name; `missing` is why it cannot be had here, if it cannot."""

    about: str
    rows: Callable[[Any, int, int], Rows]
    missing: Callable[[], str | None] = lambda: None


def demo_rows(tokenizer: Any, train: int, held_out: int) -> Rows:
    """The demo's: a message in, an order as JSON out."""
    made, held, _ = make_rows(0, train, 2 * held_out, 0)
    tuning, reported = held[:held_out], held[held_out:]

    def read(rows: list[Any]) -> list[Example]:
        return read_examples([{"messages": row.conversation()} for row in rows], tokenizer, loss_on="last")

    def exact(model: nn.Module) -> int:
        return score(Console(quiet=True), model, tokenizer, reported, OPENING, "answers").exact

    return Rows(read(made), read(tuning), read(reported), exact)


def bioinstruct_rows(tokenizer: Any, train: int, held_out: int) -> Rows:
    """The tutorial's: instructions about medicine, answered freely, so that loss is all there is to compare."""

    def read(name: str) -> list[Example]:
        return read_examples(str(BIOINSTRUCT / name), tokenizer, max_length=LONGEST, allow_dropped=0.2)

    held = read("val.jsonl")[: 2 * held_out]
    middle = len(held) // 2
    return Rows(read("train.jsonl")[:train], held[:middle], held[middle:])


def _no_bioinstruct() -> str | None:
    return None if BIOINSTRUCT.is_dir() else f"{BIOINSTRUCT} is not there"


TASKS: dict[str, Task] = {
    "demo": Task("the demo's orders, as JSON", demo_rows),
    "bioinstruct": Task("BioInstruct", bioinstruct_rows, _no_bioinstruct),
}
