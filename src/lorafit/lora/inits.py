"""How A and B start: a registry of pure functions (W, r, s[, statistic]) -> (A, B).

W (out, in) is the frozen weight, r the rank, s the scale of the update; A is (r, in), B is (out, r), both in
fp32 or wider. Adding an initialisation is one decorated function here, or in your own code:

    @init("mine")
    def mine(W, r, s): ...

Whatever it returns, the model's function does not move at step 0: where B·A does not start at 0, the layer keeps the
start (A0, B0) and learns the difference to it (`LoraLinear.update`). Only what is registered as "free" differs.

An init that looks at data names the statistic it wants, and is called with it; `training/calibrate.py` gathers it:

    "inputs"     `Moments` of the layer's input x
    "gradient"   G = ∂L/∂W (out, in) of the loss per supervised token
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from lorafit.errors import UsageError, nearest

Pair = tuple[Tensor, Tensor]
Start = Literal["zero", "kept", "free"]
"""B·A at step 0: "zero"; not zero, so that the layer keeps it and learns the difference; or meant to be seen."""
Statistic = Literal["inputs", "gradient"]


@dataclass(frozen=True)
class Init:
    """One initialisation: call it as (W, r, s) -> (A, B), and with its statistic if it has one.

    `start` says what becomes of a B·A that is not zero. `shares` (statistic -> (n,), falling) are what each of the n
    directions counts, where ranks may be shared out among the layers by it; A and B of a smaller rank are then the
    first rows and columns of those of a larger one.
    """

    name: str
    function: Callable[..., Pair]
    start: Start = "zero"
    statistic: Statistic | None = None
    shares: Callable[[Any], Tensor] | None = None

    def __call__(self, W: Tensor, r: int, s: float, statistic: Any = None) -> Pair:
        if self.statistic is not None and statistic is None:
            raise UsageError(
                f"init '{self.name}' looks at data: add_lora(model, *calibrate(model, config, batches))"
            )
        A, B = self.function(W, r, s) if self.statistic is None else self.function(W, r, s, statistic)
        if self.start == "zero" and not A.is_meta and A.any() and B.any():
            raise UsageError(f"init '{self.name}' starts with B·A ≠ 0: register it as @init('{self.name}', \"kept\")")
        return A, B

    def made(self, pair: Pair) -> "Init":
        """This initialisation for one layer whose A and B are made already."""
        return replace(self, function=lambda W, r, s: pair, statistic=None)


INITS: dict[str, Init] = {}


def init(name: str, start: Start = "zero", **data: Any) -> Callable[[Callable[..., Pair]], Callable[..., Pair]]:
    """Register the decorated function as `LoraConfig(init=name)`; `data` are `statistic` and `shares` of `Init`."""

    def register(function: Callable[..., Pair]) -> Callable[..., Pair]:
        INITS[name] = Init(name, function, start, **data)
        return function

    return register


def find_init(name: str) -> Init:
    """The initialisation called `name`; UsageError names the nearest."""
    stem, _, number = name.rpartition("_")
    if stem == "pissa_niter" and number.isdecimal():
        return Init(name, partial(pissa_niter, rounds=int(number)), "kept")
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


# --- by chance ----------------------------------------------------------------------------------------


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


@init("orthogonal", "free")
def orthogonal(W: Tensor, r: int, s: float) -> Pair:
    """Neither A nor B is 0, and yet B·A is (to rounding): their ranks' spaces are orthogonal to each other.

    Q (r, r) orthogonal, N₁ and N₂ standard normal:   A = (N₁·Q₀)ᵀ/10,   B = N₂·Q₁/10,   Q₀·Q₁ᵀ = 0
    where Q₀ are Q's rows 0, 2, 4, … and Q₁ the others. Gupta 2025 (datta0.github.io/posts/rethink-lora-init), as PEFT
    has it, there for even r only.
    """
    normal = partial(torch.randn, dtype=factor_dtype(W), device=W.device)
    Q = torch.linalg.qr(normal(r, r)).Q
    N1, N2 = normal(W.shape[1], (r + 1) // 2), normal(r // 2, W.shape[0]).T
    return (N1 @ Q[0::2]).T / 10, N2 @ Q[1::2] / 10


# --- from W: the layer keeps (A0, B0) and learns the difference to it ------------------------------------


def _wide(W: Tensor, r: int, name: str) -> Tensor:
    """W in the precision of A and B, if it has r directions at all."""
    _enough(min(W.shape), r, name)
    return W.to(factor_dtype(W))


def _enough(there: int, asked: int, name: str) -> None:
    if asked > there:
        raise UsageError(f"init '{name}' needs {asked} directions, and there are {there}: lower r, or exclude it")


def _split(U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Pair:
    """A = √(S/s)·Vᵀ and B = U·√(S/s), so that s·B·A = U·S·Vᵀ."""
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root


@init("pissa", "kept")
def pissa(W: Tensor, r: int, s: float) -> Pair:
    """s·B·A is the best approximation of W of rank r: what matters most in W is what is trained.

    W = U·S·Vᵀ,   A = √(S/s)·Vᵀ,   B = U·√(S/s)   with the r largest singular values
    Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948, eq. 2–4.
    """
    U, S, Vh = torch.linalg.svd(_wide(W, r, "pissa"), full_matrices=False)
    return _split(U[:, :r], S[:r], Vh[:r], s)


@init("pissa_niter_4", "kept")
def pissa_niter(W: Tensor, r: int, s: float, rounds: int = 4) -> Pair:
    """`pissa` with a randomised SVD of `rounds` power iterations ('pissa_niter_16': 16): seconds instead of minutes.

    Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4; §A of the PiSSA paper. More rounds, less error.
    """
    U, S, V = torch.svd_lowrank(_wide(W, r, "pissa"), q=min(r + 8, *W.shape), niter=rounds)
    return _split(U[:, :r], S[:r], V.T[:r], s)


@init("milora", "kept")
def milora(W: Tensor, r: int, s: float) -> Pair:
    """`pissa` with the r smallest singular values: what matters most in W is left as it is.

    Wang et al. 2024, "MiLoRA: Harnessing Minor Singular Components", arXiv:2406.09044, §3.
    """
    U, S, Vh = torch.linalg.svd(_wide(W, r, "milora"), full_matrices=False)
    return _split(U[:, -r:], S[-r:], Vh[-r:], s)


@init("olora", "kept")
def olora(W: Tensor, r: int, s: float) -> Pair:
    """W = Q·R,   B = Q[:, :r],   A = R[:r]: B begins with orthonormal columns.

    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation", arXiv:2406.01775, algorithm 1.
    """
    Q, R = torch.linalg.qr(_wide(W, r, "olora"))
    return R[:r], Q[:, :r]


# --- from data ------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Of a stream of vectors x (in,): how many, their mean (in,), and Σ (x − mean)(x − mean)ᵀ (in, in)."""

    count: int
    mean: Tensor
    scatter: Tensor

    def add(self, x: Tensor) -> None:
        """Count in the rows of x (n, in), by Chan, Golub and LeVeque 1979: nothing large is ever subtracted."""
        x = x.to(self.mean.dtype)
        middle = x.mean(dim=0)
        x = x - middle
        total, away = self.count + len(x), middle - self.mean
        self.scatter.addmm_(x.T, x).addr_(away, away, alpha=self.count * len(x) / total)
        self.mean += away * (len(x) / total)
        self.count = total

    @property
    def second(self) -> Tensor:
        """E[x·xᵀ], (in, in)."""
        return (self.scatter / self.count).addr_(self.mean, self.mean)

    @cached_property
    def components(self) -> tuple[Tensor, Tensor]:
        """The variances (in,) along the principal directions, the largest first, and the directions as rows."""
        values, vectors = torch.linalg.eigh(self.scatter)
        return values.flip(0).clamp_min(0), vectors.T.flip(0)


def explained(inputs: Moments) -> Tensor:
    """The share of the input's variance along each principal direction."""
    variances = inputs.components[0]
    return variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)


@init("eva", statistic="inputs", shares=explained)
def eva(W: Tensor, r: int, s: float, inputs: Moments) -> Pair:
    """A = the r directions along which the layer's input varies most, B = 0: the gradient of B is largest there.

    Cov(x) = V·Λ·Vᵀ,   A = V[:, :r]ᵀ.   Ranks are shared out by the share of the variance, Λᵢ / tr Λ.
    Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170, §3.
    """
    _enough(W.shape[1], r, "eva")
    A, B = _empty(W, r)
    return A.copy_(inputs.components[1][:r]), B


def _leading(G: Tensor, n: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), S (n,), Vᵀ (n, in) of the n largest singular values, as both papers below take them."""
    U, S, V = torch.svd_lowrank(_wide(G, n, name), q=min(2 * n + 8, *G.shape), niter=4)
    return U[:, :n], S[:n], V.T[:n]


GAMMA = {"lora_ga": 16, "lora_one": 128}  # the papers' own


@init("lora_ga", "kept", statistic="gradient")
def lora_ga(W: Tensor, r: int, s: float, gradient: Tensor) -> Pair:
    """The first step of A and B moves W as full fine-tuning would, as far as rank 2r can.

    G = U·S·Vᵀ,   A = (out^¼/√γ)·V[:, :r]ᵀ,   B = (out^¼/√γ)·U[:, r:2r]   with γ = 16
    Wang, Yu and Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000, algorithm 1.
    """
    U, _, Vh = _leading(gradient, 2 * r, "lora_ga")
    scale = W.shape[0] ** 0.25 / GAMMA["lora_ga"] ** 0.5
    return scale * Vh[:r], scale * U[:, r:]


@init("lora_one", "kept", statistic="gradient")
def lora_one(W: Tensor, r: int, s: float, gradient: Tensor) -> Pair:
    """B·A points where the first step of full fine-tuning goes, as far as rank r can.

    −G = U·S·Vᵀ,   A = √(S/(γ·S₁))·Vᵀ,   B = U·√(S/(γ·S₁))   with the r largest singular values, γ = 128
    Zhang, Liu and Chen 2025, "LoRA-One", arXiv:2502.01235, algorithm 1. The paper adds s·B·A to W at step 0, as a first
    step; here the step is left to the optimizer, and the model starts as what it is.
    """
    U, S, Vh = _leading(-gradient, r, "lora_one")
    largest = S[:1].clamp_min(torch.finfo(S.dtype).tiny)
    return _split(U, S / largest, Vh, GAMMA["lora_one"])


DAMPING = 0.01  # of the mean of C's diagonal, as in CorDA's own code


def _corda(W: Tensor, r: int, s: float, inputs: Moments, part: slice, name: str) -> Pair:
    """s·B·A = W projected onto left singular vectors of W·C, C = E[x·xᵀ]: what W does to typical inputs comes first.

    W·C = U·S·Vᵀ,   B = U·√(S/s),   A = √(S/s)·Vᵀ·C⁻¹ = U ᵀ·W / √(S·s)
    The right-hand side needs no inverse. C is taken per unit of its mean diagonal, so that the scale of the inputs does
    not move between A and B.
    """
    C = inputs.second
    C = C / C.diagonal().mean().clamp_min(torch.finfo(C.dtype).tiny)
    C.diagonal().add_(DAMPING)
    wide = _wide(W, r, name)
    U, S, _ = torch.linalg.svd(wide @ C.to(wide.dtype), full_matrices=False)
    U, S = U[:, part], S[part].clamp_min(torch.finfo(S.dtype).tiny)
    return (U.T @ wide) / (S * s).sqrt()[:, None], U * (S / s).sqrt()


@init("corda", "kept", statistic="inputs")
def corda(W: Tensor, r: int, s: float, inputs: Moments) -> Pair:
    """The r largest singular values of W·C, to learn the task best ("instruction-previewed"): see `_corda`.

    Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation", arXiv:2406.05223, §3.2–3.3.
    """
    return _corda(W, r, s, inputs, slice(None, r), "corda")


@init("corda_kpm", "kept", statistic="inputs")
def corda_kpm(W: Tensor, r: int, s: float, inputs: Moments) -> Pair:
    """The r smallest singular values of W·C, to keep what it does to these inputs ("knowledge-preserved").

    Yang et al. 2024, arXiv:2406.05223, §3.3; the rows are then those whose answers are not to be lost.
    """
    return _corda(W, r, s, inputs, slice(-r, None), "corda_kpm")
