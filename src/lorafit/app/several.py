"""A verb in several processes: who may be one of them, how they find each other, and that they speak with one voice."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from lorafit.app.common import base
from lorafit.config import ModelConfig
from lorafit.errors import UsageError
from lorafit.world import ALONE, World, launched

VERBS = ("train", "eval")


def check(verb: str) -> None:
    """UsageError for a verb that several processes would each do in full, in each other's way."""
    here = launched()
    if here is not None and here.size > 1 and verb not in VERBS:
        raise UsageError(
            f"{verb} is for one process, and this is one of {here.size}: start it without torchrun "
            f"(or unset WORLD_SIZE); in several there are {', '.join(VERBS)}"
        )


@contextmanager
def connected(model: ModelConfig) -> Iterator[World]:
    """Inside, all processes of this launch know each other, and only process 0 is heard."""
    here = launched()
    if here is None:
        yield ALONE
        return
    if here.size > 1 and ":" in model.device:
        raise UsageError(f"{here.size} processes cannot all have {model.device}: each takes the GPU of its own number")
    from lorafit.model.load import resolve_device
    from lorafit.training.distributed import started

    with started(resolve_device(model.device)) as here, open(os.devnull, "w") as nowhere:
        if here.is_main:
            yield here
            return
        with redirect_stdout(nowhere):
            yield here


def fetching(here: World, *names: str | None) -> AbstractContextManager[None]:
    """Around reading `names`: where one of them is on the hub, process 0 does it first, and the others find it here."""
    from lorafit.training.distributed import main_first

    local = all(not name or Path(name.partition(":")[0]).expanduser().exists() for name in names)
    return nullcontext() if local else main_first(here)


def sharded(model: ModelConfig, here: World) -> Any:
    """The base model, dealt out over the processes, which load it together once its files are on this machine."""
    from lorafit.model.load import load_model, model_folder
    from lorafit.training.sharding import check_processes

    check_processes()
    with fetching(here, model.model):
        model_folder(model.model, revision=model.revision)
    return load_model(**base(model), shard=True)[0]


def speaks() -> bool:
    """Whether it is this process that says why the command ends."""
    try:
        if launched() is None:
            return True
    except UsageError:
        return True
    from lorafit.training import distributed

    return distributed.speaks()
