"""The low-rank linear y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ with its backward written by hand, for layers that share x.

It replaces five autograd nodes and two (n, out)-sized temporaries per layer. With a frozen W nothing of W's own
gradient is needed, so only x̃ and the thin product h = x̃·Aᵀ are kept:

    forward   h = x̃·Aᵀ            y = x·Wᵀ + b,  y += s·h·Bᵀ  (in place, in the matrix product's own epilogue)
    backward  k = s·ḡ·B           x̄ = ḡ·W,       x̄ += k·A           B̄ = s·ḡᵀ·h      Ā = kᵀ·x̃

n tokens, x̃ the input after dropout (x itself without), ḡ = ∂L/∂y (n, out), h and k (n, r). Layers that see one x,
such as the query, key and value of attention, share x, one stacked A (Σr, in), and one x̄ that all of them are added to;
their W are never put together. Where no A is trained (LoRA-FA) x̃ is not kept, where no B is h is not. A, B and their
gradients stay in their own precision (fp32), the products run in that of x.

DoRA has a gain g (out,) = m / ‖W + s·B·A‖ on all but the bias. It costs a pass over y, one over ḡ, and keeps what it is
a gain of, u = y − b, for its gradient:

    forward   y += (g − 1) ⊙ u                                      backward  ḡ += (g − 1) ⊙ ḡ,  then as above
    gain's gradient  Σₙ ḡ ⊙ u

g − 1 instead of g, for two reasons: at the start it is 0, so that y is the base's bit for bit; and in bf16 a gain of
1.003 would be 1, and nothing learned.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Parts(NamedTuple):
    """What one layer brings: W (out, in) and b (out,), both frozen, A (r, in), B (out, r), s, and DoRA's g (out,)."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None = None


def low_rank_linear(x: Tensor, dropped: Tensor | None, layers: Sequence[Parts]) -> tuple[Tensor, ...]:
    """x (n, in), and x̃ where it is not x, -> y (n, out) of each layer."""
    scales = [parts.scale for parts in layers]
    tensors = [tensor for parts in layers for tensor in (*parts[:4], parts.gain)]
    found: tuple[Tensor, ...] = LowRankLinear.apply(x, dropped, scales, *tensors)  # type: ignore[no-untyped-call]
    return found


class LowRankLinear(torch.autograd.Function):
    """Pure: it returns gradients and writes to nothing that autograd did not make."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, scales: list[float], *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs, gains = (tensors[i::5] for i in range(5))
        wants_A, wants_B, wants_gain = (ctx.needs_input_grad[i::5] for i in (5, 6, 7))
        thinned = x if dropped is None else dropped
        h = thinned @ _stacked(As).to(x.dtype).T  # (n, Σr)
        ys = [F.linear(x, W, b) for W, b in zip(weights, biases, strict=True)]
        for y, B, s, part in zip(ys, Bs, scales, torch.split(h, _ranks(As), dim=1), strict=True):
            y.addmm_(part, B.to(x.dtype).T, alpha=s)
        more = [None if g is None else (g - 1).to(x.dtype) for g in gains]
        us = [None if m is None else y if b is None else y - b for y, b, m in zip(ys, biases, more, strict=True)]
        ys = [y if u is None or m is None else torch.addcmul(y, u, m) for y, u, m in zip(ys, us, more, strict=True)]
        us = [u if wanted else None for u, wanted in zip(us, wants_gain, strict=True)]
        kept = thinned if any(wants_A) else None, h if any(wants_B) else None
        ctx.save_for_backward(*kept, *weights, *As, *Bs, *more, *us)
        ctx.scales, ctx.shared_input = scales, dropped is None
        ctx.gain_dtypes = [None if g is None else g.dtype for g in gains]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, (x, h, *saved) = len(grads), ctx.saved_tensors
        weights, As, Bs, more, us = (saved[i * count : (i + 1) * count] for i in range(5))
        grads_gain = [
            None if u is None else (g * u).sum(dim=0, dtype=dtype)
            for g, u, dtype in zip(grads, us, ctx.gain_dtypes, strict=True)
        ]
        grads = tuple(g if m is None else torch.addcmul(g, g, m) for g, m in zip(grads, more, strict=True))
        ks = [(g @ B.to(g.dtype)).mul_(s) for g, B, s in zip(grads, Bs, ctx.scales, strict=True)]
        k, A = torch.cat(ks, dim=1) if count > 1 else ks[0], _stacked(As).to(ks[0].dtype)  # (n, Σr), (Σr, in)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ weights[0]
            for g, W in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(g, W)
        if ctx.shared_input:
            grad_x = None if grad_x is None else grad_x.addmm_(k, A)
        elif ctx.needs_input_grad[1]:
            grad_dropped = k @ A
        wants_A, wants_B = ctx.needs_input_grad[5::5], ctx.needs_input_grad[6::5]
        grads_A = torch.split(k.T @ x, _ranks(As)) if any(wants_A) else ()
        hs = torch.split(h, _ranks(As), dim=1) if any(wants_B) else ()
        found: list[Tensor | None] = []
        for i, g in enumerate(grads):
            grad_A = grads_A[i].to(As[i].dtype) if wants_A[i] else None
            grad_B = (g.T @ hs[i]).to(Bs[i].dtype).mul_(ctx.scales[i]) if wants_B[i] else None
            found += [None, None, grad_A, grad_B, grads_gain[i]]
        return grad_x, grad_dropped, None, *found


def _stacked(As: Sequence[Tensor]) -> Tensor:
    return As[0] if len(As) == 1 else torch.cat(list(As))


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [A.shape[0] for A in As]
