"""Training rules: what becomes of the gradients of A and B before AdamW sees them, and whether both of them move.

A rule is a function of one layer that rewrites `.grad` in place. It depends on nothing but the layer, so that there is
no state which a resumed run could lack; gradients are clipped, and their norm is reported, before it. W + s·B·A is
what a rule is about; for DoRA that is the direction, and the magnitude is trained as ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorafit.errors import UsageError, listing
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear

DAMPING = 1e-2
"""δ: keeps the inverse finite where B is still 0. The value is PEFT's."""


@torch.no_grad()
def riemannian(layer: LoraLinear) -> None:
    """g_A ← (BᵀB + δI)⁻¹ g_A,  g_B ← g_B (AAᵀ + δI)⁻¹: both factors move ΔW by amounts of one size.

    Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv:2402.02347, §3.
    A (r, in), B (out, r); two systems of r equations a layer, or an expert.
    """
    A, B = layer.factors
    A_e, B_e = layer.matrices(A, B)
    if A.grad is not None:
        g_A, _ = layer.matrices(A.grad, B)
        g_A.copy_(torch.linalg.solve(_damped(B_e.mT @ B_e), g_A))
    if B.grad is not None:
        _, g_B = layer.matrices(A, B.grad)
        g_B.copy_(torch.linalg.solve(_damped(A_e @ A_e.mT), g_B, left=False))


@torch.no_grad()
def lora_fa(layer: LoraLinear) -> None:
    """A is frozen, and g_B ← g_B (AAᵀ)⁺ / s²: then s·g_B·A is the gradient of W, projected onto the rows of A.

    Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation", arXiv:2308.03303, with the correction of the
    gradient that its later versions and PEFT's `create_lorafa_optimizer` have, in fp32 (PEFT: in bf16) and with the
    pseudo-inverse, so that more rows in A than it has columns do no harm.
    """
    A, B = layer.factors
    if B.grad is not None:
        A_e, g_B = layer.matrices(A, B.grad)
        g_B.copy_(g_B @ torch.linalg.pinv(A_e @ A_e.mT, hermitian=True) / layer.scale**2)


def _damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


RULES: dict[str, Callable[[LoraLinear], None]] = {"riemannian": riemannian, "lora-fa": lora_fa}


def apply_rule(model: nn.Module, optimizer: torch.optim.Optimizer, rule: str) -> None:
    """From now on `optimizer` applies `rule` at the beginning of each of its steps; 'adamw' is to do nothing."""
    if rule not in RULES:
        return
    layers = [layer for _, layer in wrappers(model) if isinstance(layer, LoraLinear)]
    if not layers:
        raise UsageError(f"rule {rule} is about A and B, and there is none in this model: add_lora it, or use adamw")

    def rewrite(*ignored: object) -> None:
        for layer in layers:
            RULES[rule](layer)

    optimizer.register_step_pre_hook(rewrite)


def frozen_factors(model: nn.Module, rule: str) -> list[Tensor]:
    """What `rule` does not let move: every A, for LoRA-FA."""
    if rule != "lora-fa":
        return []
    return [layer.factors[0] for _, layer in wrappers(model) if isinstance(layer, LoraLinear)]


@contextmanager
def held_still(model: nn.Module, rule: str) -> Iterator[None]:
    """Inside the block no gradient is computed for what `rule` freezes.

    UsageError where an A is 0, as that of a fresh embedding: B would not move either.
    """
    tensors = frozen_factors(model, rule)
    names = [name for name, layer in wrappers(model) if isinstance(layer, LoraLinear)]
    if still := [name for name, A in zip(names, tensors, strict=False) if not A.any()]:
        raise UsageError(f"rule lora-fa freezes A, which is 0 in {listing(still)}: nothing would be learned there")
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor, flag in zip(tensors, before, strict=True):
            tensor.requires_grad_(flag)
