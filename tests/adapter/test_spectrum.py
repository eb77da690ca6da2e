"""Norm and effective rank of an update against the dense ΔW."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import DoraLinear, LoraConfig, add_lora
from lorafit.adapter.spectrum import effective_rank, singular_values, updates
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear


@pytest.mark.parametrize("shape", [(30, 20, 4), (5, 40, 5), (40, 3, 8)])
def test_singular_values_of_the_product_without_the_product(shape: tuple[int, int, int]) -> None:
    out, in_, r = shape
    A, B = torch.randn(r, in_, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
    values = singular_values(A, B)
    dense = torch.linalg.svdvals(B @ A)
    least = min(len(dense), r)
    assert values.shape == (r,)
    torch.testing.assert_close(values[:least], dense[:least], rtol=1e-10, atol=1e-12)
    assert not values[least:].any()


def test_effective_rank_counts_equal_directions() -> None:
    for n in (1, 3, 8):
        assert effective_rank(torch.tensor([2.0] * n + [0.0] * 4)) == pytest.approx(n)
    assert effective_rank(torch.zeros(4)) == 0
    assert 1 < effective_rank(torch.tensor([1.0, 0.01])) < 1.1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"targets": ("q_proj", "embed_tokens")}),
        ("llama", {"variant": "dora"}),
        ("llama", {"init": "pissa"}),  # ΔW is the difference to the start, of twice the rank
        ("gpt2", {"rslora": True, "rank_pattern": {"c_attn": 5}}),
        ("mixtral", {"targets": ("q_proj",), "parameters": ("gate_up_proj", "experts.down_proj")}),  # stacks of experts
    ],
)
def test_updates_are_those_of_the_dense_difference(
    family: str, changes: dict[str, Any], tiny: Callable[..., nn.Module], shaken: Callable[..., nn.Module]
) -> None:
    """ΔW as what merging adds, whatever the formula and the storage."""
    model = tiny(family).double()
    add_lora(model, LoraConfig(r=3, **changes))
    shaken(model)
    found = updates(model)
    layers = [layer for _, layer in wrappers(model) if isinstance(layer, LoraLinear)]
    assert len(found) == len(layers) == len({update.layer for update in found})
    for update, layer in zip(found, layers, strict=True):
        W = layer.base_weight()
        delta = LoraLinear.delta(layer) if isinstance(layer, DoraLinear) else layer.merged_weight() - W
        values = torch.linalg.svdvals(delta).reshape(-1, min(delta.shape[-2:]))
        ranks = []
        for each in values:
            p = (each[each > 1e-9 * each[0]] / each.sum()).tolist()
            ranks.append(math.exp(-sum(x * math.log(x) for x in p)))
        assert update.r == layer.r * (2 if layer.kept else 1)
        assert update.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert update.share == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        assert update.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)


def test_an_adapter_that_does_nothing_has_no_norm(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("gpt2")
    add_lora(model, LoraConfig(r=2))
    assert {(u.norm, u.effective_rank) for u in updates(model)} == {(0.0, 0.0)}
