"""The algebra of low-rank updates ΔW = B·A: sums, cuts to a smaller rank, and the best pair for a dense matrix.

Sums are exact by laying factors side by side; cuts are exact by QR of the thin factors and the SVD of what is left,
which is only as large as the rank (Eckart and Young: no other pair of that rank is nearer).

    A (r, in), B (out, r)      Aᵀ = Q_A·R_A      B = Q_B·R_B      B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ      R_B·R_Aᵀ is (r, r)

Norms are Frobenius; what a cut lost is returned squared, so that layers can be added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.errors import NumericError

OVERSAMPLE, MOST_ROUNDS, STILL = 16, 30, 1e-7
DENSE_SHARE = 4  # a rank above a quarter of the matrix is cut by a full SVD
ROWS = 1024


@dataclass(frozen=True)
class Pair:
    """ΔW = B·A of one layer, its scale folded in: A (r, in), B (out, r). For an embedding "in" is the vocabulary."""

    A: Tensor
    B: Tensor
    embedding: bool = False

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """ΔW, dense (out, in)."""
        return self.B @ self.A

    def padded(self, r: int) -> "Pair":
        """The same ΔW with zero rows and columns up to rank `r`."""
        more = r - self.r
        A, B = (torch.nn.functional.pad(t, p) for t, p in ((self.A, (0, 0, 0, more)), (self.B, (0, more))))
        return Pair(A, B, self.embedding)


@dataclass(frozen=True)
class Cut:
    """A pair, and what it lost against what it stands for: ‖ΔW − B·A‖² and ‖ΔW‖²."""

    pair: Pair
    lost: float
    total: float


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Σ w·B·A, exact: the ranks add up."""
    A = torch.cat([pair.A for pair in pairs])
    B = torch.cat([w * pair.B for w, pair in zip(weights, pairs, strict=True)], dim=1)
    return Pair(A, B, pairs[0].embedding)


def cut(pair: Pair, rank: int | None = None, energy: float | None = None) -> Cut:
    """The nearest pair of rank at most `rank`, or of the least rank that holds the share `energy` of ‖ΔW‖².

    Both factors get half of each singular value. Computed in float64, returned in the precision of `pair`.
    """
    A, B = pair.A.double(), pair.B.double()
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(_finite(R_B @ R_A.T), full_matrices=False)
    k = _count(S, rank, energy)
    root = S[:k].sqrt()
    nearest = Pair(
        (root[:, None] * (Vh[:k] @ Q_A.T)).to(pair.A.dtype),
        ((Q_B @ U[:, :k]) * root).to(pair.B.dtype),
        pair.embedding,
    )
    return Cut(nearest, float(S[k:].square().sum()), float(S.square().sum()))


def squared_norm(pair: Pair) -> float:
    """‖B·A‖², to the last bits even where B·A is a small difference of large parts."""
    return float(core(pair.A, pair.B).square().sum())


def core(A: Tensor, B: Tensor) -> Tensor:
    """R_B·R_Aᵀ in float64, no larger than (…, r, r), with the singular values of B·A; A (…, r, in), B (…, out, r)."""
    R_A: Tensor = torch.linalg.qr(A.double().mT, mode="r").R
    R_B: Tensor = torch.linalg.qr(B.double(), mode="r").R
    return R_B @ R_A.mT


def best(delta: Tensor, rank: int | None = None, energy: float | None = None, embedding: bool = False) -> Cut:
    """The nearest pair for a dense ΔW (out, in), as `cut` finds it for a pair.

    By block power iteration (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, Algorithm 4.4), until the energy it
    holds stands still; by a full SVD where the rank is no small part of the matrix. What was lost is measured.
    """
    delta = _finite(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    total = float(delta.square().sum(dtype=torch.float64))
    width = (rank or OVERSAMPLE) + OVERSAMPLE
    while width * DENSE_SHARE < min(delta.shape):
        found = _by_iteration(delta, width, rank, energy)
        if energy is None or found.r < width - OVERSAMPLE // 2:
            return Cut(Pair(found.A, found.B, embedding), _distance(delta, found), total)
        width *= 2
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = _count(S, rank, energy)
    root = S[:k].sqrt()
    found = Pair(root[:, None] * Vh[:k], U[:, :k] * root, embedding)
    return Cut(found, _distance(delta, found), total)


def _by_iteration(delta: Tensor, width: int, rank: int | None, energy: float | None) -> Pair:
    """A pair of the leading singular vectors among `width` that the iteration follows."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], width, generator=random, dtype=delta.dtype).to(delta.device)
    Q = torch.linalg.qr(delta @ start).Q
    total, before = float(delta.square().sum(dtype=torch.float64)), 0.0
    for _ in range(MOST_ROUNDS):
        P = torch.linalg.qr(delta.T @ Q).Q
        Q, R = torch.linalg.qr(delta @ P)
        held = float(torch.linalg.svdvals(R.double())[: rank or width].square().sum())
        if held - before <= STILL * total:
            break
        before = held
    return _within(Pair(Q.T @ delta, Q), total, rank, energy)


def _within(pair: Pair, total: float, rank: int | None, energy: float | None) -> Pair:
    """`cut`, with the energy counted against `total` instead of what `pair` itself holds."""
    if energy is not None:
        held = squared_norm(pair)
        energy = min(1.0, energy * total / held) if held else 1.0
    return cut(pair, rank, energy).pair


def _finite(product: Tensor) -> Tensor:
    if not product.isfinite().all():
        raise NumericError("the values of this adapter are so large that their product is not finite")
    return product


def _count(S: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: at least one, a file knows no rank 0."""
    k = len(S)
    if energy is not None:
        held = S.square().cumsum(0)
        k = int((held < energy * held[-1]).sum()) + 1 if float(held[-1]) else 1
    return max(1, min(k, len(S), rank or len(S)))


def _distance(delta: Tensor, pair: Pair) -> float:
    """‖ΔW − B·A‖², a band of rows at a time."""
    bands = range(0, delta.shape[0], ROWS)
    parts = (delta[i : i + ROWS] - pair.B[i : i + ROWS] @ pair.A for i in bands)
    return float(sum(part.square().sum(dtype=torch.float64) for part in parts))


# --- sums that are not linear -----------------------------------------------------------------------


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES of dense updates (out, in): each is trimmed to its largest share `density`, a sign is elected for every
    place, and those that agree with it are averaged.

    Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708; the sign of the plain sum is elected, as in PEFT.
    """
    trimmed = [_trim(delta, density) for delta in deltas]
    sign = torch.stack(trimmed).sum(0).sign()
    merged, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = (delta.sign() == sign) & (delta != 0)
        merged += torch.where(agrees, weight * delta, 0)
        count += agrees
    return merged / count.clamp_min(1)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, seeds: Sequence[int]) -> Tensor:
    """DARE of dense updates (out, in): places are dropped at random but for the share `density`, the rest is scaled
    up by 1/density, and the sum taken.

    Yu et al. 2023, "Language Models are Super Mario", arXiv:2311.03099. One seed for each update.
    """
    merged = torch.zeros_like(deltas[0])
    for delta, weight, seed in zip(deltas, weights, seeds, strict=True):
        random = torch.Generator().manual_seed(seed)
        kept = torch.rand(delta.shape, generator=random) < density
        merged += torch.where(kept.to(delta.device), weight / density * delta, 0)
    return merged


def _trim(delta: Tensor, density: float) -> Tensor:
    """Only the largest share `density` of the places, by magnitude."""
    count = int(density * delta.numel())
    if count == 0:
        return torch.zeros_like(delta)
    least = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= least, delta, 0)
