"""The last block computes its rows that carry loss, and no others where that is exact.

Behind the last attention no row depends on another, and only rows that predict a supervised token are asked for. Which
parts of the block may leave the rest out is tried, not looked up: a part is handed half of the rows, NaN is put in
place of the others, and the model has to give that half as before. From the whole to its parts: the feed-forward layers
pass, attention does not, but the projections of its queries and of its output do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lorafit.lora.inject import Wrapper
from lorafit.training.attention import close, pass_under_way, probe
from lorafit.training.blocks import Forward, find_blocks, replaced

WORTH = 0.75
"""Rows are left out where at most this share of them carries loss: taking rows out and putting them back costs, too."""


@contextmanager
def idle_rows_skipped(model: nn.Module, packed: bool) -> Iterator[None]:
    """Inside the block, parts of the last transformer block see the rows that carry loss."""
    with replaced(find_parts(model, packed), _on_needed_rows):
        yield


def _on_needed_rows(forward: Forward) -> Forward:
    def run(x: Tensor) -> Tensor:
        """x (batch, length, in) -> (batch, length, out), 0 in the rows that are left out"""
        batch = pass_under_way()
        if batch is None or batch.predict.numel() > WORTH * batch.input_ids.numel():
            return forward(x)  # type: ignore[no-any-return]
        needed = batch.predict.to(x.device)
        y: Tensor = forward(x.flatten(0, 1)[needed][None])[0]
        whole = y.new_zeros(x.shape[0] * x.shape[1], y.shape[-1])
        return whole.index_copy(0, needed, y).view(*x.shape[:2], -1)

    return run


def find_parts(model: nn.Module, packed: bool) -> list[nn.Module]:
    """The largest parts of the last block that may be handed fewer rows."""
    blocks = find_blocks(model)
    expected, batch = probe(model, packed)
    half = torch.arange(0, batch.input_ids.numel(), 2, device=expected.device)

    def exact(parts: list[nn.Module]) -> bool:
        alike: list[bool] = []
        try:
            with replaced(parts, partial(_tried, half, alike)):
                logits, _ = probe(model, packed)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False
        same = close(logits.flatten(0, 1)[half], expected.flatten(0, 1)[half])
        return same and len(alike) == len(parts) and all(alike)

    found: list[nn.Module] = []
    waiting = [*blocks[-1].children()] if blocks else []
    while waiting:
        part = waiting.pop(0)
        if not any(parameter.ndim > 1 for parameter in part.parameters()):
            continue
        if exact([*found, part]):
            found.append(part)
        elif not isinstance(part, Wrapper):
            waiting += part.children()
    return found


def _tried(rows: Tensor, alike: list[bool], forward: Forward) -> Forward:
    """Notes whether `forward` of some rows is what those rows get among all; where a result leaks, NaN spreads."""

    def run(x: Tensor) -> Tensor:
        whole, some = forward(x), forward(x.flatten(0, 1)[rows][None])[0]
        alike.append(close(some, whole.flatten(0, 1)[rows]))
        nowhere = torch.full_like(whole, torch.nan).flatten(0, 1)
        return nowhere.index_copy(0, rows, some).view_as(whole)

    return run
