"""How much an adapter changes each layer, and in how many directions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.adapter.low_rank import core
from lorafit.lora.experts import LoraParameter
from lorafit.lora.inits import factor_dtype
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear


@dataclass(frozen=True)
class Update:
    """What is added to one layer, ΔW = s·B·A: its norm, that as a share of ‖W‖, and its effective rank, of r."""

    layer: str
    r: int
    norm: float
    share: float
    effective_rank: float


@torch.no_grad()
def updates(model: nn.Module) -> list[Update]:
    """One `Update` for each layer or stack of experts that `model` adapts.

    Norms are Frobenius; the effective rank of a stack is the mean over its experts. For DoRA both are those of the
    low-rank part alone, without the magnitudes.
    """
    found = []
    for name, layer in wrappers(model):
        if isinstance(layer, LoraLinear):
            A, B = layer.matrices(*layer.update)
            values = layer.scale * singular_values(A, B).reshape(-1, A.shape[-2])
            norm = values.norm().item()
            W = layer.base_weight()
            base = torch.linalg.vector_norm(W, dtype=factor_dtype(W)).item()
            rank = math.fsum(map(effective_rank, values)) / len(values)
            found.append(Update(_called(name, layer), A.shape[-2], norm, norm / base if base else 0.0, rank))
    return found


def _called(name: str, layer: LoraLinear) -> str:
    """The name of the layer, or of the parameter that is adapted, however many wrappers are around it."""
    return f"{name.replace('.base_layer', '')}.{layer.parameter}" if isinstance(layer, LoraParameter) else name


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Those of B·A, (…, r) in float64, from A (…, r, in) and B (…, out, r), with zeros where out or in is below r."""
    values: Tensor = torch.linalg.svdvals(core(A, B))
    return nn.functional.pad(values, (0, A.shape[-2] - values.shape[-1]))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values: n equal ones give n, one alone 1, none 0.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return torch.exp(-(p * p.log()).sum()).item()
