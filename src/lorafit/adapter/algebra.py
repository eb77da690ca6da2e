"""What can be done with adapters from their files alone: add them up, cut their rank, say how two differ.

Everything is about ΔW, never about A and B by themselves: A and B of two adapters mean nothing to each other, and the
sum of the products is not the product of the sums.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorafit.adapter.low_rank import Cut, Pair, best, cut, dare, squared_norm, stack, ties
from lorafit.adapter.stored import Stored, joint_base, read_stored, write_stored
from lorafit.errors import AdapterError, UsageError, listing

Method = Literal["sum", "ties", "dare"]
SAME = 1e-12  # two updates nearer than this, relative to their norm, differ in rounding
PLAIN_WAYS = "merge it into its base (lorafit merge), then take the best rank-k LoRA of the result (lorafit extract)"


@dataclass(frozen=True)
class Outcome:
    """What was written, by layer: its rank, and what it lost against the exact ΔW. `str` is what a person reads."""

    path: Path
    cuts: Mapping[str, Cut] = field(repr=False)

    @property
    def error(self) -> float:
        """‖ΔW − result‖ / ‖ΔW‖ over all layers."""
        total = sum(cut.total for cut in self.cuts.values())
        return float((sum(cut.lost for cut in self.cuts.values()) / total) ** 0.5) if total else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most of its own norm, and that share."""
        shares = {name: (cut.lost / cut.total) ** 0.5 if cut.total else 0.0 for name, cut in self.cuts.items()}
        name = max(shares, key=shares.__getitem__)
        return name, shares[name]

    def __str__(self) -> str:
        ranks = sorted({cut.pair.r for cut in self.cuts.values()}) or [0]
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        line = f"{self.path}: {len(self.cuts)} layers, {span}"
        if self.error == 0:
            return f"{line}, exact"
        return f"{line}, relative error of the update {self.error:.3g} ({self.worst[1]:.3g} in {self.worst[0]})"


# --- sums -----------------------------------------------------------------------------------------


def combine_adapters(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    method: Method = "sum",
    rank: int | None = None,
    energy: float | None = None,
    density: float = 0.2,
    seed: int = 0,
    force_base: bool = False,
) -> Outcome:
    """Write Σ w·ΔW of the adapters in `paths` as a new adapter `out`.

    `method` "sum" without `rank` and `energy` is exact, with the ranks added up; with them it is cut as in
    `resize_adapter`. "ties" and "dare" work on the dense ΔW of a layer with the share `density` of its values, and
    are cut to the sum of the ranks unless told otherwise. A layer that an adapter lacks counts as ΔW = 0 there.
    Raises AdapterError where the sum is not defined: DoRA, modules trained in full, other bases, other shapes.
    """
    if len(paths) != len(weights) or not paths:
        raise UsageError(f"a weight for every adapter is needed: {len(paths)} adapters, {len(weights)} weights")
    if method not in ("sum", "ties", "dare"):
        raise UsageError(f"unknown method {method!r}: use sum, ties or dare")
    if not 0 < density <= 1:
        raise UsageError(f"density must be above 0 and at most 1, not {density!r}")
    check_keep(rank, energy)
    sources = [read_stored(path) for path in paths]
    for source in sources:
        _refuse_dora(source, "be added up")
        if source.trained:
            raise AdapterError(
                f"{source.folder}: it trains {listing(source.trained, 2)} in full, which have no ΔW without the base: "
                "merge it into its base (lorafit merge) before it is combined"
            )
    joint_base(sources, force=force_base)
    cuts = {}
    for name in dict.fromkeys(name for source in sources for name in source.pairs):
        here = [i for i, source in enumerate(sources) if name in source.pairs]
        pairs = _of_one_shape(name, [sources[i] for i in here])
        shares = [float(weights[i]) for i in here]
        if method == "sum":
            whole = stack(pairs, shares)
            total = squared_norm(whole)
            cuts[name] = Cut(whole, 0.0, total) if rank is None and energy is None else cut(whole, rank, energy)
            continue
        deltas = [pair.delta() for pair in pairs]
        if method == "ties":
            delta = ties(deltas, shares, density)
        else:
            delta = dare(deltas, shares, density, [_seed(seed, i, name) for i in here])
        most = rank or (None if energy else sum(pair.r for pair in pairs))
        cuts[name] = best(delta, most, energy, pairs[0].embedding)
    return Outcome(write_stored(out, {name: found.pair for name, found in cuts.items()}, sources), cuts)


def _of_one_shape(name: str, sources: Sequence[Stored]) -> list[Pair]:
    pairs = [source.pairs[name] for source in sources]
    for source, pair in zip(sources, pairs, strict=True):
        if (pair.shape, pair.embedding) != (pairs[0].shape, pairs[0].embedding):
            raise AdapterError(
                f"{source.folder}: {name} is {pair.shape[0]} × {pair.shape[1]}, in {sources[0].folder} it is "
                f"{pairs[0].shape[0]} × {pairs[0].shape[1]}: they belong to different base models"
            )
    return pairs


def _seed(seed: int, number: int, layer: str) -> int:
    """A seed of its own for every adapter and layer, whatever the order of the layers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {layer}".encode()).digest()[:7], "little")


# --- another rank ---------------------------------------------------------------------------------


def resize_adapter(
    path: str | Path, out: str | Path, *, rank: int | None = None, energy: float | None = None
) -> Outcome:
    """Write the adapter in `path` with a smaller rank as `out`.

    `rank` is the most that any layer keeps, `energy` the share of ‖ΔW‖² that each keeps, with the least rank that
    does; layers then have ranks of their own. A layer that is within both already stays as it is. Modules trained in
    full are passed on. Raises AdapterError for DoRA, whose ΔW is not low-rank.
    """
    if rank is None and energy is None:
        raise UsageError("resize needs a rank or an energy")
    source = read_stored(path)
    _refuse_dora(source, "be resized")
    cuts = shrink(source, rank, energy)
    return Outcome(write_stored(out, {name: found.pair for name, found in cuts.items()}, [source]), cuts)


def shrink(source: Stored, rank: int | None, energy: float | None) -> dict[str, Cut]:
    """Each layer of `source` within `rank` and `energy`, or as it is without either."""
    check_keep(rank, energy)
    cuts = {}
    for name, pair in source.pairs.items():
        if energy is None and (rank is None or pair.r <= rank):
            cuts[name] = Cut(pair, 0.0, squared_norm(pair))
        else:
            cuts[name] = cut(pair, rank, energy)
    return cuts


def check_keep(rank: int | None, energy: float | None) -> None:
    """UsageError for a rank or an energy that is none."""
    if rank is not None and not (type(rank) is int and rank >= 1):
        raise UsageError(f"rank must be a whole number of at least 1, not {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy must be above 0 and at most 1, not {energy!r}")


# --- how two differ -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Two adapters compared, layer by layer: ‖ΔW‖² of the one, of the other, and of their difference."""

    one: Stored
    two: Stored
    squares: Mapping[str, tuple[float, float, float]]

    @property
    def distance(self) -> float:
        """‖ΔW₁ − ΔW₂‖ / max(‖ΔW₁‖, ‖ΔW₂‖) over all layers and modules trained in full."""
        first, second, apart = (sum(square[i] for square in self.squares.values()) for i in range(3))
        share = float((apart / max(first, second)) ** 0.5) if max(first, second) else 0.0
        return share if share > SAME else 0.0

    def __str__(self) -> str:
        lines = []
        for what, mine, others in (("first", self.one, self.two), ("second", self.two, self.one)):
            only = {*mine.pairs, *mine.trained}.difference(others.pairs, others.trained)
            if only:
                lines.append(f"only in the {what}: {listing(sorted(only), 4)}")
        far = sorted(self.squares, key=lambda name: -self.squares[name][2])[:5]
        for name in far:
            first, second, apart = self.squares[name]
            if apart > SAME**2 * max(first, second):
                lines.append(f"{name}: norms {first**0.5:.4g} and {second**0.5:.4g}, difference {apart**0.5:.4g}")
        return "\n".join([*lines, f"relative difference of the updates: {self.distance:.3g}"])


def diff_adapters(one: str | Path, two: str | Path) -> Difference:
    """How far the updates of two adapters are apart, from their files, whatever their ranks, scales and names are.

    Raises AdapterError for DoRA, where the files alone do not tell, and for adapters of different shapes.
    """
    sources = [read_stored(path) for path in (one, two)]
    for source in sources:
        _refuse_dora(source, "be compared")
    squares = {}
    for name in dict.fromkeys(name for source in sources for name in source.pairs):
        here = [source for source in sources if name in source.pairs]
        pairs = _of_one_shape(name, here)
        signs = [1.0 if source is sources[0] else -1.0 for source in here]
        norms = {id(source): squared_norm(pair) for source, pair in zip(here, pairs, strict=True)}
        first, second = (norms.get(id(source), 0.0) for source in sources)
        squares[name] = (first, second, squared_norm(stack(pairs, signs)))
    first_of, second_of = sources
    for name in first_of.trained.keys() & second_of.trained.keys():
        a, b = first_of.trained[name].double(), second_of.trained[name].double()
        if a.shape != b.shape:
            raise AdapterError(f"{two}: {name} is {tuple(b.shape)}, in {one} it is {tuple(a.shape)}")
        squares[name] = (float(a.square().sum()), float(b.square().sum()), float((a - b).square().sum()))
    return Difference(first_of, second_of, squares)


def _refuse_dora(source: Stored, what: str) -> None:
    if source.magnitudes:
        raise AdapterError(
            f"{source.folder}: a DoRA adapter cannot {what} from its file, its update depends on the base: {PLAIN_WAYS}"
        )
