"""The frozen base dealt out over several processes: PyTorch's own FSDP2, set up before a weight is read.

Every process keeps a slice of each matrix. A transformer block is put together while it computes, in the forward pass
and again in the backward pass, and the head and the embedding are while they are used; so beside its slices a process
holds one block at a time. What is small and stands outside of the blocks (the last norm, positions) every process has.

The adapter comes afterwards and FSDP2 never hears of it: its parameters are ordinary ones, the same in all processes,
and their gradients are summed as they are without sharding. A frozen weight has no gradient, so nothing else is sent
than weights.
"""

import ctypes
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from lorafit.data.batches import Batch, collate
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import ModelError, UsageError
from lorafit.lora.tokens import base_embedding, base_head, tied
from lorafit.training.blocks import find_blocks
from lorafit.training.distributed import smallest, world

MMAP_THRESHOLD = -3  # mallopt's name for it


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Deal the parameters of the plain `model` out over all processes, and freeze them. Returns it.

    `model` may be on the meta device: its parameters are slices from here on, and only these have to be read.
    UsageError where there is one process; ModelError for a model without a list of blocks, or with a weight in several.
    """
    processes = check_processes()
    blocks, name = find_blocks(model), type(model).__name__
    if not blocks:
        raise ModelError(f"{name} has no list of blocks to deal out over processes: leave --shard away")
    owners = Counter(id(parameter) for block in blocks for parameter in set(block.parameters()))
    if any(count > 1 for count in owners.values()):
        raise ModelError(f"{name} uses one weight in several of its blocks, which cannot be dealt out: no --shard")
    stacks = {p.shape[0] for block in blocks for p in block.parameters() if p.ndim == 3}
    if few := sorted(n for n in stacks if -(-n // processes) * (processes - 1) >= n):
        raise ModelError(f"{name}: of {few[0]} experts not every one of {processes} would have one: take fewer")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu":
        _keep_no_holes()
    mesh = init_device_mesh(device.type, (processes,))
    embedding, head, together = base_embedding(model), base_head(model), tied(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    ends = [embedding if not together else None, head]
    units = [*blocks, *(end for end in ends if end is not None and not any(id(p) in inside for p in end.parameters()))]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    if together and embedding is not None and head is not None:
        _follow(embedding, head)
    decoder = getattr(model, "get_decoder", lambda: None)()
    if isinstance(decoder, nn.Module) and decoder is not model:  # one root: the next block is sent while one computes
        # It has no weight of its own that would be missed behind a view; the blocks are hooked one by one.
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP{type(decoder).__name__}\) returned a view")
        fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=_plain(decoder))
    return model.requires_grad_(False)


def check_processes() -> int:
    """How many processes there are; UsageError if there is one."""
    processes = world().size
    if processes == 1:
        raise UsageError(
            "shard deals the base out over several processes, and this is one: torchrun --nproc-per-node 2 -m lorafit …"
        )
    return processes


def is_sharded(model: nn.Module) -> bool:
    """Whether the base of `model` is dealt out over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the block `module`, if it is one that was dealt out for itself, has its whole weight in every process."""
    unit: Any = module
    if not hasattr(module, "unshard"):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def evened(window: list[Batch], packed: bool) -> list[Batch]:
    """`window` with passes behind it that carry no loss, so that every process has as many as the one with most.

    In each pass of a sharded base all processes take part, those that have no row left as well.
    """
    most = int(-smallest(-len(window))[0])
    idle = collate([Example(ids=[0, 0], labels=[IGNORE, IGNORE], source="no row")], packed=packed)
    return window + [idle] * (most - len(window))


def anyone(stop: Callable[[], str | None]) -> str | None:
    """What `stop` answers, here or on another process; all of them ask at the same place."""
    reason = stop()
    asked = not smallest(not reason)[0]
    return reason or ("a signal to another process" if asked else None)


def _keep_no_holes() -> None:
    """Have glibc give large blocks back to the system, as CUDA's allocator gives them back to its pool.

    Whole weights come and go with every block of the model. glibc takes the first that it frees for a sign to keep the
    like of it in its heap from then on (up to 32 MB), where the holes between do not fit the next: 1.2 GB were kept for
    a model of 0.44 GB, without a byte in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)


def _follow(embedding: nn.Module, head: nn.Module) -> None:
    """The embedding uses the head's matrix, of which FSDP2 knows as the head's alone, and needs it in forward only."""
    embedding.weight = head.weight

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        head.unshard()  # type: ignore[operator]
        module.weight = head.weight

    def end(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        head.reshard()  # type: ignore[operator]
        module.weight = head.weight

    embedding.register_forward_pre_hook(begin)
    embedding.register_forward_hook(end, always_call=True)


def _plain(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if not hasattr(parameter, "full_tensor")}
