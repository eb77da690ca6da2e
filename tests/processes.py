"""Several processes for a test: forked from a server that has imported everything once, so that each starts at once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ["tests.conftest", "lorafit.app.cli", "lorafit.model.load", "lorafit.training.calibrate"]
CONTEXT.set_forkserver_preload(IMPORTED)


def run(size: int, job: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What `job(*args)` returns in each of `size` processes that are launched as torchrun launches them.

    An exception's text instead where it raises; None for a process that ended without a word.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    members = [
        CONTEXT.Process(target=_member, args=(rank, size, port, pipe[1], job, args)) for rank, pipe in enumerate(pipes)
    ]
    for member, pipe in zip(members, pipes, strict=True):
        member.start()
        pipe[1].close()
    found = []
    try:
        for receiver, _ in pipes:
            assert receiver.poll(timeout), f"nothing from a process within {timeout} s"
            try:
                found.append(receiver.recv())
            except EOFError:
                found.append(None)
    finally:
        for member in members:
            member.join(5)
            member.kill()
    return found


def _member(rank: int, size: int, port: int, pipe: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(job(*args))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")
