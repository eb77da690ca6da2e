"""Sums and cuts of low-rank updates, held to the dense matrices they stand for."""

import peft.utils.merge_utils
import pytest
import torch
from torch import Tensor

from lorafit.adapter.low_rank import Pair, best, cut, dare, squared_norm, stack, ties
from lorafit.errors import NumericError


def pair(out: int, in_: int, r: int, dtype: torch.dtype = torch.float64) -> Pair:
    return Pair(torch.randn(r, in_, dtype=dtype), torch.randn(out, r, dtype=dtype))


def truncated(delta: Tensor, k: int) -> Tensor:
    """The nearest matrix of rank k, by a full SVD."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def fading(out: int, in_: int, ratio: float) -> Tensor:
    """A full-rank matrix whose singular values fall by `ratio` from one to the next."""
    U, V = (torch.linalg.qr(torch.randn(n, min(out, in_), dtype=torch.float64)).Q for n in (out, in_))
    return U * ratio ** torch.arange(min(out, in_)) @ V.T


def test_a_stack_is_the_weighted_sum() -> None:
    pairs = [pair(20, 30, r) for r in (3, 5, 1)]
    weights = [0.5, -2.0, 1e-3]
    whole = stack(pairs, weights)
    assert whole.r == 9
    expected = sum(w * p.delta() for w, p in zip(weights, pairs, strict=True))
    torch.testing.assert_close(whole.delta(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("out", "in_", "r"), [(20, 30, 6), (30, 20, 1), (6, 40, 9), (40, 6, 9), (5, 5, 12)])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_a_cut_is_the_nearest_of_its_rank(out: int, in_: int, r: int, k: int) -> None:
    whole = pair(out, in_, r)
    found = cut(whole, rank=k)
    expected = truncated(whole.delta(), k)
    torch.testing.assert_close(found.pair.delta(), expected, rtol=0, atol=1e-12)
    assert found.pair.r == min(k, r, out, in_)
    assert found.lost == pytest.approx(float((whole.delta() - expected).square().sum()), abs=1e-20, rel=1e-12)
    assert found.total == pytest.approx(squared_norm(whole))
    torch.testing.assert_close(found.pair.A.norm(), found.pair.B.norm())  # half of each singular value


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_a_cut_by_energy_keeps_just_enough(energy: float) -> None:
    whole = pair(25, 35, 10)
    found = cut(whole, energy=energy)
    kept = torch.linalg.svdvals(whole.delta()).square()
    share = kept.cumsum(0) / kept.sum()
    assert share[found.pair.r - 1] >= energy - 1e-12
    assert found.pair.r == 1 or share[found.pair.r - 2] < energy
    assert found.pair.r <= 10


def test_an_update_of_zero_keeps_rank_one() -> None:
    nothing = Pair(torch.randn(4, 6), torch.zeros(5, 4))
    for found in (cut(nothing, energy=0.9), cut(nothing, rank=2), best(torch.zeros(5, 6), rank=2)):
        assert (found.lost, found.total) == (0.0, 0.0)
        assert found.pair.delta().abs().max() == 0
    assert cut(nothing, energy=0.9).pair.r == 1


@pytest.mark.parametrize("ratio", [0.5, 0.97])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (40, 50)])  # by iteration, the same, and by full SVD
def test_the_best_pair_of_a_dense_matrix(shape: tuple[int, int], ratio: float) -> None:
    delta = fading(*shape, ratio)
    expected = float((delta - truncated(delta, 8)).square().sum())
    found = best(delta, rank=8)
    assert found.pair.r == 8
    assert found.lost == pytest.approx(float((delta - found.pair.delta()).square().sum()), rel=1e-9)
    assert expected <= found.lost * (1 + 1e-9)
    assert found.lost <= expected + 1e-5 * found.total


@pytest.mark.parametrize("energy", [0.8, 0.99, 0.99999])
def test_the_best_pair_by_energy(energy: float) -> None:
    delta = fading(300, 400, 0.9)
    found = best(delta, energy=energy)
    kept = torch.linalg.svdvals(delta).square()
    enough = int((kept.cumsum(0) < energy * kept.sum()).sum()) + 1
    assert enough <= found.pair.r <= enough + 1
    assert 1 - found.lost / found.total >= energy - 1e-9


def test_what_is_low_rank_is_found_in_full() -> None:
    """The error is measured, not a difference of two large numbers: in fp32 it goes down to fp32's rounding."""
    whole = pair(300, 200, 8, torch.float32)
    found = best(whole.delta(), rank=8)
    assert (found.lost / found.total) ** 0.5 < 1e-6


def test_ties_is_what_peft_computes() -> None:
    deltas = [torch.randn(30, 40, dtype=torch.float64) for _ in range(3)]
    weights = [0.7, 1.5, -0.4]
    for density in (0.1, 0.5, 0.99):
        theirs = peft.utils.merge_utils.ties(deltas, torch.tensor(weights, dtype=torch.float64), density)
        torch.testing.assert_close(ties(deltas, weights, density), theirs)


def test_dare_is_the_sum_on_average_and_drops_what_it_says() -> None:
    deltas = [torch.ones(200, 300), 2 * torch.ones(200, 300)]
    found = dare(deltas, [1.0, 0.5], 0.25, [1, 2])
    assert sorted(found.unique().tolist()) == [0, 4, 8]
    assert found.mean() == pytest.approx(2, abs=0.05)
    assert (dare(deltas[:1], [1.0], 0.25, [1]) != 0).float().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dare(deltas, [1.0, 0.5], 1.0, [1, 2]), deltas[0] + 0.5 * deltas[1])
    assert torch.equal(found, dare(deltas, [1.0, 0.5], 0.25, [1, 2]))
    assert not torch.equal(found, dare(deltas, [1.0, 0.5], 0.25, [1, 3]))


def test_products_that_are_no_numbers_are_refused() -> None:
    large = Pair(torch.full((2, 3), 1e200, dtype=torch.float64), torch.full((4, 2), 1e200, dtype=torch.float64))
    with pytest.raises(NumericError, match="product is not finite"):
        cut(large, rank=1)
    with pytest.raises(NumericError, match="product is not finite"):
        best(large.delta(), rank=1)


def test_padding_changes_the_rank_alone() -> None:
    small = pair(5, 7, 2)
    padded = small.padded(6)
    assert (padded.r, padded.shape) == (6, small.shape)
    torch.testing.assert_close(padded.delta(), small.delta())
