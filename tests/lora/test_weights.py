"""One matrix (out, in) for every way of storing it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit import LoraConfig, LoraLinear, add_lora, merge_lora
from lorafit.errors import ModelError
from lorafit.lora.weights import is_readable, read_weight, write_weight

LAYERS = {
    "Linear": lambda: nn.Linear(3, 5),
    "Conv1D": lambda: Conv1D(5, 3),
    "Embedding": lambda: nn.Embedding(3, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_matrix_is_what_the_layer_multiplies_by(kind: str) -> None:
    layer = LAYERS[kind]()
    W = read_weight(layer)
    assert W.shape == (5, 3)
    assert W.data_ptr() == layer.weight.data_ptr()  # a view, no copy
    if kind == "Embedding":
        torch.testing.assert_close(layer(torch.tensor([2, 0])), F.linear(F.one_hot(torch.tensor([2, 0]), 3).float(), W))
    else:
        x = torch.randn(4, 3)
        torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_in_the_layers_own_dtype(kind: str, dtype: torch.dtype) -> None:
    layer = LAYERS[kind]().to(dtype).requires_grad_(False)
    old, new = layer.weight, torch.randn(5, 3)
    kept = old.clone()
    assert write_weight(layer, new) is layer
    assert torch.equal(read_weight(layer), new.to(dtype))
    assert layer.weight.is_contiguous()
    assert not layer.weight.requires_grad
    assert torch.equal(old, kept)  # whoever shares the old one keeps it


def test_kinds_that_nobody_registered() -> None:
    assert all(is_readable(make()) for make in LAYERS.values())
    assert not is_readable(nn.LayerNorm(3))
    with pytest.raises(ModelError, match="LayerNorm: register it with read_weight"):
        read_weight(nn.LayerNorm(3))
    with pytest.raises(ModelError, match="LayerNorm: register it with write_weight"):
        write_weight(nn.LayerNorm(3), torch.zeros(3, 3))


def test_a_storage_that_is_not_floating_point_is_refused() -> None:
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"Linear is torch\.int8"):
        read_weight(layer)


class Scaled(nn.Module):
    """A frozen weight as 8-bit codes with one scale per row, as a user might bring along."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.scales: Tensor
        self.codes: Tensor
        self.register_buffer("scales", W.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("codes", (W / self.scales).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.float() * self.scales)


@read_weight.register(Scaled)
def _(layer: Scaled) -> Tensor:
    return layer.codes.float() * layer.scales


@write_weight.register(Scaled)
def _(layer: Scaled, weight: Tensor) -> Scaled:
    layer.scales = weight.abs().amax(dim=1, keepdim=True) / 127
    layer.codes = (weight / layer.scales).round().to(torch.int8)
    return layer


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_storage_registered_from_outside_works_everywhere(variant: str) -> None:
    model = nn.Sequential(Scaled(torch.randn(8, 6)), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    raw = model(x)
    plan = add_lora(model, LoraConfig(r=2, variant=variant))
    assert [target.shape for target in plan.targets] == [(8, 6), (4, 8)]
    assert torch.equal(model(x), raw)
    first = model[0]
    assert isinstance(first, LoraLinear)
    nn.init.normal_(first.lora_B.weight, std=0.1)
    torch.testing.assert_close(first(x), F.linear(x, first.merged_weight()))
    adapted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted, atol=0.05, rtol=0.05)
