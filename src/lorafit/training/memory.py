"""How much memory a forward and backward pass takes, known from shapes alone, and how many tokens fit in what is free.

Per token, autograd keeps about the inputs and outputs of all linear layers, in the base's precision and in part
(norms, activation functions) in fp32; attention keeps its inputs alone. GPT-2, whose activation function is spelled out
in many steps, keeps three quarters more.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit.data.batches import Batches
from lorafit.lora.inject import plain_modules
from lorafit.lora.weights import is_readable
from lorafit.training.blocks import find_blocks
from lorafit.training.loss import TILE, is_frozen_matrix

FP32_SHARE = 0.6
FP32_WITH_ADAMW = 4 * 4  # bytes of a weight, its gradient and two moments
LOGIT = 6  # bytes of a logit in the tile under way: fp32, and in the base's precision before that
WHOLE_LOGIT = 12  # where all are made at once: the log-probability that is kept, and two gradients on their way back
USED = 0.8
"""The share of the free memory that is planned with: the estimate is no measurement, and allocators leave gaps."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """What training one model takes, in bytes; `token` is per token of a forward pass."""

    base: int
    adapter: int
    token: float
    logits: float

    def activations(self, tokens: int) -> int:
        """What a pass of `tokens` takes beside weights and optimizer."""
        return int(tokens * (self.token + self.logits))

    def tokens(self, free: float) -> int:
        """The largest pass that fits into `free` bytes, at least one token."""
        return max(1, int(free / (self.token + self.logits)))


def need(model: nn.Module, checkpointing: bool = False) -> Need:
    """For `model`, which carries its adapter; reads no weight.

    The head is taken for one that is walked in tiles if it is a frozen matrix. Whether the loss can use it so is tried
    at the start of training only (`find_head`); for a model where it cannot, `logits` is too small.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    plain = plain_modules(model).values()
    layers = [m for m in plain if is_readable(m) and not isinstance(m, nn.Embedding) and m is not head]
    width = sum(sum(p.shape) for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2)
    # Experts are one stack of matrices (experts, out, in), of which each token meets a few.
    met = getattr(config, "num_experts_per_tok", None) or 1
    width += sum(met * sum(p.shape[1:]) for p in frozen if p.ndim == 3)
    precision = next((p.element_size() for p in frozen if p.is_floating_point()), 4)
    blocks = max(1, len(find_blocks(model)) or getattr(config, "num_hidden_layers", None) or 1)
    token = width * (precision + FP32_SHARE)
    if checkpointing:  # the input of each block, and all of the one that is computed again
        token = token / blocks + blocks * (getattr(config, "hidden_size", None) or 1) * precision
    tiled = isinstance(head, nn.Module) and is_frozen_matrix(head)
    logits = LOGIT * min(TILE, config.vocab_size) if tiled else WHOLE_LOGIT * config.vocab_size
    return Need(sum(p.nbytes for p in frozen), trained * FP32_WITH_ADAMW, token, logits)


def automatic_limit(
    model: nn.Module, batches: Batches, checkpointing: bool = False, processes: int = 1
) -> int | None:
    """How many tokens a pass may hold so that it fits into what is free; None: asked for already, or not known.

    `processes` of this machine share its memory; a GPU is one's own.
    """
    device = next(model.parameters()).device
    free = None if batches.max_tokens_per_pack is not None else free_memory(device)
    if free is None:
        return None
    what = need(model, checkpointing)
    free = free // processes if device.type == "cpu" else free
    # The adapter's weights are there already, its gradients and moments are still to come.
    return what.tokens(USED * (free - what.adapter * 3 / 4))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on `device`, or None if nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [*_available(Path("/proc/meminfo")), *_left_in_groups(Path("/proc/self/cgroup"), CGROUPS)]
    return min(found, default=None)


def _available(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves, up to the root; what is only cached counts as free."""
    names = ("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "")
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        limit, usage, cached = names[bool(controllers)]
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            most, used = _lines(folder / limit), _lines(folder / usage)
            if most and used and most[0].isdigit():
                key = cached or "total_inactive_file"
                stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
                yield max(0, int(most[0]) - int(used[0]) + int(stat.get(key, 0)))
            if folder == top:
                break


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if os.access(file, os.R_OK) and file.is_file() else []
