"""In which way the blocks of a model run while it is trained: on which kernels, compiled, computed twice, and
without the gradients that nobody asks for.

Each is undone afterwards, and none changes the result beyond rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lorafit.training.blocks import Note, checkpointed
from lorafit.training.compiling import compiled
from lorafit.training.kernels import fast_kernels
from lorafit.training.rules import frozen_factors, without_gradient
from lorafit.training.run import Run


@contextmanager
def as_asked(run: Run, on_note: Note) -> Iterator[None]:
    """Inside the block of code, the run's model is trained as its settings ask."""
    with ExitStack() as stack:
        stack.enter_context(without_gradient(frozen_factors(run.model, run.config.rule)))  # they are not stepped
        stack.enter_context(fast_kernels(run.model, on_note))
        if run.config.compile:
            passes = run.passes
            stack.enter_context(
                compiled(run.model, lambda batch: passes.loss(run.model, batch, 1), passes.packed, on_note)
            )
        if run.config.checkpointing:  # around what is compiled, so that this is what runs twice
            stack.enter_context(checkpointed(run.model, on_note))
        yield
