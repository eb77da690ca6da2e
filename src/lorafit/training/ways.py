"""In which way a model runs while it is trained: on which kernels, without which work, compiled, or twice.

Each is undone afterwards, and none changes the result beyond rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lorafit.training.blocks import Note, checkpointed
from lorafit.training.compiling import compiled
from lorafit.training.idle_rows import idle_rows_skipped
from lorafit.training.kernels import fast_kernels
from lorafit.training.rules import held_still
from lorafit.training.run import Run
from lorafit.training.shared_input import inputs_shared


@contextmanager
def as_asked(run: Run, on_note: Note) -> Iterator[None]:
    """Inside the block of code, the run's model is trained as its settings ask."""
    with ExitStack() as stack:
        stack.enter_context(held_still(run.model, run.config.rule))
        stack.enter_context(fast_kernels(run.model, on_note))
        if not run.config.compile:  # what follows depends on the rows of each pass, and no graph may
            stack.enter_context(idle_rows_skipped(run.model, run.passes.packed))
            stack.enter_context(inputs_shared(run.model, run.passes.packed))
        if run.config.compile:
            passes = run.passes
            stack.enter_context(
                compiled(run.model, lambda batch: passes.loss(run.model, batch, 1), passes.packed, on_note)
            )
        if run.config.checkpointing:  # around what is compiled, so that this is what runs twice
            stack.enter_context(checkpointed(run.model, on_note))
        yield
