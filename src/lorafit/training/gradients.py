"""The gradients of all trained parameters in one flat buffer.

Each parameter's `.grad` is a view of it, into which autograd adds. Setting them to zero, their norm, clipping them, and
(over several processes) summing them is then one operation on one tensor, however many layers there are.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatGradients:
    """One buffer per dtype and device of `parameters`; in fp32 training that is one."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            kinds[parameter.dtype, parameter.device].append(parameter)
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.buffers: list[Tensor] = []
        for (dtype, device), members in kinds.items():
            buffer = torch.zeros(sum(p.numel() for p in members), dtype=dtype, device=device)
            parts = torch.split(buffer, [p.numel() for p in members])
            self.views += [(p, part.view_as(p)) for p, part in zip(members, parts, strict=True)]
            self.buffers.append(buffer)

    def begin(self) -> None:
        """All gradients are zero, and in the buffer: whoever set a `.grad` of their own has lost it."""
        for buffer in self.buffers:
            buffer.zero_()
        for parameter, view in self.views:
            parameter.grad = view

    def clip(self, limit: float | None) -> float:
        """Their norm over all parameters; if it is larger than `limit` they are scaled down to that."""
        norm = math.hypot(*(torch.linalg.vector_norm(buffer).item() for buffer in self.buffers))
        if limit is not None and norm > limit:
            for buffer in self.buffers:
                buffer.mul_(limit / norm)
        return norm

    def end(self) -> None:
        """Give the memory back: no parameter has a gradient."""
        for parameter, _ in self.views:
            parameter.grad = None
