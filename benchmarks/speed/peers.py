"""The peers: each a way to train the same adapter on the same rows, built as its own users build it.

`BUILDERS[name](task, start)` turns the task's plain model into one with the adapter `start` and returns a `Peer`.
All of them minimise the negative log-likelihood per supervised token of the step, with AdamW.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import Factors, Setup, targets
from lorafit import LoraConfig, TrainConfig, add_lora
from lorafit.data.batches import collate
from lorafit.data.chat import IGNORE, Example
from lorafit.lora.inject import wrappers
from lorafit.training.blocks import find_blocks
from lorafit.training.loop import begin, take_step
from lorafit.training.ways import as_asked

Rows = Sequence[Example]
Parameters = dict[str, tuple[nn.Parameter, nn.Parameter]]
Timed = list[tuple[float, float]]
"""Seconds and loss of each step."""
After = Callable[[int], bool]
"""Called behind each step with its number, off the clock; where it says True the run ends."""


def go_on(step: int) -> bool:
    return False


@dataclass(frozen=True)
class Peer:
    """`run(n, after)` takes the first n steps and times them; `model` answers as the plain one would, adapter included.

    `factors` are A and B of each layer by its plain name, `config` is what a reader has to know to do the same.
    """

    model: nn.Module
    factors: Parameters
    config: Mapping[str, Any]
    run: Callable[[int, After], Timed]


Build = Callable[[Task, Factors], Peer]


# --- the loop that a tutorial shows ---------------------------------------------------------------


def plain_loop(
    loss: Callable[[Rows], Tensor],
    model: nn.Module,
    factors: Parameters,
    task: Task,
    config: Mapping[str, Any],
    *,
    fused: bool | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Peer:
    """Forward, backward, clip, update; all of them `within` a context."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.setup.lr, weight_decay=0.0, fused=fused)

    def step(number: int) -> float:
        value = loss(task.batches.rows(number))
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, task.setup.clip)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    said = {"optimizer": f"AdamW(fused={fused})", "checkpointing": False} | dict(config)
    return Peer(model, factors, _described(task, model, said), partial(_within, within, step, _device(model)))


def _within(
    context: Callable[[], AbstractContextManager[Any]],
    step: Callable[[int], float],
    device: torch.device,
    steps: int,
    after: After,
) -> Timed:
    with context():
        return timed(step, device, steps, after)


def timed(step: Callable[[int], float], device: torch.device, steps: int, after: After) -> Timed:
    found = []
    for number in range(steps):
        began = time.perf_counter()
        loss = step(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - began, loss))
        if after(number):
            break
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


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def copied(factors: Parameters, start: Factors) -> Parameters:
    """`factors`, set to `start`."""
    assert factors.keys() == start.keys()
    for name, (A, B) in factors.items():
        A.copy_(start[name][0])
        B.copy_(start[name][1])
    return factors


def _described(task: Task, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` below what every peer has."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    setup = task.setup
    shared = {
        "adapter": f"{setup.variant}, r {setup.r}, alpha {setup.alpha:g}, all linear layers but the head, no dropout",
        "adapter dtype": ", ".join(sorted(dtypes)),
        "learning rate": f"{setup.lr:g}, constant; gradient clipped to {setup.clip:g}; no weight decay",
    }
    return shared | dict(config)


# --- the tutorial's layer -------------------------------------------------------------------------


class TutorialLora(nn.Module):
    """base(x) + s·B(A(x)), written down as it stands in the paper."""

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        like: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.A = nn.Linear(base.in_features, r, **like)
        self.B = nn.Linear(r, base.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scale * self.B(self.A(x))
        return y


def seed(task: Task, start: Factors, scale: float | None = None) -> Peer:
    """Rows padded on the left, logits of all positions."""
    model, setup = task.model.requires_grad_(False), task.setup
    _only_lora(setup)
    factors: Parameters = {}
    for name, layer in targets(model).items():
        wrapped: Any = TutorialLora(layer, setup.r, setup.scale if scale is None else scale)
        model.set_submodule(name, wrapped)
        factors[name] = (wrapped.A.weight, wrapped.B.weight)

    def loss(rows: Rows) -> Tensor:
        ids, mask, labels = (tensor.to(_device(model)) for tensor in padded(rows, left=True))
        logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)

    config = {"layer": "base(x) + s·B(A(x))", "rows": "padded on the left", "logits": "all positions"}
    return plain_loop(loss, model, copied(factors, start), task, config)


def _only_lora(setup: Setup) -> None:
    if setup.variant != "lora":
        raise ValueError(f"this peer has no variant '{setup.variant}'")


# --- PEFT -----------------------------------------------------------------------------------------


def peft_config(setup: Setup) -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=setup.r,
        lora_alpha=int(setup.alpha),
        target_modules="all-linear",
        lora_dropout=0.0,
        use_dora=setup.variant == "dora",
        task_type="CAUSAL_LM",
    )


def peft_factors(wrapped: Any, start: Factors) -> Parameters:
    layers = {name: wrapped.base_model.model.get_submodule(name) for name in start}
    found: Parameters = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}
    return copied(found, start)


def peft(task: Task, start: Factors) -> Peer:
    """get_peft_model and a plain loop, everything at its default."""
    from peft import get_peft_model

    wrapped: Any = get_peft_model(task.model, peft_config(task.setup))

    def loss(rows: Rows) -> Tensor:
        ids, mask, labels = (tensor.to(_device(wrapped)) for tensor in padded(rows))
        value: Tensor = wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
        return value

    config = {"layer": "get_peft_model, defaults", "rows": "padded on the right", "logits": "all positions"}
    return plain_loop(loss, wrapped, peft_factors(wrapped, start), task, config)


def peft_tuned(task: Task, start: Factors, *, packed: bool = False, compiled: bool = False) -> Peer:
    """The base's precision for the adapter, logits of supervised rows only, fused AdamW; rows padded or packed.

    Packed, positions that restart are all that transformers is told: it makes a mask from them.
    """
    from peft import get_peft_model

    wrapped: Any = get_peft_model(task.model, peft_config(task.setup), autocast_adapter_dtype=False)
    if compiled:
        for block in find_blocks(wrapped):
            block.compile(dynamic=True)

    def loss(rows: Rows) -> Tensor:
        batch = collate(rows, packed=packed).to(_device(wrapped))
        keep = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
        keep[batch.predict] = True
        mask = padded(rows)[1].to(_device(wrapped))
        how = batch.inputs() if packed else {"input_ids": batch.input_ids, "attention_mask": mask}
        logits = wrapped(**how, logits_to_keep=keep.view_as(batch.input_ids), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets)

    config = {
        "layer": "get_peft_model(autocast_adapter_dtype=False)",
        "rows": "packed, position_ids that restart" if packed else "padded on the right",
        "logits": "of supervised positions (boolean logits_to_keep)",
    } | ({"compiled": "every block, dynamic=True"} if compiled else {})
    return plain_loop(loss, wrapped, peft_factors(wrapped, start), task, config, fused=True)


# --- TRL ------------------------------------------------------------------------------------------


def trl(task: Task, start: Factors, **changes: Any) -> Peer:
    """SFTTrainer.train(), everything at its default but what all peers share (and bf16 where it is emulated)."""
    from benchmarks.speed.trl_peer import make_trainer, run, settings_of

    trainer = make_trainer(task, peft_config(task.setup), **changes)
    config = _described(task, trainer.model, settings_of(trainer))
    return Peer(trainer.model, peft_factors(trainer.model, start), config, partial(run, trainer))


trl_tuned = partial(trl, gradient_checkpointing=False, padding_free=True, optim="adamw_torch_fused")


# --- lorafit --------------------------------------------------------------------------------------


def lorafit(task: Task, start: Factors, **asked: Any) -> Peer:
    """As `lorafit.train` runs it; `asked` are settings beside the defaults."""
    model, setup = task.model, task.setup
    factors = lorafit_factors(task, start)
    how = {"lr": setup.lr, "schedule": "constant", "warmup": 0, "max_grad_norm": setup.clip}
    run = begin(model, task.batches, TrainConfig(**how, **asked), refuse)  # type: ignore[arg-type]

    def step(number: int) -> float:
        run.pending = take_step(run, on_note=refuse)
        value: float = run.complete()["loss"]
        return value

    config = {
        "layer": "add_lora, defaults",
        "rows": "packed" if run.passes.packed else "padded on the right",
        "logits": "of supervised positions",
        "optimizer": "AdamW(fused=True)",
        "checkpointing": False,
    } | asked
    within = partial(as_asked, run, refuse)
    return Peer(model, factors, _described(task, model, config), partial(_within, within, step, _device(model)))


def refuse(note: str) -> None:
    """Whatever `train` would do in another way than asked must not be timed under the name of what was asked."""
    raise RuntimeError(note)


def lorafit_factors(task: Task, start: Factors) -> Parameters:
    add_lora(task.model, LoraConfig(r=task.setup.r, alpha=task.setup.alpha, variant=task.setup.variant))
    layers: list[tuple[str, Any]] = list(wrappers(task.model))
    return copied({name: (layer.lora_A.weight, layer.lora_B.weight) for name, layer in layers}, start)


PEERS: dict[str, Build] = {
    "lorafit": lorafit,
    "lorafit-compile": partial(lorafit, compile=True),
    "lorafit-checkpointing": partial(lorafit, checkpointing=True),
    "seed": seed,
    "peft": peft,
    "peft-tuned": peft_tuned,
    "peft-packed": partial(peft_tuned, packed=True),
    "trl": trl,
    "trl-tuned": trl_tuned,
}
EXTRA: dict[str, Build] = {"peft-compiled": partial(peft_tuned, compiled=True)}
"""Only where they are asked for: on two CPU cores, compiling takes longer than the run."""
