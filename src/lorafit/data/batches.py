"""Examples become batches, as a pure function of (seed, step): nothing to save, nothing to restore.

The rows of one optimizer step are drawn first; how they are cut into forward passes (`accumulate`,
`max_tokens_per_pack`) and whether they are packed or padded changes the memory, never the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafit.data.chat import IGNORE, Example
from lorafit.errors import DataError
from lorafit.world import ALONE, World


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass, packed (1, T) or right-padded (rows, longest).

    `predict` (n,) are the flat positions whose hidden state predicts a supervised token, and `targets` (n,) those
    tokens: the shift by one has been made, within each row. `sources` names the rows, for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    predict: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    sources: tuple[str, ...]
    packed: bool

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with.

        No mask in either form: packed rows are kept apart by `attention.py`, and padding on the right lies in the
        future of every real token, which a causal model cannot see. (A mask would do harm: with a sliding window it
        leaves padding with nothing to attend to, and the NaN of those rows spreads through 0 · NaN.)
        """
        return {"input_ids": self.input_ids} | ({"position_ids": self.position_ids} if self.packed else {})

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        names = ("input_ids", "position_ids", "predict", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(rows: Sequence[Example], *, packed: bool) -> Batch:
    """Lay `rows` end to end, or pad them on the right to the longest."""
    lengths = tuple(len(row.ids) for row in rows)
    stride = [0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else [i * max(lengths) for i in range(len(rows))]
    # Where row i starts in the flattened batch; the state at p predicts the token at p + 1 of the same row.
    pairs = [
        (start + p - 1, label)
        for start, row in zip(stride, rows, strict=False)
        for p, label in enumerate(row.labels)
        if label != IGNORE and p > 0
    ]
    ids = [torch.tensor(row.ids) for row in rows]
    positions = [torch.arange(length) for length in lengths]
    if packed:
        input_ids, position_ids = torch.cat(ids)[None], torch.cat(positions)[None]
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        position_ids = torch.arange(max(lengths)).expand_as(input_ids)
    predict, targets = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        predict=predict,
        targets=targets,
        lengths=lengths,
        sources=tuple(row.source for row in rows),
        packed=packed,
    )


def deal(rows: Sequence[Example], hands: int) -> list[list[Example]]:
    """`rows` in `hands` shares of about equal length, each in its old order: the longest first, to who has least."""
    if hands == 1:
        return [list(rows)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    held = [0] * hands
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        least = held.index(min(held))
        dealt[least].append(number)
        held[least] += len(rows[number].ids)
    return [[rows[number] for number in sorted(hand)] for hand in dealt]


class Batches:
    """All batches of a run: `window(step)` are the forward passes of optimizer step `step`.

    Every epoch is a fresh permutation drawn from (seed, epoch), and each row is in exactly one step of it; the last
    step of an epoch may be smaller.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int = 8,
        accumulate: int = 1,
        *,
        seed: int = 0,
        packing: bool = True,
        max_tokens_per_pack: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if not examples:
            raise DataError("there are no examples to make batches of")
        self.examples = list(examples)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.packing = packing
        self.max_tokens_per_pack = max_tokens_per_pack
        self.shuffle = shuffle
        self._drawn: tuple[int | None, list[int]] = None, []

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / (self.batch_size * self.accumulate))

    def rows(self, step: int) -> list[Example]:
        """The rows of optimizer step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulate
        return [self.examples[i] for i in self._order(epoch)[position * per_step : (position + 1) * per_step]]

    def tokens(self, step: int) -> int:
        """How many supervised tokens step `step` has, over all processes."""
        return sum(len(row.labels[1:]) - row.labels[1:].count(IGNORE) for row in self.rows(step))

    def window(
        self, step: int, *, packed: bool | None = None, limit: int | None = None, world: World = ALONE
    ) -> list[Batch]:
        """The forward passes of step `step`; `packed` overrides `packing` (for models that cannot be packed).

        `limit` is a second limit beside `max_tokens_per_pack`: what fits into the memory of this machine. Of several
        processes each gets its share, which is empty where a step has fewer rows than there are processes.
        """
        packed = self.packing if packed is None else packed
        rows = deal(self.rows(step), world.size)[(world.rank + step) % world.size]  # no process is always the idle one
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [collate(part, packed=packed) for whole in parts for part in self._split(whole, packed, limit)]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.examples)))
        if self._drawn[0] != epoch:  # asked for several times a step
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._drawn = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        return self._drawn[1]

    def _split(self, rows: list[Example], packed: bool, limit: int | None) -> list[list[Example]]:
        """Cut `rows` where a pass would hold more tokens than it may; a longer row goes alone."""
        most = min((n for n in (self.max_tokens_per_pack, limit) if n is not None), default=None)
        if most is None:
            return [rows]
        parts: list[list[Example]] = [[]]
        for row in rows:
            lengths = [len(other.ids) for other in (*parts[-1], row)]
            size = sum(lengths) if packed else max(lengths) * len(lengths)
            if parts[-1] and size > most:
                parts.append([])
            parts[-1].append(row)
        return parts
