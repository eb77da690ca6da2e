"""A workload made concrete: the model, its rows, and for W5 the rows that say when it has learned enough."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.workloads import WORKLOADS, Setup, make_model, rows_of, tiny_model
from lorafit import Batches, load_model, read_examples
from lorafit.app.demo_data import make_rows
from lorafit.app.demo_model import demo_model
from lorafit.data.batches import collate
from lorafit.data.chat import Example
from lorafit.training.modes import evaluating

BIOINSTRUCT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "bioinstruct"


@dataclass(frozen=True)
class Goal:
    """Training ends where the loss on `held_out`, seen every few steps, is down to `target`, or behind `most` steps."""

    held_out: list[Example]
    target: float
    every: int = 4
    most: int = 96


@dataclass(frozen=True)
class Task:
    """What one run trains, the same for every peer."""

    model: nn.Module
    batches: Batches
    setup: Setup
    goal: Goal | None = None
    notes: list[str] = field(default_factory=list)


def make_task(name: str, steps: int, layers: int, dtype: torch.dtype, quick: bool = False) -> Task:
    """The task of workload `name` for `steps` steps; `layers` counts where the weights are random."""
    work = WORKLOADS[name]
    if work.lengths is None:
        return _to_a_loss(work.batch, work.setup, dtype, quick)
    model: Any = tiny_model().to(dtype) if quick else make_model(layers, dtype)
    rows = rows_of(work, work.batch * steps, model.config.vocab_size, shrink=8 if quick else 1)
    return Task(model, Batches(rows, work.batch, shuffle=False), work.setup)


def _to_a_loss(batch: int, setup: Setup, dtype: torch.dtype, quick: bool) -> Task:
    folder = str(demo_model(Console(stderr=True)))
    model, tokenizer = load_model(folder, dtype=str(dtype).removeprefix("torch."), device="cpu")
    notes = []
    if BIOINSTRUCT.is_dir():
        train, held_out = (_bioinstruct(tokenizer, split) for split in ("train", "val"))
        held_out, fall = held_out[:40], 0.07
    else:
        notes.append("no BioInstruct beside the repository: W5 trains the demo's orders instead")
        made, other, _ = make_rows(0, 256, 40, 0)
        chats = ([{"messages": row.conversation()} for row in part] for part in (made, other))
        train, held_out = (read_examples(chat, tokenizer) for chat in chats)
        fall = 1.0
    if quick:
        train, held_out, batch = train[:2], held_out[:2], 1
    target = held_out_loss(model, held_out) - fall
    goal = Goal(held_out, target, every=2, most=4) if quick else Goal(held_out, target)
    return Task(model.train(), Batches(train[:256], batch, shuffle=False), setup, goal, notes)


def _bioinstruct(tokenizer: Any, split: str) -> list[Example]:
    return read_examples(str(BIOINSTRUCT / f"{split}.jsonl"), tokenizer, max_length=256, allow_dropped=0.2)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Example], together: int = 8) -> float:
    """Loss per supervised token, by the model's own logits of padded rows: the same yardstick for every peer."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), together):
            batch = collate(rows[start : start + together], packed=False).to(next(model.parameters()).device)
            logits = model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)[batch.predict].float()
            total += F.cross_entropy(logits, batch.targets, reduction="sum").item()
            tokens += batch.targets.numel()
    return total / tokens
