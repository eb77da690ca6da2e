"""Which of several processes this one is, as torchrun (and accelerate launch) say it: in environment variables."""

import os
from dataclasses import dataclass

from lorafit.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, and its place among those of this machine. Process 0 writes and speaks for all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World()


def launched() -> World | None:
    """The world that the environment describes; None for a process that was started by itself."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return None
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    try:
        here = World(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})
    except ValueError as error:
        raise UsageError(f"{', '.join(names.values())} must be numbers, as torchrun sets them: {error}") from None
    if not 0 <= here.rank < here.size:
        raise UsageError(f"RANK is {here.rank} of WORLD_SIZE {here.size}: let torchrun set both")
    return here
