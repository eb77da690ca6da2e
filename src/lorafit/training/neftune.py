"""NEFTune: noise on the embeddings while training.

    e ← e + U(−1, 1)·α / √(L·d)        L the length of the row, d the width of the embedding

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv:2310.05914, Algorithm 1. L is the
length of each row on its own, packed or padded (transformers takes the length of the padded batch). The numbers come
from torch's generator, which the loop seeds with (seed, step, pass): a resumed run draws the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorafit.data.batches import Batch
from lorafit.errors import UsageError


@contextmanager
def noisy(model: nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """Inside the block, what `model` looks up for the tokens of `batch` carries noise of size `alpha`; 0: none."""
    if not alpha:
        yield
        return

    def add(module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        lengths = torch.tensor(batch.lengths, device=embedded.device)
        size = alpha * (lengths * embedded.shape[-1]).rsqrt()  # one for each row
        size = size.repeat_interleave(lengths)[None, :, None] if batch.packed else size[:, None, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size.to(embedded.dtype)

    handle = _embedding(model).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _embedding(model: nn.Module) -> nn.Module:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise UsageError(f"neftune: {type(model).__name__} does not say where its embeddings are: train it without")
    return found
