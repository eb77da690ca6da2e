"""Packed rows: the same logits as each row alone, or not packed at all."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lorafit.data.batches import collate
from lorafit.training import attention, causal
from lorafit.training.attention import packs_exactly, row_attention
from lorafit.training.causal import RowAttention, Rule

Tiny = Callable[..., nn.Module]
PACKABLE = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "mixtral",
    "cohere", "granite", "olmo2", "stablelm", "starcoder2", "qwen3_moe",
]  # fmt: skip
# Attention of their own, a state that runs on, or something of attention we do not implement (sinks).
PADDED = ["bloom", "falcon", "mpt", "mamba", "rwkv", "gpt_oss"]


@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_row_has_the_logits_of_the_row_alone(family: str, tiny: Tiny, examples: Any) -> None:
    model = tiny(family)
    assert packs_exactly(model)
    rows = examples(6, longest=30)
    packed = collate(rows, packed=True)
    with torch.no_grad(), row_attention(model, packed):
        together = model(**packed.inputs(), use_cache=False).logits[0].split(packed.lengths)
    for row, ours in zip(rows, together, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row.ids])).logits[0]
        assert (ours - alone).abs().max() <= 2e-6 * alone.abs().max()


@pytest.mark.parametrize("family", PADDED)
def test_models_that_cannot_be_packed_are_noticed(family: str, tiny: Tiny) -> None:
    assert not packs_exactly(tiny(family))


@pytest.mark.parametrize("family", [*PACKABLE, *PADDED])
def test_a_padded_row_has_the_logits_of_the_row_alone(family: str, tiny: Tiny, examples: Any) -> None:
    model = tiny(family)
    rows = examples(5, longest=30)
    padded = collate(rows, packed=False)
    with torch.no_grad():
        together = model(**padded.inputs(), use_cache=False).logits
        for row, ours in zip(rows, together, strict=True):
            alone = model(torch.tensor([row.ids])).logits[0]
            assert (ours[: len(row.ids)] - alone).abs().max() <= 2e-6 * alone.abs().max()


def test_the_probe_sees_a_leak(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        return rows(q, k, v, *rest) + 0.1 * v.mean()

    rows = attention._rows
    monkeypatch.setattr(attention, "_rows", leaky)
    assert not packs_exactly(tiny("llama"))


def test_the_users_attention_is_given_back(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    batch = collate(examples(2), packed=True)
    with pytest.raises(ZeroDivisionError), row_attention(model, batch):
        assert 1 / (model.config._attn_implementation != attention.NAME)
    assert model.config._attn_implementation == "eager"
    assert attention.pass_under_way() is None


def by_definition(q: Any, k: Any, v: Any, lengths: tuple[int, ...], rule: Rule) -> torch.Tensor:
    """One position, one head, one key at a time."""
    group, start, rows = q.shape[0] // k.shape[0], 0, []
    for length in lengths:
        for i in range(start, start + length):
            seen = range(start if rule.window is None else max(start, i - rule.window + 1), i + 1)
            for h in range(q.shape[0]):
                scores = torch.stack([q[h, i] @ k[h // group, j] * rule.scale for j in seen])
                weight = (scores if rule.cap is None else rule.cap * torch.tanh(scores / rule.cap)).softmax(0)
                rows.append(sum(w * v[h // group, j] for w, j in zip(weight, seen, strict=True)))
        start += length
    return torch.stack(rows).view(start, q.shape[0], -1)


def leaves(heads: int, key_heads: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Laid out as models do: (tokens, heads, d), seen as (heads, tokens, d)."""
    torch.manual_seed(5)
    shapes = ((tokens, heads, 6), (tokens, key_heads, 6), (tokens, key_heads, 4))
    return [torch.randn(shape, dtype=dtype).transpose(0, 1).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("size", [2, 64])
def test_rows_and_their_gradients_are_those_of_the_definition(
    size: int, heads: int, window: int | None, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(causal.QUERIES, "cpu", size)
    lengths, rule = (5, 1, 4), Rule(0.3, window, cap)
    ours, theirs = leaves(heads, 2, sum(lengths)), leaves(heads, 2, sum(lengths))
    found, expected = RowAttention.apply(*ours, lengths, rule), by_definition(*theirs, lengths, rule)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [Rule(0.4, 3, 0.7), Rule(0.4, dropout=0.4, seed=9)])
def test_the_backward_by_hand_is_the_slope(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences; with dropout this shows that forward and backward drop the same weights."""
    monkeypatch.setitem(causal.QUERIES, "cpu", 3)
    assert torch.autograd.gradcheck(lambda *qkv: RowAttention.apply(*qkv, (5, 2), rule), leaves(4, 2, 7))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """With all scores equal and v = 1 an output is the sum of what is kept: 1 on average, 0 or more each."""
    q, v = torch.zeros(1, 4000, 4), torch.ones(1, 4000, 1)
    out = RowAttention.apply(q, q, v, (4,) * 1000, Rule(1.0, dropout=0.25, seed=1)).view(1000, 4)
    assert abs(out.mean() - 1) < 0.03
    assert abs((out[:, 0] == 0).float().mean() - 0.25) < 0.05  # a row's first position has one weight only


def test_nothing_but_the_inputs_is_kept() -> None:
    kept: list[torch.Tensor] = []
    inputs = leaves(4, 2, 200, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        RowAttention.apply(*inputs, (150, 50), Rule(0.3))
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own


def test_half_precision_is_near_the_definition() -> None:
    lengths, rule = (150, 30), Rule(0.3)
    half, exact = leaves(4, 2, 180, torch.bfloat16), leaves(4, 2, 180, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in exact]
    found, expected = (RowAttention.apply(*inputs, lengths, rule) for inputs in (half, exact))
    found.sum().backward()
    expected.sum().backward()
    for mine, other in ((found, expected), *((a.grad, b.grad) for a, b in zip(half, exact, strict=True))):
        assert (mine.double() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_is_asked_for_the_same_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for CUDA, played by the definition: what it is handed, and what comes back."""

    def kernel(q: Any, k: Any, v: Any, ends: Any, key_ends: Any, longest: int, keys: int, **how: Any) -> torch.Tensor:
        assert ends.dtype == torch.int32
        assert torch.equal(ends, key_ends)
        assert all(x.is_contiguous() for x in (q, k, v))
        lengths = tuple(ends.diff().tolist())
        assert longest == keys == max(lengths)
        back, ahead = how["window_size"]
        assert ahead == 0
        assert how["enable_gqa"]
        rule = Rule(how["scale"], None if back == -1 else back + 1)
        return by_definition(*(x.transpose(0, 1) for x in (q, k, v)), lengths, rule)

    monkeypatch.setattr(attention, "_has_varlen", lambda q, v, rule: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    inputs, rule = leaves(4, 2, 10), Rule(0.3, window)
    found = attention._rows(*inputs, (5, 1, 4), rule)
    assert torch.allclose(found, RowAttention.apply(*inputs, (5, 1, 4), rule), rtol=1e-12, atol=1e-12)


def test_varlen_is_for_cuda_in_half_precision() -> None:
    q = torch.empty(2, 3, 8, dtype=torch.bfloat16)
    assert not attention._has_varlen(q, q, Rule(1.0))

    class OnCuda:
        is_cuda, dtype, shape = True, torch.bfloat16, q.shape

    assert attention._has_varlen(OnCuda(), q, Rule(1.0))
    for rule in (Rule(1.0, cap=2.0), Rule(1.0, dropout=0.1)):
        assert not attention._has_varlen(OnCuda(), q, rule)
    OnCuda.dtype = torch.float32
    assert not attention._has_varlen(OnCuda(), q, Rule(1.0))


def test_what_is_not_implemented_is_refused_and_dropout_is_for_training(tiny: Tiny, examples: Any) -> None:
    module = nn.Dropout(0.9)
    batch = collate(examples(2), packed=True)
    q, k, v = torch.randn(3, 1, 2, sum(batch.lengths), 8)
    with row_attention(tiny("llama"), batch):
        attend = partial(attention.attend, module, q, k, v)
        for asked in ({"attention_mask": q}, {"s_aux": q}, {"position_bias": q}):
            with pytest.raises(attention.CannotPack):
                attend(**{"attention_mask": None, **asked})
        plain, _ = attend(None, output_attentions=False, s_aux=None)
        assert not torch.equal(attend(None, dropout=0.9)[0], plain)
        module.eval()
        assert torch.equal(attend(None, dropout=0.9)[0], plain)
    with pytest.raises(attention.CannotPack):
        attend(None)
