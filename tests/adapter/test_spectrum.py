"""Norm and effective rank of an update against the dense ΔW."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import LoraConfig, add_lora, save_lora
from lorafit.adapter.spectrum import effective_rank, singular_values, updates
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear
from lorafit.lora.weights import read_weight


@pytest.mark.parametrize("shape", [(30, 20, 4), (5, 40, 5), (40, 3, 8)])
def test_singular_values_of_the_product_without_the_product(shape: tuple[int, int, int]) -> None:
    out, in_, r = shape
    A, B = torch.randn(r, in_, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
    values = singular_values(A, B)
    torch.testing.assert_close(values, torch.linalg.svdvals(B @ A)[: len(values)], rtol=1e-10, atol=1e-12)


def test_effective_rank_counts_equal_directions() -> None:
    for n in (1, 3, 8):
        assert effective_rank(torch.tensor([2.0] * n + [0.0] * 4)) == pytest.approx(n)
    assert effective_rank(torch.zeros(4)) == 0
    assert 1 < effective_rank(torch.tensor([1.0, 0.01])) < 1.1


@pytest.mark.parametrize(
    "changes",
    [{"targets": ("q_proj", "embed_tokens")}, {"variant": "dora"}, {"rslora": True, "rank_pattern": {"v_proj": 5}}],
)
def test_updates_are_those_of_the_dense_difference(
    changes: dict[str, Any], tiny: Callable[..., nn.Module], shaken: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(**{"r": 3, "targets": ("q_proj", "v_proj"), **changes}))
    save_lora(shaken(model), tmp_path / "adapter")
    found = {update.layer: update for update in updates(model, tmp_path / "adapter")}
    layers = {name: layer for name, layer in wrappers(model) if isinstance(layer, LoraLinear)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        delta = layer.delta().double()
        values = torch.linalg.svdvals(delta)
        values = values[values > 1e-6 * values[0]]
        p = (values / values.sum()).tolist()
        assert found[name].r == layer.r
        assert found[name].norm == pytest.approx(delta.norm().item(), rel=1e-6)
        W = read_weight(layer.base_layer)
        assert found[name].share == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        assert found[name].effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-4)


def test_an_adapter_that_does_nothing_has_no_norm(tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny("gpt2")
    add_lora(model, LoraConfig(r=2))
    save_lora(model, tmp_path / "adapter")
    assert {(u.norm, u.effective_rank) for u in updates(model, tmp_path / "adapter")} == {(0.0, 0.0)}
