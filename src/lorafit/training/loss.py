"""The loss: head and cross-entropy at supervised positions only, summed.

A head over 150,000 words is a third of a small model's work, and its logits are the largest tensor of a step. Most
positions carry no loss, so only those that do go through it; and since the head is frozen, the gradient of its input
can be made at once, tile by tile, while the logits are at hand. They are never kept for the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorafit.data.batches import Batch
from lorafit.training.modes import evaluating
from lorafit.training.sharding import whole

TILE = 4096
"""Words of the vocabulary whose logits are in memory at a time."""


@dataclass(frozen=True)
class Head:
    """What a model does after its last hidden state: logits = cap·tanh(scale·(W h + b) / cap), or without the cap."""

    decoder: nn.Module
    output: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.output(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def summed_loss(model: nn.Module, batch: Batch, head: Head | None) -> Tensor:
    """Σ −log p(target) over the supervised tokens of `batch`, in fp32 (float64 for a float64 model).

    With a `head` (see `find_head`) the decoder runs alone and only supervised rows meet the head; without one the
    model itself makes the logits of those rows.
    """
    if head is None:
        logits = _selected_logits(model, batch)
    else:
        states = head.decoder(**batch.inputs(), use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1)[batch.predict]  # (n, h)
        if is_frozen_matrix(head.output):
            return linear_cross_entropy(hidden, head, batch.targets)
        logits = head.logits(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """`LinearCrossEntropy` of hidden states (n, h) under a frozen `head`."""
    with whole(head.output):
        weight, bias = head.output.weight, head.output.bias
        loss: Tensor = LinearCrossEntropy.apply(hidden, weight, bias, targets, head.scale, head.cap)  # type: ignore[no-untyped-call]
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy of z = cap·tanh(scale·(hidden Wᵀ + b) / cap) against targets; hidden (n, h), frozen W (V, h).

    One pass over the vocabulary in tiles of `TILE` words, with the softmax normalised as it goes (Milakov and
    Gimelshein 2018, arXiv:1805.02867): m is the largest logit so far, s = Σ exp(z − m), and the expected row of W,
    E = Σ exp(z − m)·∂z·W / s, is all that the gradient needs: ∂L/∂hidden = E − ∂z_target·W_target, with ∂z = ∂z/∂(Wh).
    A tile of W is read once for both of its products, and its logits stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        n, vocab = hidden.shape[0], weight.shape[0]
        largest = torch.full((n, 1), -torch.inf, dtype=wide, device=hidden.device)  # m
        mass = torch.zeros_like(largest)  # s
        expected = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None  # E·s
        for start in range(0, vocab, TILE):
            part = slice(start, start + TILE)
            z, slope = _bent(F.linear(hidden, weight[part], None if bias is None else bias[part]).to(wide), scale, cap)
            before, largest = largest, torch.maximum(largest, z.amax(dim=1, keepdim=True))
            shrink = (before - largest).exp_()
            p = z.sub_(largest).exp_()  # not yet divided by s
            mass.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
            if expected is not None:
                p = p if slope is None else p.mul_(slope)
                expected.mul_(shrink).add_(p.to(hidden.dtype) @ weight[part])
        rows = weight[targets]  # (n, h)
        own = (hidden.to(wide) * rows).sum(dim=1, keepdim=True)
        own = own if bias is None else own + bias[targets, None]
        chosen, slope = _bent(own.to(hidden.dtype).to(wide), scale, cap)  # rounded as in its tile
        if expected is not None:
            expected.div_(mass).sub_(rows if slope is None else rows * slope)
            ctx.save_for_backward(expected.mul_(scale).to(hidden.dtype))
        return (mass.log() + largest - chosen).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


def _bent(z: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """cap·tanh(scale·z / cap) and its slope 1 − tanh², in place of z; without a cap scale·z, and no slope."""
    if scale != 1.0:
        z = z.mul_(scale)
    if cap is None:
        return z, None
    bend = z.div_(cap).tanh_()
    return bend * cap, 1 - bend.square()


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """How `model` turns hidden states into logits, if it is a linear head with a scale and a cap; else None.

    Found by trying: the decoder's output through the candidate has to be the model's own logits.
    """
    get_output, get_decoder = (
        getattr(model, "get_output_embeddings", None),
        getattr(model, "get_decoder", None),
    )
    if not callable(get_output) or not callable(get_decoder):
        return None
    output, decoder = get_output(), get_decoder()
    if not isinstance(output, nn.Module) or not isinstance(decoder, nn.Module) or decoder is model:
        return None
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % config.vocab_size
    try:
        with evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
        for head in (Head(decoder, output, scale, cap) for scale in _scales(config) for cap in _caps(config)):
            logits = head.logits(hidden)
            if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance * expected.abs().max():
                return head
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return None


def _scales(config: Any) -> list[float]:
    """Families name it differently: Cohere multiplies by logit_scale, Granite divides by logits_scaling."""
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return [1.0, *([float(factor)] if factor else []), *([1 / float(divisor)] if divisor else [])]


def _caps(config: Any) -> list[float | None]:
    cap = getattr(config, "final_logit_softcapping", None)
    return [float(cap), None] if cap else [None]


def is_frozen_matrix(layer: nn.Module) -> bool:
    """Whether `layer` can be the head that is walked in tiles; the logits of any other one are made whole."""
    kind, hooks = type(layer), len(layer._forward_hooks) + len(layer._forward_pre_hooks)
    if hasattr(layer, "unshard"):  # dealt out over processes: FSDP2 put a class in front of its own, and a hook of each
        kind, hooks = kind.__mro__[2], hooks - 2
    return kind is nn.Linear and not hooks and not any(p.requires_grad for p in layer.parameters())


def _selected_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits, (n, V), with all but the supervised rows taken away before its head where it has one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        return model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)[batch.predict]  # type: ignore[no-any-return]

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[batch.predict].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        return model(**batch.inputs(), use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()
