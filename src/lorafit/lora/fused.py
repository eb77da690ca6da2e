"""The low-rank linear y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ with its backward written by hand, for layers that share x.

It replaces five autograd nodes and two (n, out)-sized temporaries per layer. With a frozen W nothing of W's own
gradient is needed, so only x̃ and the thin product h = x̃·Aᵀ are kept:

    forward   h = x̃·Aᵀ            y = x·Wᵀ + b,  y += s·h·Bᵀ  (in place, in the matrix product's own epilogue)
    backward  k = s·ḡ·B           x̄ = ḡ·W,       x̄ += k·A           B̄ = s·ḡᵀ·h      Ā = kᵀ·x̃

n tokens, x̃ the input after dropout (x itself without), ḡ = ∂L/∂y (n, out), h and k (n, r). Layers that see one x,
such as the query, key and value of attention, share x, one stacked A (Σr, in), and one x̄ that all of them are added to;
their W are never put together. A, B and their gradients stay in their own precision (fp32), the products run in that
of x.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Parts(NamedTuple):
    """What one layer brings: W (out, in) and b (out,), both frozen, A (r, in), B (out, r), and s."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def low_rank_linear(x: Tensor, dropped: Tensor | None, layers: Sequence[Parts]) -> tuple[Tensor, ...]:
    """x (n, in), and x̃ where it is not x, -> y (n, out) of each layer."""
    scales = [parts.scale for parts in layers]
    tensors = [tensor for parts in layers for tensor in parts[:4]]
    found: tuple[Tensor, ...] = LowRankLinear.apply(x, dropped, scales, *tensors)  # type: ignore[no-untyped-call]
    return found


class LowRankLinear(torch.autograd.Function):
    """Pure: it returns gradients and writes to nothing that autograd did not make."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, scales: list[float], *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = (tensors[i::4] for i in range(4))
        thinned = x if dropped is None else dropped
        h = thinned @ _stacked(As).to(x.dtype).T  # (n, Σr)
        ys = [F.linear(x, W, b) for W, b in zip(weights, biases, strict=True)]
        for y, B, s, part in zip(ys, Bs, scales, torch.split(h, _ranks(As), dim=1), strict=True):
            y.addmm_(part, B.to(x.dtype).T, alpha=s)
        ctx.save_for_backward(thinned, h, *weights, *As, *Bs)
        ctx.scales, ctx.shared_input = scales, dropped is None
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, (x, h, *saved) = len(grads), ctx.saved_tensors
        weights, As, Bs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        ks = [(g @ B.to(g.dtype)).mul_(s) for g, B, s in zip(grads, Bs, ctx.scales, strict=True)]
        k, A = torch.cat(ks, dim=1) if count > 1 else ks[0], _stacked(As).to(x.dtype)  # (n, Σr), (Σr, in)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ weights[0]
            for g, W in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(g, W)
        if ctx.shared_input:
            grad_x = None if grad_x is None else grad_x.addmm_(k, A)
        elif ctx.needs_input_grad[1]:
            grad_dropped = k @ A
        wants_A, wants_B = ctx.needs_input_grad[5::4], ctx.needs_input_grad[6::4]
        grads_A = torch.split(k.T @ x, _ranks(As)) if any(wants_A) else ()
        found: list[Tensor | None] = []
        for i, (g, part) in enumerate(zip(grads, torch.split(h, _ranks(As), dim=1), strict=True)):
            grad_A = grads_A[i].to(As[i].dtype) if wants_A[i] else None
            grad_B = (g.T @ part).to(Bs[i].dtype).mul_(ctx.scales[i]) if wants_B[i] else None
            found += [None, None, grad_A, grad_B]
        return grad_x, grad_dropped, None, *found


def _stacked(As: Sequence[Tensor]) -> Tensor:
    return As[0] if len(As) == 1 else torch.cat(list(As))


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [A.shape[0] for A in As]
