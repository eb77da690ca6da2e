"""Before anything is timed: does each peer compute the same thing? One step of a tiny model in fp32."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.peers import BUILDERS, Build
from benchmarks.speed.workloads import WORKLOADS, initial, rows_of, tiny_model
from lorafit import Batches

LOSS, GRADIENT = 1e-5, 1e-4
"""How far a loss, and the gradient of each tensor of the adapter, may be from lorafit's, relative to it."""

Gradients = dict[str, Tensor]


def gate(peers: Iterable[str], builders: Mapping[str, Build] = BUILDERS) -> dict[str, str]:
    """{peer: what is wrong with it}, empty when a peer does what lorafit does."""
    loss, gradients = _one_step(builders["lorafit"])
    return {name: _difference(builders[name], loss, gradients) for name in peers}


def _difference(build: Build, loss: float, gradients: Gradients) -> str:
    try:
        its, found = _one_step(build)
    except Exception as error:  # another library's, in a version that we did not try: the other peers go on
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not abs(its - loss) <= LOSS * abs(loss):
        return f"loss {its:.7f} instead of {loss:.7f}"
    if found.keys() != gradients.keys():
        return f"trains {len(found)} tensors instead of {len(gradients)}"
    worst = max((_distance(found[key], gradients[key]), key) for key in found)
    return f"gradient of {worst[1]} off by {worst[0]:.1e}" if not worst[0] <= GRADIENT else ""


def _one_step(build: Build) -> tuple[float, Gradients]:
    """Loss and gradients of the very step that is timed, before it clips them."""
    model = tiny_model()
    rows = rows_of(WORKLOADS["W1"], 4, model.config.vocab_size, shrink=4)  # type: ignore[union-attr, arg-type]
    peer = build(model, Batches(rows, 4, shuffle=False), initial(model, b_std=0.05))
    found: Gradients = {}
    for name, pair in peer.factors.items():
        for key, parameter in zip("AB", pair, strict=True):
            hook = partial(_keep, found, f"{name}.{key}")
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    ((_, loss),) = peer.run(1)
    return loss, found


def _keep(found: Gradients, name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    found[name] = parameter.grad.clone()


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
