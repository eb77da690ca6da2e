"""torch.compile, block by block.

Each transformer block's forward is compiled for lengths that change; blocks of one class share what is compiled.
Attention over packed rows stays outside of the graph, because the lengths of the rows are numbers that a graph would
be made anew for at every pass. Whether compiling works here is tried once: two short passes, forward and backward,
give the loss that they give without.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import AttentionInterface

from lorafit.data.batches import Batch, collate
from lorafit.data.chat import Example
from lorafit.training import attention
from lorafit.training.blocks import Forward, Note, find_blocks, replaced

GRAPHS = 64
"""So many forms of one function may be compiled: kinds of blocks, modes, and passes of one row beside longer ones."""
BACKEND = "inductor"
Loss = Callable[[Batch], torch.Tensor]


@contextmanager
def compiled(model: nn.Module, loss: Loss, packed: bool, on_note: Note = lambda sentence: None) -> Iterator[None]:
    """Inside the block of code, the transformer blocks run compiled; `on_note` hears of it where that cannot be.

    `loss` is how a pass is run in training, `packed` whether its rows are.
    """
    if not find_blocks(model):
        on_note(f"{type(model).__name__} has no list of blocks: it is trained without compiling")
        yield
        return
    probes = _probes(model, packed)
    expected = _tried(model, loss, probes)
    with ExitStack() as stack:
        if problem := _problem(stack, model, loss, probes, expected):
            stack.close()
            on_note(f"compiling does not work here ({problem}): the run goes on without")
            yield
            return
        # A function that fails to compile later on, for another shape, is run as it is.
        stack.enter_context(torch._dynamo.config.patch(suppress_errors=True))
        yield


@contextmanager
def _compiling(model: nn.Module) -> Iterator[None]:
    limits = torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=16 * GRAPHS)
    outside = torch.compiler.disable(attention.attend)  # type: ignore[no-untyped-call]
    AttentionInterface.register(attention.NAME, outside)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")  # the compiler's own, about itself
            with limits, replaced(find_blocks(model), _compiled):
                yield
    finally:
        AttentionInterface.register(attention.NAME, attention.attend)


def _compiled(forward: Forward) -> Forward:
    """Compiled with gradients alone: evaluation would be compiled a second time, and be little faster for it."""
    compiled = torch.compile(forward, dynamic=True, backend=BACKEND)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def _problem(
    stack: ExitStack, model: nn.Module, loss: Loss, probes: Sequence[Batch], expected: Sequence[float]
) -> str | None:
    """Compile until `stack` is closed. What is wrong with the compiled model, in a few words; None if nothing is."""
    try:
        stack.enter_context(_compiling(model))
        found = _tried(model, loss, probes)
    except Exception as error:  # the compiler has no one class for what can go wrong in it
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    tolerance = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 2e-2
    # With dropout two runs differ anyway: there only what is far off is taken for wrong.
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    for one, other in zip(found, expected, strict=True):
        if not abs(one - other) <= (0.5 if random else tolerance) * abs(other):
            return f"it makes a loss of {one:.6g} where {other:.6g} is right"
    return None


def _tried(model: nn.Module, loss: Loss, probes: Sequence[Batch]) -> list[float]:
    """The loss of each probe, forward and backward; leaves no gradient behind."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in trained]
    losses = []
    try:
        for batch in probes:
            with attention.row_attention(model, batch):
                value = loss(batch)
                value.backward()  # type: ignore[no-untyped-call]
            losses.append(value.item())
    finally:
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient
    return losses


def _probes(model: nn.Module, packed: bool) -> list[Batch]:
    """Two passes of several rows, of different lengths."""
    device, vocab = next(model.parameters()).device, model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    made = []
    for lengths in ((5, 7), (9, 4, 3)):
        rows = [[(7 * k + length) % vocab for k in range(length)] for length in lengths]
        batch = collate([Example(ids=ids, labels=ids, source="probe") for ids in rows], packed=packed)
        made.append(batch.to(device))
    return made
