"""Attention over packed rows, without a mask matrix.

Rows are laid end to end as one long sequence of shape (1, T), with positions that restart. Here the sequence is cut at
the row boundaries again and each row attends to itself alone, causally: nothing is computed for padding or for pairs
in different rows, and no row can see another.

transformers asks a registered function for the attention of most models; `row_attention` sets ours for the duration
of a block and gives the user's back. What a model wants from attention beyond the keywords named below, we do not
guess: `packs_exactly` runs a few rows packed and alone and compares. Where the two differ, the caller pads instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lorafit.data.batches import Batch, collate
from lorafit.data.chat import Example
from lorafit.training.causal import RowAttention, Rule
from lorafit.training.modes import evaluating

NAME = "lorafit_rows"
# Keywords that models hand through to the attention function and that do not change what it computes here: there is
# no cache, rows are causal, and positions are already in q and k.
NEUTRAL = {
    "cache_position", "is_causal", "layer_idx", "output_attentions", "output_hidden_states", "position_embeddings",
    "position_ids", "return_dict", "use_cache", "logits_to_keep", "output_router_logits", "num_items_in_batch",
}  # fmt: skip

# The pass under way. A plain global: a backward pass that recomputes (gradient checkpointing) may run in another
# thread, and has to see the same rows.
_batch: Batch | None = None


class CannotPack(Exception):
    """The model asks for something `attend` does not implement."""


@contextmanager
def row_attention(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside the block, forward and backward are those of `batch`: where it is packed, its rows are kept apart."""
    global _batch
    if batch.packed:
        before = model.config._attn_implementation  # type: ignore[union-attr]
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    _batch = batch
    try:
        yield
    finally:
        _batch = None
        if batch.packed:
            model.set_attn_implementation(before)  # type: ignore[operator]


def pass_under_way() -> Batch | None:
    """The batch of the `row_attention` that is open."""
    return _batch


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: query (1, heads, T, d), key and value (1, key heads, T, d) -> (1, T, heads, d).

    `sliding_window` w lets a position see itself and the w − 1 before it; `softcap` c bends scores to c·tanh(score/c).
    """
    asked = [name for name, value in unknown.items() if value is not None and name not in NEUTRAL]
    if asked or attention_mask is not None or _batch is None or query.shape[0] != 1:
        raise CannotPack(f"attention with {', '.join(asked) or 'a mask of its own'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap, dropout if module.training else 0.0)
    return _rows(query[0], key[0], value[0], _batch.lengths, rule).unsqueeze(0), None


def _rows(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
    """q (heads, T, d), k and v (key heads, T, d) -> (T, heads, d), each row on its own."""
    if rule.dropout:
        rule = rule._replace(seed=int(torch.randint(2**31, ())))
    if _has_varlen(q, v, rule):
        return _varlen(q, k, v, lengths, rule)
    out: Tensor = RowAttention.apply(q, k, v, lengths, rule)  # type: ignore[no-untyped-call]
    return out


def _has_varlen(q: Tensor, v: Tensor, rule: Rule) -> bool:
    """Whether torch's own kernel for rows of different lengths does this: half precision on CUDA, nothing special."""
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= 256
    new = torch.__version__ >= "2.12"  # as versions, not letters; before, it knew no grouped heads
    return new and q.is_cuda and half and rule.cap is None and not rule.dropout


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    back = -1 if rule.window is None else rule.window - 1  # how far a position sees back and, causal, ahead
    longest = max(lengths)
    how: Any = {"scale": rule.scale, "window_size": (back, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    return varlen_attn(q, k, v, ends, ends, longest, longest, **how)  # type: ignore[return-value]


@torch.no_grad()
def packs_exactly(model: nn.Module) -> bool:
    """Whether rows laid end to end give this model the same logits as each row alone.

    Tried, not looked up: three short rows, the longest long enough to leave any sliding window that is affordable.
    Models that mix positions outside attention (state-space layers, convolutions), that build attention themselves
    (Bloom) or that take their positions from a mask show it here.
    """
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        return False
    rows = _probe_rows(model)
    device = next(model.parameters()).device
    try:
        logits, packed = probe(model, packed=True)
        together = torch.split(logits, list(packed.lengths), dim=1)
        with evaluating(model):
            alone = [_logits(model, collate([row], packed=False).to(device)) for row in rows]
    except (CannotPack, TypeError, ValueError, RuntimeError):
        return False
    return all(close(a, b) for a, b in zip(together, alone, strict=True))


@torch.no_grad()
def probe(model: nn.Module, packed: bool) -> tuple[Tensor, Batch]:
    """Logits (batch, length, vocab) of a few short rows, without dropout, and the rows: to try what a model does."""
    batch = collate(_probe_rows(model), packed=packed).to(next(model.parameters()).device)
    with evaluating(model), row_attention(model, batch):
        return _logits(model, batch), batch


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding. A leak between rows moves logits by a good part of their own size."""
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch.inputs(), use_cache=False)
    return output.logits  # type: ignore[no-any-return]


def _probe_rows(model: nn.Module) -> list[Example]:
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = min(getattr(config, "max_position_embeddings", None) or 512, 512)
    window = getattr(config, "sliding_window", None) or 0
    longest = min(window + 3, limit) if 0 < window <= 256 else min(11, limit)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, longest, 7):
        ids = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        rows.append(Example(ids=ids, labels=ids, source="probe"))
    return rows


AttentionInterface.register(NAME, attend)
