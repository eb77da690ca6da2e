"""How much an adapter changes each layer, and in how many directions: from its file and the norms of the base."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.adapter.peft_format import PREFIX, WEIGHTS
from lorafit.adapter.weights_file import open_weights
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear
from lorafit.lora.weights import read_weight

NAMES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class Update:
    """What is added to one layer, ΔW = s·B·A: its norm, that as a share of ‖W‖, and its effective rank, of r."""

    layer: str
    r: int
    norm: float
    share: float
    effective_rank: float


def updates(model: nn.Module, folder: Path) -> list[Update]:
    """One `Update` for each layer that `model` adapts with what was saved in `folder`.

    Norms are Frobenius. For DoRA it is the low-rank part alone, without the magnitudes.
    """
    found = []
    with open_weights(folder / WEIGHTS) as file, torch.no_grad():
        for name, layer in wrappers(model):
            if not isinstance(layer, LoraLinear):
                continue
            keys = [[f"{PREFIX}{name}.{key}" for key in pair] for pair in NAMES]
            A, B = (file.read(file.entries[key]) for key in next(k for k in keys if k[0] in file.entries))
            values = layer.scale * singular_values(A, B)
            norm = values.norm().item()
            base = torch.linalg.vector_norm(read_weight(layer.base_layer), dtype=torch.float32).item()
            found.append(Update(name, A.shape[0], norm, norm / base if base else 0.0, effective_rank(values)))
    return found


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Those of B·A, (r,) in float64, from A (r, in) and B (out, r): with B = Q·R and Aᵀ = Q'·R' they are R·R'ᵀ's."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(B.double())[1] @ torch.linalg.qr(A.double().T)[1].T)
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values: n equal ones give n, one alone 1, none 0.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return torch.exp(-(p * p.log()).sum()).item()
