"""How A and B start: a registry of pure functions (W, r, s[, statistic]) -> (A, B).

W (out, in) is the frozen weight, r the rank, s the scale of the update; A is (r, in), B is (out, r), both in
fp32 or wider. Adding an initialisation is one decorated function here, or in your own code:

    @init("mine")
    def mine(W, r, s): ...

Whatever it returns, the model's function does not move at step 0: where B·A does not start at 0, the layer keeps the
start (A0, B0) and learns the difference to it (`LoraLinear.update`). Only what is registered as "free" differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorafit.errors import UsageError, nearest

Pair = tuple[Tensor, Tensor]
Start = Literal["zero", "kept", "free"]
"""B·A at step 0: "zero"; not zero, so that the layer keeps it and learns the difference; or meant to be seen."""


@dataclass(frozen=True)
class Init:
    """One initialisation: call it as (W, r, s) -> (A, B). `start` says what becomes of a B·A that is not zero."""

    name: str
    function: Callable[..., Pair]
    start: Start = "zero"

    def __call__(self, W: Tensor, r: int, s: float) -> Pair:
        A, B = self.function(W, r, s)
        if self.start == "zero" and not A.is_meta and A.any() and B.any():
            raise UsageError(f"init '{self.name}' starts with B·A ≠ 0: register it as @init('{self.name}', \"kept\")")
        return A, B


INITS: dict[str, Init] = {}


def init(name: str, start: Start = "zero") -> Callable[[Callable[..., Pair]], Callable[..., Pair]]:
    """Register the decorated function as `LoraConfig(init=name)`."""

    def register(function: Callable[..., Pair]) -> Callable[..., Pair]:
        INITS[name] = Init(name, function, start)
        return function

    return register


def find_init(name: str) -> Init:
    """The initialisation called `name`; UsageError names the nearest."""
    if name not in INITS:
        raise UsageError(f"unknown init '{name}'{nearest(name, INITS)}; known: {', '.join(INITS)}")
    return INITS[name]


def factor_dtype(W: Tensor) -> torch.dtype:
    """fp32, over a float64 base float64: small updates do not survive in half precision."""
    return torch.promote_types(W.dtype, torch.float32)


def _empty(W: Tensor, r: int) -> Pair:
    out_features, in_features = W.shape
    A = torch.empty(r, in_features, dtype=factor_dtype(W), device=W.device)
    B = torch.zeros(out_features, r, dtype=factor_dtype(W), device=W.device)
    return A, B


def blank(W: Tensor, r: int, s: float) -> Pair:
    """A = B = 0: for values that are going to be written over."""
    A, B = _empty(W, r)
    return A.zero_(), B


BLANK, BLANK_KEPT = Init("blank", blank), Init("blank", blank, "kept")


@init("kaiming")
def kaiming(W: Tensor, r: int, s: float) -> Pair:
    """A ~ U(−1/√in, 1/√in), B = 0: what nn.Linear itself starts from, and the field's default (loralib)."""
    A, B = _empty(W, r)
    return torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5)), B


@init("gaussian")
def gaussian(W: Tensor, r: int, s: float) -> Pair:
    """A ~ N(0, 1/r²), B = 0: Hu et al. 2021, arXiv:2106.09685 §4.1, with the deviation that PEFT takes."""
    A, B = _empty(W, r)
    return torch.nn.init.normal_(A, std=1 / r), B


@init("gaussian_both", "free")
def gaussian_both(W: Tensor, r: int, s: float) -> Pair:
    """A, B ~ N(0, 0.02²): differs from the base at once, for tests of loading and unloading."""
    A, B = _empty(W, r)
    return torch.nn.init.normal_(A, std=0.02), torch.nn.init.normal_(B, std=0.02)


# --- the singular vectors and the QR factors of W ----------------------------------------------------


def _split(U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Pair:
    """A = √(S/s)·Vᵀ and B = U·√(S/s), so that s·B·A = U·S·Vᵀ."""
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root


@init("pissa", "kept")
def pissa(W: Tensor, r: int, s: float) -> Pair:
    """s·B·A = the best approximation of W of rank r: Meng et al. 2024, "PiSSA", arXiv:2404.02948, eq. 2 and 3.

    W = U·S·Vᵀ,   A = √(S/s)·Vᵀ,   B = U·√(S/s)   with the r largest singular values
    """
    U, S, Vh = torch.linalg.svd(W.to(factor_dtype(W)), full_matrices=False)
    return _split(U[:, :r], S[:r], Vh[:r], s)
