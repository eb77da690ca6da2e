"""Several processes on one run, by PyTorch's own engine: what they sum, what they agree on, and how they end.

Each process holds the whole adapter and takes its share of a step's rows. Gradients are summed once a step, in one
piece; then every process takes the same step, so that the adapters stay the same. Whatever ends the run on one of them
(an error, a signal, a pass that does not fit) ends it on all, with the same error.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorafit.errors import Interrupted, LorafitError, ProcessError, UsageError
from lorafit.world import ALONE, World, launched

TIMEOUT = timedelta(minutes=10)
"""How long a sum waits for a process that is there but does not come. One that is gone is noticed at once."""
SAID = "lorafit/said"
"""In the store once a process has told why the run ends."""
MOMENT = 0.0 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 5.0
LONGEST_WAIT = 6 * 3600.0
"""Seconds that `exchange` waits: while process 0 fetches a model, say."""


@dataclass
class _Link:
    """How processes agree: small sums on the CPU, and words through the store that torchrun keeps."""

    group: Any
    control: Any
    store: Any
    turns: Iterator[int] = field(default_factory=count)


_link: _Link | None = None


def world() -> World:
    """This process among those of the group that is initialised; `ALONE` without one.

    UsageError for one of several processes that nobody has connected: each would train an adapter of its own.
    """
    here = launched()
    if not dist.is_initialized():
        if here is not None and here.size > 1:
            raise UsageError(
                f"this is one of {here.size} processes, which do not know each other yet: call "
                "torch.distributed.init_process_group() first, or unset WORLD_SIZE"
            )
        return ALONE
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, *((here.local_rank, here.local_size) if here else (rank, size)))


@contextmanager
def started(device: torch.device) -> Iterator[World]:
    """Inside, the processes that torchrun started know each other: NCCL on CUDA, each with the GPU of its local rank,
    and gloo on the CPU. A process that was started by itself is `ALONE`."""
    here = launched()
    if here is None or dist.is_initialized():
        yield world()
        return
    if device.type == "cuda":
        if here.local_size > torch.cuda.device_count():
            raise UsageError(
                f"{here.local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs: "
                "give --nproc-per-node as many as there are"
            )
        torch.cuda.set_device(here.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        _linked()
    except RuntimeError as error:
        raise ProcessError(f"process {here.rank} of {here.size} does not reach the others: {_line(error)}") from error
    yield world()
    _leave(world())
    dist.destroy_process_group()  # not behind an error: it may wait for processes that do not come any more


def _leave(here: World) -> None:
    """Process 0, which may be the one that keeps the store, goes last: the others may still be reading from it."""
    store, gone = _linked().store, [f"lorafit/gone/{rank}" for rank in range(1, here.size)]
    if not here.is_main:
        store.set(gone[here.rank - 1], "")
    elif gone:
        with suppress(RuntimeError):  # they need moments; one that has died meanwhile will not come
            store.wait(gone, timedelta(seconds=10))


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if not dist.is_initialized():
        return
    with _noticed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give each tensor, in place, the bits that it has on process 0. They are contiguous and lie on the CPU."""
    if not dist.is_initialized():
        return
    with _noticed():
        for tensor in tensors:
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=_linked().control)


def exchange(value: Any) -> list[Any]:
    """What each process brings, as JSON, in the order of their ranks. Waits for hours if need be, and for a barrier."""
    if not dist.is_initialized():
        return [value]
    link, turn = _linked(), next(_linked().turns)
    keys = [f"lorafit/{turn}/{rank}" for rank in range(dist.get_world_size())]
    pause, end = 0.001, time.monotonic() + LONGEST_WAIT
    with _noticed():
        link.store.set(keys[dist.get_rank()], json.dumps(value))
        while not link.store.check(keys):  # not `wait`, inside which no signal arrives
            if link.store.check([SAID]):
                raise ProcessError("another process of this run has ended")
            if time.monotonic() > end:
                raise ProcessError(f"another process did not come within {LONGEST_WAIT / 3600:g} hours")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return [json.loads(link.store.get(key)) for key in keys]


def smallest(*values: float) -> list[float]:
    """Each value's minimum over all processes."""
    if not dist.is_initialized():
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    with _noticed():
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=_linked().control)
    found: list[float] = numbers.tolist()
    return found


@contextmanager
def together(here: World, *sums: Tensor) -> Iterator[None]:
    """A block that all processes run, each on its share. Afterwards `sums` (on the CPU) are summed over all of them.

    Where it fails on one process it fails on all, with the error of the lowest rank that has one.
    """
    if here.size == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except ProcessError:
        raise  # the others are gone, or raise the same
    except Exception as error:
        failed = error
    numbers = torch.tensor([float(failed is not None), *sums], dtype=torch.float64)
    with _noticed():
        dist.all_reduce(numbers, group=_linked().control)
    if numbers[0]:
        _raise_first(failed)
    for total, number in zip(sums, numbers[1:], strict=True):
        total.copy_(number)


@contextmanager
def main_first(here: World) -> Iterator[None]:
    """A block that process 0 runs first: what it fetches the others find. If it fails there it fails everywhere."""
    if here.size == 1:
        yield
        return
    if not here.is_main:
        _raise_first(None)
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    _raise_first(failed)


def speaks() -> bool:
    """Whether it is this process that tells why the run ends: the first that asks, or 0 where none can be asked.

    Where it is process 0 that keeps the store, and not torchrun, it stays a moment: the others ask there, too.
    """
    if _link is None:
        here = launched()
        return here is None or here.is_main
    try:
        first = bool(_link.store.add(SAID, 1) == 1)
        end = time.monotonic() + MOMENT
        while dist.get_rank() == 0 and _link.store.add(SAID, 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.01)
        return first
    except RuntimeError:
        return True


def _raise_first(mine: Exception | None) -> None:
    """Exchange what has failed and raise the first of it, in this process's own words where it is the one."""
    described = mine and {"kind": type(mine).__name__, "args": mine.args if _is_ours(mine) else [_line(mine)]}
    for rank, found in enumerate(exchange(described)):
        if found is None:
            continue
        if mine is not None and rank == dist.get_rank() and not _is_ours(mine):
            raise mine
        kinds = {kind.__name__: kind for kind in _kinds(LorafitError)}
        first, *rest = found["args"] or [""]
        if found["kind"] not in kinds:
            first = f"{found['kind']}: {first}"
        if rank and isinstance(first, str) and found["kind"] != Interrupted.__name__:
            first = f"process {rank}: {first}"
        raise kinds.get(found["kind"], ProcessError)(first, *rest) from mine


def _is_ours(error: Exception) -> bool:
    return isinstance(error, LorafitError)


def _kinds(kind: type[LorafitError]) -> Iterator[type[LorafitError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _linked() -> _Link:
    """What the group that is initialised agrees through; all processes ask for it first at the same place."""
    global _link
    if _link is None or _link.group is not dist.group.WORLD:
        store = dist.distributed_c10d._get_default_store()
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _link = _Link(dist.group.WORLD, control, store)
    return _link


@contextmanager
def _noticed() -> Iterator[None]:
    """A process that is gone, or does not come, is one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LorafitError):
            raise
        raise ProcessError(f"another process of this run is gone, or does not answer: {_line(error)}") from error


def _line(error: Exception, limit: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
