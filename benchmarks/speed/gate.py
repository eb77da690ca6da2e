"""Before anything is timed: does each peer compute the same thing? Three steps of a tiny model in fp32.

In fp32 every peer keeps its adapter in fp32, so that all of them take the same three steps but for rounding: from one
A and B, neither of them 0, on the same rows. Compared are the loss of each step and the gradient of each A and B
before it is clipped. A peer in bf16 is the same code with other tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.ladder import BUILDERS
from benchmarks.speed.peers import Build, go_on
from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import WORKLOADS, Setup, initial, rows_of, tiny_model
from lorafit import Batches

STEPS, SETUP = 3, Setup()
LOSS, GRADIENT = 1e-5, 1e-4
"""How far a loss, and the gradient of each tensor of the adapter, may be from lorafit's, relative to it."""


@dataclass(frozen=True)
class Verdict:
    """`wrong` is empty where a peer does what lorafit does; `config` is how it was set up."""

    wrong: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    config: Mapping[str, Any]
    losses: list[float]
    gradients: dict[str, list[Tensor]]


def gate(
    peers: Iterable[str], builders: Mapping[str, Build] = BUILDERS, setup: Setup = SETUP
) -> dict[str, Verdict]:
    """What is wrong with each of `peers`, if anything."""
    right = _steps(builders["lorafit"], setup)
    return {name: _compared(builders[name], right, setup) for name in peers}


def _compared(build: Build, right: _Found, setup: Setup) -> Verdict:
    try:
        found = _steps(build, setup)
    except Exception as error:  # another library's, in a version that we did not try: the other peers go on
        return Verdict(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Verdict(_difference(found, right), found.config)


def _difference(found: _Found, right: _Found) -> str:
    for step, (its, loss) in enumerate(zip(found.losses, right.losses, strict=True), 1):
        if not abs(its - loss) <= LOSS * abs(loss):
            return f"loss {its:.7f} instead of {loss:.7f} in step {step}"
    if found.gradients.keys() != right.gradients.keys():
        return f"trains {len(found.gradients)} tensors instead of {len(right.gradients)}"
    off = {
        (key, step): _distance(one, other)
        for key, gradients in right.gradients.items()
        for step, (one, other) in enumerate(zip(found.gradients[key], gradients, strict=True), 1)
    }
    (key, step), worst = max(off.items(), key=lambda item: item[1])
    return f"gradient of {key} off by {worst:.1e} in step {step}" if not worst <= GRADIENT else ""


def _steps(build: Build, setup: Setup) -> _Found:
    """Loss and gradients of the very steps that are timed, before they clip them."""
    model = tiny_model()
    rows = rows_of(WORKLOADS["W1"], 4 * STEPS, model.config.vocab_size, shrink=4)  # type: ignore[union-attr, arg-type]
    task = Task(model, Batches(rows, 4, shuffle=False), setup)
    peer = build(task, initial(model, setup, b_std=0.05))
    kept: dict[str, list[Tensor]] = {}
    for name, pair in peer.factors.items():
        for key, parameter in zip("AB", pair, strict=True):
            hook = partial(_keep, kept.setdefault(f"{name}.{key}", []))
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    losses = [loss for _, loss in peer.run(STEPS, go_on)]
    # A compiled peer tries itself before the first step: what counts are the last gradients.
    return _Found(peer.config, losses, {key: gradients[-STEPS:] for key, gradients in kept.items()})


def _keep(found: list[Tensor], parameter: Tensor) -> None:
    assert parameter.grad is not None
    found.append(parameter.grad.clone())


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
