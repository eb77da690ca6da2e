"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from lorafit.config import TrainConfig
from lorafit.errors import UsageError


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over every parameter that is trained; the learning rate is set at each step by `lr_at`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("nothing in this model is trained: add_lora it first")
    return torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a straight rise, then the schedule down to 0.

    A function of the step and nothing else, so there is no scheduler whose state could be lost.
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * max(0.0, fall)
