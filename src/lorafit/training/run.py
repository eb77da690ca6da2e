"""A run between two steps: all that its next step depends on, and what it has done so far.

A step is a function of (seed, step), so this is little: what is trained, the optimizer's moments, the best weights so
far, and the records. `Run.state` takes it out as tensors and JSON, `Run.restore` puts it back, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config import TrainConfig
from lorafit.data.batches import Batch, Batches
from lorafit.errors import Interrupted, NumericError, listing
from lorafit.lora.inject import wrappers
from lorafit.training.backoff import PassLimit
from lorafit.training.gradients import FlatGradients
from lorafit.training.loss import Head, summed_loss
from lorafit.training.sharding import anyone, evened
from lorafit.world import ALONE, World

Record = dict[str, Any]
Stop = Callable[[], str | None]
"""Asked between forward passes: None to go on, or what it is that wants the run to stop ("SIGTERM")."""


def heed(stop: Stop) -> None:
    """Raise Interrupted if `stop` says so."""
    if reason := stop():
        raise Interrupted(f"stopped by {reason}")


@dataclass
class Result:
    """What a run did: one record per step. A step that was not taken, its numbers not being finite, has no loss."""

    history: list[Record] = field(default_factory=list)
    best_step: int | None = None
    stopped_early: bool = False

    @property
    def evaluations(self) -> dict[int, float]:
        """{step: loss on the held-out rows}, infinite where that was no number."""
        found = {record["step"]: record["eval_loss"] for record in self.history if "eval_loss" in record}
        return {step: math.inf if loss is None else loss for step, loss in found.items()}

    @property
    def epoch_losses(self) -> list[float]:
        """The mean loss per supervised token of each epoch, over that epoch only."""
        sums: dict[int, list[float]] = {}
        for record in self.history:
            total = sums.setdefault(record["epoch"], [0.0, 0.0])
            if record["loss"] is not None:
                total[0] += record["loss"] * record["tokens"]
                total[1] += record["tokens"]
        return [loss / max(tokens, 1) for loss, tokens in sums.values()]

    @property
    def skipped(self) -> list[int]:
        """Steps that were not taken because their loss or gradient was not finite."""
        return [record["step"] for record in self.history if record["loss"] is None]

    @property
    def empty(self) -> list[int]:
        """Steps without a supervised token, which changed nothing."""
        return [record["step"] for record in self.history if record["tokens"] == 0]


@dataclass(frozen=True)
class Passes:
    """How this model is run: whether rows can be packed exactly, where its head is, what fits into memory, and whose
    share of the rows it is shown."""

    packed: bool
    head: Head | None
    limit: PassLimit = field(default_factory=PassLimit, compare=False)
    world: World = ALONE
    sharded: bool = False

    def window(self, batches: Batches, step: int) -> list[Batch]:
        """The forward passes of step `step` that are this process's; as many as the others have, where all take part
        in each."""
        window = batches.window(step, packed=self.packed, limit=self.limit.tokens, world=self.world)
        return evened(window, self.packed) if self.sharded else window

    def asking(self, stop: Stop) -> Stop:
        """`stop`, asked of all processes at once where all take part in each pass."""
        return partial(anyone, stop) if self.sharded else stop

    def seed(self, number: int, *where: int) -> int:
        """The seed of this process's pass `number` of a step: no other pass, of no process, draws the same."""
        return hash((*where, number * self.world.size + self.world.rank)) % 2**63

    def loss(self, model: nn.Module, batch: Batch, divide_by: int) -> Tensor:
        return summed_loss(model, batch, self.head) / divide_by


@dataclass
class Best:
    """The best evaluation so far: its loss and step, how many in a row were worse, and a copy of what is trained."""

    loss: float = math.inf
    step: int | None = None
    waited: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """`step` is the next optimizer step; `pending` the record of that step once it is taken but not yet evaluated."""

    model: nn.Module
    batches: Batches
    config: TrainConfig
    passes: Passes
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    pending: Record | None = None
    bad: int = 0
    best: Best = field(default_factory=Best)
    result: Result = field(default_factory=Result)
    gradients: FlatGradients = field(init=False)

    def __post_init__(self) -> None:
        self.gradients = FlatGradients(p for group in self.optimizer.param_groups for p in group["params"])

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is, and its input goes."""
        return next(self.model.parameters()).device

    @property
    def taken(self) -> int:
        """How many steps are taken."""
        return self.step + (self.pending is not None)

    @property
    def due(self) -> bool:
        """Whether the held-out rows are looked at after this step."""
        every = self.config.eval_every or self.batches.steps_per_epoch
        return (self.step + 1) % every == 0 or self.step + 1 == self.steps

    def evaluated(self, loss: float) -> None:
        """Note the held-out loss of the pending step: keep the best weights, stop when patience runs out."""
        assert self.pending is not None
        self.pending["eval_loss"] = loss if math.isfinite(loss) else None
        if loss < self.best.loss:
            weights = {name: t.detach().cpu().clone() for name, t in self.trained()} if self.config.keep_best else {}
            self.best = Best(loss, self.step, 0, weights)
            return
        self.best.waited += 1
        self.result.stopped_early = self.config.patience is not None and self.best.waited >= self.config.patience

    def complete(self) -> Record:
        """Close the pending step; returns its record."""
        assert self.pending is not None
        record, self.pending = self.pending, None
        self.result.history.append(record)
        self.step += 1
        return record

    @torch.no_grad()
    def finish(self) -> Result:
        """Put the best weights back, if they are asked for; NumericError if what was trained is not finite."""
        if self.best.weights and self.best.step != self.step - 1:
            for name, tensor in self.trained():
                tensor.copy_(self.best.weights[name])
        check_finite(dict(self.trained()), self.step)
        self.result.best_step = self.best.step
        return self.result

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """What training changes, and what it does not but the adapter is made of: a kept start, a frozen factor."""
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        for name, layer in wrappers(self.model):
            kept = layer.state_dict(keep_vars=True).items()
            yield from (
                (f"{name}.{key}", t)
                for key, t in kept
                if not t.requires_grad and not key.startswith("base_layer.")
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The run as tensors and JSON."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = {f"trained.{name}": tensor for name, tensor in self.trained()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.weights.items()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"optimizer.{key}.{names[id(parameter)]}": moment for key, moment in moments.items()}
        facts = {
            "step": self.step,
            "pending": self.pending,
            "bad": self.bad,
            "best": {"loss": self.best.loss, "step": self.best.step, "waited": self.best.waited}
            if self.best.step is not None
            else {"waited": self.best.waited},
            "stopped_early": self.result.stopped_early,
            "limit": self.passes.limit.tokens,
            "history": self.result.history,
        }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, facts

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Be the run that `state` was taken of."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in self.trained():
            tensor.copy_(tensors[f"trained.{name}"])
        weights = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "best":
                weights[rest] = tensor
            elif kind == "optimizer":
                key, _, owner = rest.partition(".")
                parameter = parameters[owner]
                self.optimizer.state[parameter][key] = tensor.to(parameter.device)
        self.step, self.pending, self.bad = facts["step"], facts["pending"], facts["bad"]
        self.passes.limit.tokens = facts.get("limit")
        self.best = Best(**facts["best"], weights=weights)
        self.result = Result(facts["history"], stopped_early=facts["stopped_early"])


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """NumericError, before any of them is written."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise NumericError(
            f"after {step} steps there is NaN or infinity in {listing(bad)}: nothing of it is written; lower lr"
        )
