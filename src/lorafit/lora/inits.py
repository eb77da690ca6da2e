"""How A and B start: a registry of pure functions (W, r, s) -> (A, B).

W (out, in) is the frozen weight, r the rank, s the scale of the update; A is (r, in), B is (out, r), both in
fp32 or wider. Adding an initialisation is one decorated function here, or in your own code:

    @init("mine")
    def mine(W, r, s): ...

All but `gaussian_both` start with s·B·A = 0, so that the model's function does not move at step 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Init = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
INITS: dict[str, Init] = {}


def init(name: str) -> Callable[[Init], Init]:
    """Register the decorated function as `LoraConfig(init=name)`."""

    def register(function: Init) -> Init:
        INITS[name] = function
        return function

    return register


def factor_dtype(W: Tensor) -> torch.dtype:
    """fp32, over a float64 base float64: small updates do not survive in half precision."""
    return torch.promote_types(W.dtype, torch.float32)


def _empty(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    out_features, in_features = W.shape
    A = torch.empty(r, in_features, dtype=factor_dtype(W), device=W.device)
    B = torch.zeros(out_features, r, dtype=factor_dtype(W), device=W.device)
    return A, B


@init("kaiming")
def kaiming(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A ~ U(−1/√in, 1/√in), B = 0: what nn.Linear itself starts from, and the field's default (loralib)."""
    A, B = _empty(W, r)
    return torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5)), B


@init("gaussian")
def gaussian(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r²), B = 0: Hu et al. 2021, arXiv:2106.09685 §4.1, with the deviation that PEFT takes."""
    A, B = _empty(W, r)
    return torch.nn.init.normal_(A, std=1 / r), B


@init("gaussian_both")
def gaussian_both(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A, B ~ N(0, 0.02²): differs from the base at once, for tests of loading and unloading."""
    A, B = _empty(W, r)
    return torch.nn.init.normal_(A, std=0.02), torch.nn.init.normal_(B, std=0.02)
