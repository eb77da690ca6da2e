"""How much memory training will take, in one line."""

import torch
from torch import nn

from lorafit.training.memory import USED, free_memory, need


def estimate(model: nn.Module, tokens: int, device: torch.device, checkpointing: bool = False) -> str:
    """About training `model`, which carries its adapter, with `tokens` in a forward pass; reads no weight.

    `device` is where it would be trained: `model` may be without its weights.
    """
    what = need(model, checkpointing)
    parts = {
        "base": what.base,
        "adapter with gradients and optimizer": what.adapter,
        f"activations of {tokens:,} tokens": what.activations(tokens),
    }
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    line = f"memory, estimated: {sum(parts.values()) / 2**20:,.0f} MiB ({listed})"
    free = free_memory(device)
    if free is None:
        return line
    most = what.tokens(USED * (free - what.base - what.adapter))
    cut = f"passes are cut to {most:,} tokens" if tokens > most else f"a pass may hold {most:,} tokens"
    return f"{line}; {free / 2**20:,.0f} MiB are free: {cut}"
