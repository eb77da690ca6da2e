"""Which run comes next: pure, from the runs that there are.

A method is tuned by `TUNING_SEED` on three learning rates in a row, and more at the side on which the best one lies at
the end; at the best rate it is then run with each of `SEEDS`, whose runs alone are reported. Plain LoRA comes first,
then everything at the middle rate, the other rates, and one seed after another for all of them: wherever it is stopped,
all methods have had about the same.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.methods.methods import BASE

Record = dict[str, Any]
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID = LADDER[2:5]
TUNING_SEED, SEEDS = 0, (1, 2, 3)


class Cell(NamedTuple):
    """One run."""

    task: str
    method: str
    lr: float
    seed: int


def tried(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, float]]:
    """The tuning loss by rate, of each task and method; infinite where the run came to nothing."""
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for record in records:
        if record["seed"] == TUNING_SEED:
            loss = record["tuning_loss"]
            found[record["task"], record["method"]][record["lr"]] = math.inf if loss is None else loss
    return found


def missing_rates(losses: Mapping[float, float]) -> list[float]:
    """The rates that are still to be tried, the middle one of the grid first; none when the best has neighbours."""
    if rest := [rate for rate in (GRID[1], GRID[0], GRID[2]) if rate not in losses]:
        return rest
    place = LADDER.index(best_rate(losses))
    return [LADDER[at] for at in (place - 1, place + 1) if 0 <= at < len(LADDER) and LADDER[at] not in losses]


def best_rate(losses: Mapping[float, float]) -> float:
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_tuned(losses: Mapping[float, float]) -> bool:
    """At least three rates, and both neighbours of the best one (or the ladder's end)."""
    return len(losses) >= len(GRID) and not missing_rates(losses)


def missing_cells(records: Sequence[Record], tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Cell]:
    """What can be run now, the most informative first; later ones may depend on earlier ones' outcome."""
    losses = tried(records)
    done = {(r["task"], r["method"], r["lr"], r["seed"]) for r in records}
    order = sorted(methods, key=lambda name: name != BASE)
    both = [(task, method) for method in order for task in tasks]
    rates = {key: missing_rates(losses[key]) for key in both}
    middle = [Cell(*key, GRID[1], TUNING_SEED) for key in both if GRID[1] in rates[key]]
    base = [Cell(*key, rate, TUNING_SEED) for key in both if key[1] == BASE for rate in rates[key]]
    rest = [Cell(*key, rate, TUNING_SEED) for key in both for rate in rates[key]]
    final = [
        Cell(*key, best_rate(losses[key]), seed) for seed in SEEDS for key in both if losses[key] and not rates[key]
    ]
    yield from dict.fromkeys(cell for cell in (*base, *middle, *rest, *final) if tuple(cell) not in done)


def count_left(records: Sequence[Record], tasks: Sequence[str], methods: Sequence[str]) -> int:
    """About how many runs are still to come: as if no grid had to be extended any more."""
    losses = tried(records)
    left = 0
    for key in ((task, method) for task in tasks for method in methods):
        rates = missing_rates(losses[key])
        best = None if rates else best_rate(losses[key])
        seeds = {r["seed"] for r in records if (r["task"], r["method"]) == key and r["lr"] == best}
        left += len(rates) + len(set(SEEDS) - seeds)
    return left
