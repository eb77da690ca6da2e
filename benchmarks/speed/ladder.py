"""From the tutorial's layer to lorafit, one technique at a time, and what arithmetic says each of them is worth.

A rung has what the one below it has and one technique more; the last is lorafit itself. To add one: a name in
`TECHNIQUES`, where it belongs in the order, and in `_contexts` (or in the loss of `_climb`) how to do without it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.peers import EXTRA, PEERS, Build, Peer, Rows, lorafit, lorafit_factors, plain_loop, seed
from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import Factors, Setup, real, supervised, targets
from lorafit.data.batches import Batch, collate
from lorafit.data.chat import IGNORE, Example
from lorafit.lora.inject import wrappers
from lorafit.training import attention
from lorafit.training.causal import Rule
from lorafit.training.idle_rows import WORTH, idle_rows_skipped
from lorafit.training.loss import find_head, summed_loss
from lorafit.training.shared_input import inputs_shared

TECHNIQUES = {
    "packing": "packed rows",
    "supervised": "head on supervised rows only",
    "tiles": "loss in tiles, its gradient made in the forward pass",
    "low-rank": "low-rank backward by hand",
    "attention": "attention by hand",
    "shared": "layers of one input together",
    "idle": "last block without idle rows, flat gradients (lorafit)",
}
RUNGS = ("the tutorial's layer, padded rows", *(f"+ {about}" for about in TECHNIQUES.values()))


def rung_has(rung: int) -> frozenset[str]:
    """The techniques of a rung."""
    return frozenset(list(TECHNIQUES)[:rung])


def ladder(rung: int, task: Task, start: Factors) -> Peer:
    """A peer with the techniques of `rung`."""
    if rung == 0:
        return seed(task, start)
    return lorafit(task, start) if rung == len(TECHNIQUES) else _climb(rung_has(rung), task, start)


def _climb(has: frozenset[str], task: Task, start: Factors) -> Peer:
    model, factors = task.model, lorafit_factors(task, start)
    head = find_head(model)
    assert head is not None

    def loss(rows: Rows) -> Tensor:
        batch = collate(rows, packed=True)
        with attention.row_attention(model, batch):
            if "tiles" in has:
                return summed_loss(model, batch, head) / batch.targets.numel()
            if "supervised" in has:
                hidden = head.decoder(**batch.inputs(), use_cache=False).last_hidden_state
                return F.cross_entropy(head.logits(hidden.flatten(0, 1)[batch.predict]).float(), batch.targets)
            return _loss_of_all(model, batch)

    config = {"techniques": ", ".join(name for name in TECHNIQUES if name in has)}
    within = partial(_contexts, has, model)
    return plain_loop(loss, model, factors, task, config, fused=True, within=within)


@contextmanager
def _contexts(has: frozenset[str], model: nn.Module) -> Iterator[None]:
    """lorafit without what is not in `has`."""
    with ExitStack() as stack:
        if "low-rank" not in has:  # autograd's backward
            for _, layer in wrappers(model):
                stack.enter_context(mock.patch.object(layer, "_plain", return_value=False))
        if "attention" not in has:
            stack.enter_context(mock.patch.object(attention, "_rows", _sdpa))
        if "idle" in has:
            stack.enter_context(idle_rows_skipped(model, packed=True))
        if "shared" in has:
            stack.enter_context(inputs_shared(model, packed=True))
        yield


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
    """torch's own attention, row by row: q (heads, T, d), k and v (key heads, T, d) -> (T, heads, d)."""
    parts = (torch.split(x, list(lengths), dim=1) for x in (q, k, v))
    how: dict[str, Any] = {"is_causal": True, "scale": rule.scale, "enable_gqa": q.shape[0] != k.shape[0]}
    rows = [F.scaled_dot_product_attention(*(x[None] for x in row), **how)[0] for row in zip(*parts, strict=True)]
    return torch.cat(rows, dim=1).transpose(0, 1)


def _loss_of_all(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.full((batch.input_ids.numel(),), IGNORE)
    labels[batch.predict] = batch.targets
    logits = model(**batch.inputs(), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE)


LADDER: dict[str, Build] = {f"ladder-{rung}": partial(ladder, rung) for rung in range(len(RUNGS))}
BUILDERS: dict[str, Build] = PEERS | EXTRA | LADDER


# --- what arithmetic says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What decides how many operations a step of a model takes. `linear` are (in, out) of its adapted layers."""

    linear: tuple[tuple[int, int], ...]
    free: tuple[tuple[int, int], ...]
    """Those whose input needs no gradient: there is nothing to train below them."""
    late: tuple[tuple[int, int], ...]
    """Those of the last block behind its keys and values."""
    head: int
    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        """Of the plain model."""
        config: Any = model.config
        sizes = {name: (layer.in_features, layer.out_features) for name, layer in targets(model).items()}
        last = f".{config.num_hidden_layers - 1}."
        inputs = ("q_proj", "k_proj", "v_proj")
        return cls(
            linear=tuple(sizes.values()),
            free=tuple(size for name, size in sizes.items() if ".0." in name and name.endswith(inputs)),
            late=tuple(size for name, size in sizes.items() if last in name and not name.endswith(inputs[1:])),
            head=config.hidden_size * config.vocab_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )


def predicted_flops(shape: Shape, rows: Sequence[Example], setup: Setup, has: frozenset[str]) -> float:
    """Operations of one step on `rows` with the techniques `has`: products only, of matrices.

    A frozen layer takes 2·in·out a token forward and as much backward, to its input; its adapter 2·r·(in + out)
    forward and twice that backward. The head as a frozen layer, per position that it is asked for. Attention: two
    products forward and four backward over pairs of positions: all batch·longest² of a padded batch, or those that a
    causal row has. What saves traffic or calls of the system saves no operation: it is predicted to be worth nothing.
    """
    tokens = real(rows) if "packing" in has else len(rows) * max(len(row.ids) for row in rows)
    scored = supervised(rows) if "supervised" in has else tokens
    total = sum(_layer(size, setup.r) for size in shape.linear) * tokens + 4 * shape.head * scored
    total -= sum(2 * size[0] * (size[1] + setup.r) for size in shape.free) * tokens
    if "idle" in has and scored <= WORTH * tokens:
        total -= sum(_layer(size, setup.r) for size in shape.late) * (tokens - scored)
    pairs = sum(len(row.ids) * (len(row.ids) + 1) / 2 for row in rows)
    pairs = pairs if "packing" in has else tokens**2 / len(rows)
    return total + 6 * 2 * shape.width * shape.heads * shape.layers * pairs


def _layer(size: tuple[int, int], r: int) -> int:
    return 4 * size[0] * size[1] + 6 * r * sum(size)


Count = Callable[[Sequence[Example]], float]


def counter(model: nn.Module, setup: Setup, peer: str) -> Count | None:
    """What `predicted_flops` says of the steps of a rung; None for what is no rung."""
    if peer not in LADDER:
        return None
    shape, has = Shape.of(model), rung_has(list(LADDER).index(peer))
    return lambda rows: predicted_flops(shape, rows, setup, has)
