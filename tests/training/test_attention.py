"""Packed rows: the same logits as each row alone, or not packed at all."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lorafit.data.batches import collate
from lorafit.training import attention
from lorafit.training.attention import packs_exactly, row_attention

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
        return row(q, k, v, *rest) + 0.1 * v.mean()

    row = attention._row
    monkeypatch.setattr(attention, "_row", leaky)
    assert not packs_exactly(tiny("llama"))


def test_the_users_attention_is_given_back(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    batch = collate(examples(2), packed=True)
    with pytest.raises(ZeroDivisionError), row_attention(model, batch):
        assert 1 / (model.config._attn_implementation != attention.NAME)
    assert model.config._attn_implementation == "eager"
    assert attention._lengths is None


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_short_and_long_rows_agree_with_the_definition(window: int | None, heads: int, softcap: float | None) -> None:
    length, d, key_heads = 9, 8, 2
    q = torch.randn(key_heads * heads, length, d, dtype=torch.float64)
    k, v = torch.randn(2, key_heads, length, d, dtype=torch.float64)
    expected = torch.empty_like(q)
    for h in range(q.shape[0]):
        for i in range(length):
            seen = range(0 if window is None else max(0, i - window + 1), i + 1)
            scores = torch.stack([q[h, i] @ k[h // heads, j] * 0.3 for j in seen])
            weight = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).softmax(0)
            expected[h, i] = sum(w * v[h // heads, j] for w, j in zip(weight, seen, strict=True))
    short = attention._row(q, k, v, 0.3, 0.0, window, softcap)
    assert torch.allclose(short, expected, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONG_ROW", 1)
        assert torch.allclose(attention._row(q, k, v, 0.3, 0.0, window, softcap), expected, rtol=1e-12, atol=1e-12)


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
