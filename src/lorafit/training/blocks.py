"""The transformer blocks of a model, and what is put around each of them for the length of a run.

A block's `forward` is replaced on the instance and given back afterwards: its class, its hooks and the rest of the
model stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]
Note = Callable[[str], None]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleList that holds most of the model; none if there is no such list."""
    lists: list[nn.ModuleList] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside or ("\0",)):
            inside += (f"{name}.",)
            lists.append(module)
    size = {id(found): sum(p.numel() for p in found.parameters()) for found in lists}
    return list(max(lists, key=lambda found: size[id(found)], default=nn.ModuleList()))


@contextmanager
def replaced(blocks: Sequence[nn.Module], wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Inside the block of code, every one of `blocks` runs `wrap` of its own forward."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = wrap(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                vars(block).pop("forward", None)


@contextmanager
def checkpointed(model: nn.Module, on_note: Note = lambda sentence: None) -> Iterator[None]:
    """Inside the block of code, only the input of each transformer block is kept; the rest is computed again.

    The random state is put back for the second time, so that dropout drops the same numbers.
    """
    blocks = [block for block in find_blocks(model) if not getattr(block, "gradient_checkpointing", False)]
    if not find_blocks(model):
        on_note(f"{type(model).__name__} has no list of blocks: it is trained without checkpointing")
    with replaced(blocks, _recomputed):
        yield


def _recomputed(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
