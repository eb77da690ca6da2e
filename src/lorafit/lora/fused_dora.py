"""DoRA's linear y = g ⊙ (x·Wᵀ + s·(x̃·Aᵀ)·Bᵀ) + b with its backward written by hand; g (out,) is m / ‖W + s·B·A‖.

As `LowRankLinear`, and beside x̃ and h = x̃·Aᵀ it keeps u, what the gain is a gain of, for the gradient of g:

    forward   v = x·Wᵀ + b + s·h·Bᵀ      u = v − b           y = v + (g − 1) ⊙ u
    backward  ĝ = ḡ + (g − 1) ⊙ ḡ        k = s·ĝ·B           x̄ = ĝ·W + k·A      B̄ = s·ĝᵀ·h      Ā = kᵀ·x̃
              gain's gradient  Σₙ ḡ ⊙ u

g − 1 instead of g, for two reasons: at the start it is 0, so that y is the base's bit for bit; and in bf16 a gain of
1.003 would be 1, and nothing learned.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GainedLowRankLinear(torch.autograd.Function):
    """(n, in) -> (n, out). Pure: it returns gradients and writes to nothing that autograd did not make."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gain: Tensor,
        scale: float,
    ) -> Tensor:
        x_A = x if dropped is None else dropped
        h = x_A @ A.to(x.dtype).T  # (n, r)
        v = F.linear(x, weight, bias)
        v.addmm_(h, B.to(x.dtype).T, alpha=scale)
        u = v if bias is None else v - bias
        more = (gain - 1).to(x.dtype)
        ctx.save_for_backward(x_A, h, u, more, weight, A, B)
        ctx.scale, ctx.shared_input, ctx.gain_dtype = scale, dropped is None, gain.dtype
        return torch.addcmul(v, u, more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, u, more, weight, A, B = ctx.saved_tensors
        grad_gain = (grad * u).sum(dim=0, dtype=ctx.gain_dtype) if ctx.needs_input_grad[6] else None
        grad = torch.addcmul(grad, grad, more)
        k = (grad @ B.to(grad.dtype)).mul_(ctx.scale)  # (n, r)
        grad_A = (k.T @ x).to(A.dtype) if ctx.needs_input_grad[4] else None
        grad_B = (grad.T @ h).to(B.dtype).mul_(ctx.scale) if ctx.needs_input_grad[5] else None
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_dropped = None
        if ctx.shared_input:
            if grad_x is not None:
                grad_x.addmm_(k, A.to(k.dtype))
        elif ctx.needs_input_grad[1]:
            grad_dropped = k @ A.to(k.dtype)
        return grad_x, grad_dropped, None, None, grad_A, grad_B, grad_gain, None
