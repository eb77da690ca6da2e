"""Out of memory is no end: what was being done is dropped and done again, in passes of half the size."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from lorafit.data.batches import Batch
from lorafit.errors import LorafitError, OutOfMemory, ProcessError

Value = TypeVar("Value")
# How torch says that there is no memory where it has no class of errors for it.
SIGNS = ("can't allocate memory", "out of memory", "std::bad_alloc", "ALLOC_FAILED")


class PassTooLarge(LorafitError):
    """A pass of several rows did not fit. Carries the tokens of the largest pass so far; every process hears of it."""


@dataclass
class PassLimit:
    """The most tokens a pass may hold beside what was asked for; None: no limit. It only ever falls."""

    tokens: int | None = None
    largest: int = 0
    sharded: bool = False

    @contextmanager
    def fits(self, batch: Batch) -> Iterator[None]:
        """Around one pass: PassTooLarge if memory runs out, or OutOfMemory if the pass is a single row already.

        With a sharded base the other processes are waiting inside the same pass, and none of them can take it again:
        whatever fails is a ProcessError, which ends the run at once.
        """
        self.largest = max(self.largest, batch.input_ids.numel())
        try:
            yield
        except Exception as error:
            if self.sharded and not isinstance(error, LorafitError):
                said = " ".join(str(error).split())[:200]
                raise ProcessError(
                    f"a pass of a sharded base failed ({said}); if memory ran out, lower max_tokens_per_pack"
                ) from error
            if not out_of_memory(error):
                raise
            if len(batch.lengths) > 1:
                raise PassTooLarge(self.largest) from error
            raise OutOfMemory(
                f"{batch.sources[0]}: a single row of {batch.lengths[0]} tokens does not fit into memory: "
                "lower max_length, use checkpointing, or take a smaller model"
            ) from error

    def within(self, attempt: Callable[[], Value], on_note: Callable[[str], None]) -> Value:
        """The value of `attempt`, which is done again from its beginning where a pass of it is too large."""
        while True:
            self.largest = 0
            try:
                return attempt()
            except PassTooLarge as error:
                largest: int = error.args[0]  # and nothing else here: the error holds the frames, and they the tensors
            gc.collect()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
            before = largest if self.tokens is None else min(self.tokens, largest)
            self.tokens = max(1, before // 2)
            on_note(f"out of memory with {before:,} tokens in a pass: from here on at most {self.tokens:,}")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in SIGNS)
