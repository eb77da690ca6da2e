"""Layers that see the same tensor, such as the query, key and value of attention, computed together.

Which ones do is tried, not looked up: in one short pass every LoRA layer notes the tensor that it is handed, and layers
that were handed one and the same object make a group. In training the first of a group that is called computes all of
them (`lora/fused.py`), and the others hand out what is there. Any other input they compute for themselves.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lorafit.lora.fused import low_rank_linear
from lorafit.lora.layers import DoraLinear, LoraLinear
from lorafit.training.attention import probe
from lorafit.training.blocks import Forward, replaced


@contextmanager
def inputs_shared(model: nn.Module, packed: bool) -> Iterator[None]:
    """Inside the block, LoRA layers that see the same tensor are computed together."""
    groups = [_Group(layers) for layers in find_groups(model, packed)]
    with ExitStack() as stack:
        for group in groups:
            for layer in group.layers:
                stack.enter_context(replaced([layer], partial(group.member, layer)))
        yield


def find_groups(model: nn.Module, packed: bool) -> list[list[LoraLinear]]:
    """LoRA and DoRA layers that a pass hands the same tensor, in the order in which they are called."""
    calls: list[tuple[Tensor, LoraLinear]] = []  # holds every tensor, so that no two of them can have one id

    def noted(layer: LoraLinear, forward: Forward) -> Forward:
        def run(x: Tensor) -> Tensor:
            calls.append((x, layer))
            return forward(x)  # type: ignore[no-any-return]

        return run

    with ExitStack() as stack:
        for layer in model.modules():
            if not isinstance(layer, LoraLinear) or type(layer) not in (LoraLinear, DoraLinear):
                continue  # something else may be done with its input
            if "forward" not in vars(layer):
                stack.enter_context(replaced([layer], partial(noted, layer)))
        probe(model, packed)
    times = Counter(layer for _, layer in calls)
    groups: dict[int, list[LoraLinear]] = defaultdict(list)
    for x, layer in calls:
        if times[layer] == 1:
            groups[id(x)].append(layer)
    return [group for group in groups.values() if len(group) > 1]


class _Group:
    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.state: tuple[int, ...] | None = None
        self.ready: dict[LoraLinear, Tensor] = {}

    def member(self, layer: LoraLinear, forward: Forward) -> Forward:
        """How `layer` runs as one of the group."""

        def run(x: Tensor) -> Tensor:
            state = self._now(x)
            if state is None:
                return forward(x)  # type: ignore[no-any-return]
            if x is not self.x or state != self.state or layer not in self.ready:
                ys = low_rank_linear(x.reshape(-1, x.shape[-1]), None, [layer.parts for layer in self.layers])
                self.x, self.state = x, state
                shaped = (y.view(*x.shape[:-1], y.shape[-1]) for y in ys)
                self.ready = dict(zip(self.layers, shaped, strict=True))
            y = self.ready.pop(layer)
            if not self.ready:
                self.x = None
            return y

        return run

    def _now(self, x: Tensor) -> tuple[int, ...] | None:
        """What results depend on beside the tensors' identity; None if the layers cannot be computed together."""
        if x.is_inference() or not all(layer.enabled and not layer.drops and layer._plain(x) for layer in self.layers):
            return None
        trained = (parameter for layer in self.layers for parameter in layer.parameters())
        return (torch.is_grad_enabled(), x._version, *(parameter._version for parameter in trained))
