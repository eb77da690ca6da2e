"""Frozen linear layers as 8-bit codes with a scale for each row: half the memory of bf16, a quarter of fp32's.

    W ≈ scales ⊙ codes        codes (out, in)        scales (out, 1) = max |row| / 127
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit.lora.weights import read_weight, write_weight


class Int8Linear(nn.Module):
    """y = W x + b for the W that is stored; the dense one is made where it is needed, and not kept for backward."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        W = read_weight(layer).detach()
        self.scales = nn.Buffer((W.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(W.dtype).tiny))
        codes = (W / self.scales).round().clamp(-127, 127).to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.bias, self.kind = layer.bias, type(layer)

    @property
    def weight(self) -> Tensor:
        """For models that multiply by it themselves: laid out as in the layer that this was."""
        return read_weight(self).T if self.kind is Conv1D else read_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.codes, self.scales, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, codes * scales, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        own = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad @ (codes * scales).to(grad.dtype), None, None, own


@read_weight.register
def _(layer: Int8Linear) -> Tensor:
    return layer.codes * layer.scales


@write_weight.register
def _(layer: Int8Linear, weight: Tensor) -> nn.Module:
    out, in_ = weight.shape
    with torch.device("meta"):
        dense = Conv1D(out, in_) if layer.kind is Conv1D else nn.Linear(in_, out)
    dense.to(layer.scales.dtype).requires_grad_(False).bias = layer.bias
    return write_weight(dense, weight)
