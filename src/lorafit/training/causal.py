"""Causal attention of rows laid end to end, with its backward written by hand.

Of each row, a block of queries at a time meets the keys that it may see, and no others:

    forward   S = cap(s·Q Kᵀ)    P = softmax(S)    O = P V
    backward  V̄ = Pᵀ Ō           P̄ = Ō Vᵀ          S̄ = P ∘ (P̄ − Σ P ∘ P̄)·cap'          Q̄ = s·S̄ K       K̄ = s·S̄ᵀ Q

Only Q, K and V are kept: P is made again in the backward pass, which for one block is cheap, while all of them are the
largest thing that a step would keep. Query heads that share a key head are rows of one product, so that keys and values
are never repeated, and their gradients sum by themselves.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = {"cpu": 64}
"""Positions in a block: on the CPU few, so that scores stay in the cache and few pairs above the diagonal are made."""
MANY_QUERIES = 1024


class Rule(NamedTuple):
    """Scores become weights: a position sees itself and the `window` − 1 before it, `cap` c bends s to c·tanh(s/c)."""

    scale: float
    window: int | None = None
    cap: float | None = None
    dropout: float = 0.0
    seed: int = 0


class RowAttention(torch.autograd.Function):
    """q (heads, T, d), k (key heads, T, d), v (key heads, T, e), rows of `lengths` -> (T, heads, e)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
        grouped = _grouped(out.transpose(0, 1), k.shape[0])
        q = _grouped(q, k.shape[0])
        for block in _blocks(lengths, rule, q.device):
            p, _ = block.weights(q, k, rule)
            o = block.dropped(p, rule).to(v.dtype).flatten(1, 2) @ v[:, block.keys]
            grouped[:, :, block.queries] = o.view(*p.shape[:3], -1)
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.rule = lengths, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        rule = ctx.rule
        grad = _grouped(grad.transpose(0, 1), k.shape[0])
        wide = torch.promote_types(q.dtype, torch.float32)  # a key's gradient is a sum over blocks
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for block in _blocks(ctx.lengths, rule, q.device):
            p, slope = block.weights(q, k, rule)
            o = grad[:, :, block.queries].flatten(1, 2)
            grad_v[:, block.keys] += block.dropped(p, rule).to(v.dtype).flatten(1, 2).transpose(1, 2) @ o
            s = block.dropped((o @ v[:, block.keys].transpose(1, 2)).view(p.shape).to(p.dtype), rule).mul_(p)
            s = s.addcmul_(p, s.sum(dim=-1, keepdim=True), value=-1)
            s = (s if slope is None else s.mul_(slope)).mul_(rule.scale).to(q.dtype).flatten(1, 2)
            grad_q[:, :, block.queries] = (s @ k[:, block.keys]).view(*p.shape[:3], -1)
            grad_k[:, block.keys] += s.transpose(1, 2) @ q[:, :, block.queries].flatten(1, 2)
        return grad_q.flatten(0, 1), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class _Block(NamedTuple):
    """Queries of one row, and the keys that at least one of them sees."""

    queries: slice
    keys: slice

    def weights(self, q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor | None]:
        """P (key heads, group, queries, keys) in fp32 or wider, and the slope of the cap, 1 − tanh², if any."""
        rows = q[:, :, self.queries]
        s = (rows.flatten(1, 2) @ k[:, self.keys].transpose(1, 2)).view(*rows.shape[:3], -1)
        s = s.to(torch.promote_types(q.dtype, torch.float32)).mul_(rule.scale)
        slope = None
        if rule.cap is not None:
            bend = s.div_(rule.cap).tanh_()
            slope = 1 - bend.square()
            s = bend.mul_(rule.cap)
        i = torch.arange(self.queries.start, self.queries.stop, device=q.device)[:, None]
        j = torch.arange(self.keys.start, self.keys.stop, device=q.device)
        hidden = j > i if rule.window is None else (j > i) | (j <= i - rule.window)
        return s.masked_fill_(hidden, -torch.inf).softmax(dim=-1), slope

    def dropped(self, p: Tensor, rule: Rule) -> Tensor:
        """p with a share of it set to zero: the same places whenever it is asked for."""
        if rule.dropout == 0:
            return p
        generator = torch.Generator(p.device).manual_seed(rule.seed + self.queries.start)
        keep = torch.empty_like(p).bernoulli_(1 - rule.dropout, generator=generator)
        return p * keep.div_(1 - rule.dropout)


def _blocks(lengths: tuple[int, ...], rule: Rule, device: torch.device) -> Iterator[_Block]:
    start, size = 0, QUERIES.get(device.type, MANY_QUERIES)
    for length in lengths:
        for first in range(start, start + length, size):
            last = min(first + size, start + length)
            yield _Block(slice(first, last), slice(max(start, first - (rule.window or last) + 1), last))
        start += length


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """(heads, T, d) -> (key heads, heads sharing it, T, d), a view"""
    return x.view(key_heads, -1, *x.shape[1:])
