"""The training loop, on one page.

One optimizer step is a window of forward passes. Its loss is one sum over all of them, divided once by the number of
supervised tokens in all of them: 8 rows at once, 8 times 1 row, packed or padded are the same step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config import TrainConfig
from lorafit.data.batches import Batch, Batches
from lorafit.errors import NumericError, listing
from lorafit.training.attention import packs_exactly, row_attention
from lorafit.training.loss import Head, find_head, summed_loss
from lorafit.training.modes import evaluating
from lorafit.training.optim import lr_at, make_optimizer

Record = dict[str, Any]


@dataclass
class Result:
    """What a run did: one record per step, the loss of each epoch, and the evaluations as {step: loss}."""

    history: list[Record] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: bool = False

    @property
    def epoch_losses(self) -> list[float]:
        """The mean loss per supervised token of each epoch, over that epoch only."""
        sums: dict[int, list[float]] = {}
        for record in self.history:
            total = sums.setdefault(record["epoch"], [0.0, 0.0])
            total[0] += record["loss"] * record["tokens"]
            total[1] += record["tokens"]
        return [loss / max(tokens, 1) for loss, tokens in sums.values()]


@dataclass(frozen=True)
class Passes:
    """How this model is run: whether rows can be packed exactly, and where its head is."""

    packed: bool
    head: Head | None

    def loss(self, model: nn.Module, batch: Batch, divide_by: int) -> Tensor:
        return summed_loss(model, batch, self.head) / divide_by


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig | None = None,
    *,
    evaluation: Batches | None = None,
    on_step: Callable[[Record], None] = lambda record: None,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> Result:
    """Train everything in `model` that requires gradients (after `add_lora`: the adapter) on `batches`.

    `evaluation` is looked at every `eval_every` steps; `on_step` gets each step's record, `on_note` a sentence when
    something is done in another way than asked. Leaves the model in evaluation mode, with the best weights if asked.
    Raises NumericError, before the step is taken, when the loss or the gradient is not finite.
    """
    config = config or TrainConfig()
    steps = count_steps(config, batches)
    passes = plan_passes(model, batches, on_note)
    optimizer = make_optimizer(model, config)
    best = Best(config)
    result = Result()
    with _training(model):
        for step in range(steps):
            record = take_step(model, batches, passes, optimizer, config, step, steps)
            if evaluation is not None and _evaluate_now(step, steps, batches, config):
                record["eval_loss"] = result.evaluations[step] = evaluate(model, evaluation, passes=passes)
                result.stopped_early = best.update(model, step, record["eval_loss"])
            result.history.append(record)
            on_step(record)
            if result.stopped_early:
                break
    result.best_step = best.restore(model)
    return result


def take_step(
    model: nn.Module,
    batches: Batches,
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    steps: int,
) -> Record:
    """One optimizer step: forward and backward over its window, clip, update. Returns its record."""
    began = time.perf_counter()
    device = next(model.parameters()).device
    window = batches.window(step, packed=passes.packed)
    tokens = sum(batch.targets.numel() for batch in window)
    total = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(window):
        torch.manual_seed(hash((config.seed, step, number)) % 2**63)  # dropout is a function of (seed, step, pass)
        with row_attention(model, batch):
            loss = passes.loss(model, batch.to(device), max(tokens, 1))
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach().cpu()
    norm = _clip(optimizer, config.max_grad_norm)
    if not math.isfinite(total) or not math.isfinite(norm):
        rows = [source for batch in window for source in batch.sources]
        raise NumericError(
            f"step {step}: loss {total.item():.4g}, gradient norm {norm:.4g}; the step was not taken; its rows: "
            f"{listing(rows)}; lower lr, or look for broken rows or weights"
        )
    lr = lr_at(step, steps, config)
    if tokens:  # a step without supervised tokens must not move anything: AdamW's momentum would
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return {
        "step": step,
        "epoch": step // batches.steps_per_epoch,
        "loss": total.item(),
        "grad_norm": norm,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "memory_mb": memory_mb(device),
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, passes: Passes | None = None) -> float:
    """The loss per supervised token over all rows of `batches`, each once, without dropout."""
    passes = passes or plan_passes(model, batches)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for step in range(batches.steps_per_epoch):
            for batch in batches.window(step, packed=passes.packed):
                with row_attention(model, batch):
                    total += passes.loss(model, batch.to(device), 1).item()
                tokens += batch.targets.numel()
    return total / max(tokens, 1)


def plan_passes(model: nn.Module, batches: Batches, on_note: Callable[[str], None] = lambda sentence: None) -> Passes:
    """Try once how this model can be run; `on_note` hears of it when rows have to be padded."""
    packed = batches.packing and packs_exactly(model)
    if batches.packing and not packed:
        on_note(f"{type(model).__name__} does not keep packed rows apart: rows are padded instead")
    return Passes(packed, find_head(model))


def count_steps(config: TrainConfig, batches: Batches) -> int:
    """How many optimizer steps a run takes."""
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    return max(1, steps)


class Best:
    """The best evaluation so far: keeps a copy of what is trained, and says when patience has run out."""

    def __init__(self, config: TrainConfig) -> None:
        self.patience = config.patience
        self.keep = config.keep_best
        self.loss = math.inf
        self.step: int | None = None
        self.last = -1
        self.waited = 0
        self.weights: Mapping[str, Tensor] = {}

    def update(self, model: nn.Module, step: int, loss: float) -> bool:
        """Note the evaluation at `step`; True when training should stop."""
        self.last = step
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            if self.keep:
                self.weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
            return False
        self.waited += 1
        return self.patience is not None and self.waited >= self.patience

    @torch.no_grad()
    def restore(self, model: nn.Module) -> int | None:
        """Put the best weights back, if they are asked for; returns their step."""
        if self.keep and self.step != self.last:
            parameters = dict(model.named_parameters())
            for name, weight in self.weights.items():
                parameters[name].copy_(weight)
        return self.step


def _evaluate_now(step: int, steps: int, batches: Batches, config: TrainConfig) -> bool:
    return (step + 1) % (config.eval_every or batches.steps_per_epoch) == 0 or step + 1 == steps


def _clip(optimizer: torch.optim.Optimizer, limit: float | None) -> float:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit).item()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode with the caller's random state given back; evaluation mode afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            model.eval()


def memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MiB: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
