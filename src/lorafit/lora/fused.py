"""The low-rank linear y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ with its backward written by hand.

It replaces five autograd nodes and two (n, out)-sized temporaries per layer. With a frozen W nothing of W's
own gradient is needed, so only x̃ and the thin product h = x̃·Aᵀ are kept:

    forward   h = x̃·Aᵀ            y = x·Wᵀ + b,  y += s·h·Bᵀ  (in place, in the matrix product's own epilogue)
    backward  k = s·ḡ·B           x̄ = ḡ·W,       x̄ += k·A           B̄ = s·ḡᵀ·h      Ā = kᵀ·x̃

n tokens, x̃ the input after dropout (x itself without), ḡ = ∂L/∂y (n, out), h and k (n, r).
A, B and their gradients stay in their own precision (fp32), the products run in that of x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LowRankLinear(torch.autograd.Function):
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
        scale: float,
    ) -> Tensor:
        h = (x if dropped is None else dropped) @ A.to(x.dtype).T  # (n, r)
        y = F.linear(x, weight, bias)
        y.addmm_(h, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x if dropped is None else dropped, h, weight, A, B)
        ctx.scale, ctx.shared_input = scale, dropped is None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, A, B = ctx.saved_tensors
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
        return grad_x, grad_dropped, None, None, grad_A, grad_B, None
