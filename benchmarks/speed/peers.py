"""The peers: each a way to train the same adapter on the same rows, built as its own users build it.

`BUILDERS[name](model, batches, start)` turns the plain `model` into one with the adapter `start` and returns a `Peer`.
All of them minimise the negative log-likelihood per supervised token of the step, with AdamW.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.workloads import ALPHA, CLIP, LR, Factors, R, targets
from lorafit import Batches, LoraConfig, TrainConfig, add_lora
from lorafit.data.batches import Batch, collate
from lorafit.data.chat import IGNORE, Example
from lorafit.lora.inject import wrappers
from lorafit.training.attention import row_attention
from lorafit.training.loop import begin, take_step
from lorafit.training.loss import find_head, summed_loss

Rows = Sequence[Example]
Parameters = dict[str, tuple[nn.Parameter, nn.Parameter]]
Timed = list[tuple[float, float]]
"""Seconds and loss of each step."""


@dataclass
class Peer:
    """`factors` are A and B of each layer by its plain name, `run(n)` takes the first n steps and times them."""

    factors: Parameters
    run: Callable[[int], Timed]


Build = Callable[[nn.Module, Batches, Factors], Peer]


# --- the loop that a tutorial shows ---------------------------------------------------------------


def plain_loop(
    loss: Callable[[Rows], Tensor], factors: Parameters, batches: Batches, *, fused: bool | None = None
) -> Peer:
    """Forward, backward, clip, update."""
    trained = [p for pair in factors.values() for p in pair]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=fused)

    def step(number: int) -> float:
        value = loss(batches.rows(number))
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return Peer(factors, partial(timed, step))


def timed(step: Callable[[int], float], steps: int) -> Timed:
    found = []
    for number in range(steps):
        began = time.perf_counter()
        loss = step(number)
        found.append((time.perf_counter() - began, loss))
    return found


def padded(rows: Rows, *, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels (rows, longest)."""
    longest = max(len(row.ids) for row in rows)
    fill = partial(_fill, longest, left)
    ids = torch.tensor([fill(row.ids, 0) for row in rows])
    mask = torch.tensor([fill([1] * len(row.ids), 0) for row in rows])
    return ids, mask, torch.tensor([fill(row.labels, IGNORE) for row in rows])


def _fill(longest: int, left: bool, values: list[int], value: int) -> list[int]:
    padding = [value] * (longest - len(values))
    return padding + values if left else values + padding


@torch.no_grad()
def copied(factors: Parameters, start: Factors) -> Parameters:
    """`factors`, set to `start`."""
    assert factors.keys() == start.keys()
    for name, (A, B) in factors.items():
        A.copy_(start[name][0])
        B.copy_(start[name][1])
    return factors


# --- the tutorial's layer -------------------------------------------------------------------------


class TutorialLora(nn.Module):
    """base(x) + s·B(A(x)), written down as it stands in the paper."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Linear(base.in_features, R, bias=False, dtype=base.weight.dtype)
        self.B = nn.Linear(R, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scale * self.B(self.A(x))
        return y


def seed(model: nn.Module, batches: Batches, start: Factors, scale: float = ALPHA / R) -> Peer:
    """Rows padded on the left, logits of all positions."""
    model.requires_grad_(False)
    factors: Parameters = {}
    for name, layer in targets(model).items():
        wrapped: Any = TutorialLora(layer, scale)
        model.set_submodule(name, wrapped)
        factors[name] = (wrapped.A.weight, wrapped.B.weight)

    def loss(rows: Rows) -> Tensor:
        ids, mask, labels = padded(rows, left=True)
        logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)

    return plain_loop(loss, copied(factors, start), batches)


# --- PEFT -----------------------------------------------------------------------------------------


def _peft_config() -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(r=R, lora_alpha=int(ALPHA), target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def _peft_factors(wrapped: Any, start: Factors) -> Parameters:
    layers = {name: wrapped.base_model.model.get_submodule(name) for name in start}
    found: Parameters = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}
    return copied(found, start)


def peft(model: nn.Module, batches: Batches, start: Factors) -> Peer:
    """get_peft_model and a plain loop, everything at its default."""
    from peft import get_peft_model

    wrapped: Any = get_peft_model(model, _peft_config())

    def loss(rows: Rows) -> Tensor:
        ids, mask, labels = padded(rows)
        value: Tensor = wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
        return value

    return plain_loop(loss, _peft_factors(wrapped, start), batches)


def peft_tuned(model: nn.Module, batches: Batches, start: Factors, *, packed: bool = False) -> Peer:
    """The base's precision for the adapter, logits of supervised rows only, fused AdamW; rows padded or packed.

    Packed, positions that restart are all that transformers is told: it makes a mask from them.
    """
    from peft import get_peft_model

    wrapped: Any = get_peft_model(model, _peft_config(), autocast_adapter_dtype=False)

    def loss(rows: Rows) -> Tensor:
        batch = collate(rows, packed=packed)
        keep = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        keep[batch.predict] = True
        how = batch.inputs() if packed else {"input_ids": batch.input_ids, "attention_mask": padded(rows)[1]}
        logits = wrapped(**how, logits_to_keep=keep.view_as(batch.input_ids), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets)

    return plain_loop(loss, _peft_factors(wrapped, start), batches, fused=True)


# --- TRL ------------------------------------------------------------------------------------------


def trl(model: nn.Module, batches: Batches, start: Factors, **changes: Any) -> Peer:
    """SFTTrainer.train(), everything at its default but what all peers share (and bf16 where it is emulated)."""
    from benchmarks.speed.trl_peer import make_trainer, run

    trainer = make_trainer(model, batches, _peft_config(), **changes)
    return Peer(_peft_factors(trainer.model, start), partial(run, trainer))


trl_tuned = partial(trl, gradient_checkpointing=False, padding_free=True, optim="adamw_torch_fused")


# --- lorafit, and the way there -------------------------------------------------------------------


def lorafit(model: nn.Module, batches: Batches, start: Factors) -> Peer:
    """As `lorafit.train` runs it."""
    factors = _lorafit_factors(model, start)
    run = begin(model, batches, TrainConfig(lr=LR, schedule="constant", warmup=0, max_grad_norm=CLIP))

    def step(number: int) -> float:
        run.pending = take_step(run)
        value: float = run.complete()["loss"]
        return value

    return Peer(factors, partial(timed, step))


def _lorafit_factors(model: nn.Module, start: Factors) -> Parameters:
    add_lora(model, LoraConfig(r=R, alpha=ALPHA))
    layers: list[tuple[str, Any]] = list(wrappers(model))
    return copied({name: (layer.lora_A.weight, layer.lora_B.weight) for name, layer in layers}, start)


def ladder(rung: int, model: nn.Module, batches: Batches, start: Factors) -> Peer:
    """From the tutorial's layer to lorafit: each rung has what the one below has, and one thing more."""
    if rung == 0:
        return seed(model, batches, start)
    if rung == 4:
        return lorafit(model, batches, start)
    factors = _lorafit_factors(model, start)
    for _, layer in wrappers(model):
        layer._plain = lambda x: False  # type: ignore[method-assign]  # autograd's backward, not ours
    head = find_head(model)
    assert head is not None

    def loss(rows: Rows) -> Tensor:
        batch = collate(rows, packed=True)
        with row_attention(model, batch):
            if rung == 3:
                return summed_loss(model, batch, head) / batch.targets.numel()
            if rung == 2:
                hidden = head.decoder(**batch.inputs(), use_cache=False).last_hidden_state
                return F.cross_entropy(head.logits(hidden.flatten(0, 1)[batch.predict]).float(), batch.targets)
            return _loss_of_all(model, batch)

    return plain_loop(loss, factors, batches, fused=True)


def _loss_of_all(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.full((batch.input_ids.numel(),), IGNORE)
    labels[batch.predict] = batch.targets
    logits = model(**batch.inputs(), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE)


RUNGS = (
    "the tutorial's layer, padded rows",
    "+ packed rows",
    "+ head on supervised rows only",
    "+ head's gradient made in the forward pass",
    "+ low-rank backward by hand (lorafit)",
)
LADDER: dict[str, Build] = {f"ladder-{rung}": partial(ladder, rung) for rung in range(len(RUNGS))}
PEERS: dict[str, Build] = {
    "lorafit": lorafit,
    "seed": seed,
    "peft": peft,
    "peft-tuned": peft_tuned,
    "peft-packed": partial(peft_tuned, packed=True),
    "trl": trl,
    "trl-tuned": trl_tuned,
}
BUILDERS: dict[str, Build] = PEERS | LADDER
