"""Cutting a sum of adapters to a rank: QR of the factors beside the full SVD of the dense update.

`python benchmarks/adapter_algebra.py` (about two minutes). Four adapters of rank 16 on one 4096 × 4096 layer, cut to
rank 16; both ways give the same update. The figures go to results/adapter_algebra.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorafit.adapter.low_rank import Pair, best, cut, stack
from lorafit.files import write_json

RESULTS = Path(__file__).parent / "results" / "adapter_algebra.json"


def seconds(work: Callable[[], Any], times: int) -> tuple[float, Any]:
    """The median time of `work`, and what it gave."""
    taken, result = [], None
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), result


def full_svd(delta: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    nearest: torch.Tensor = U[:, :rank] * S[:rank] @ Vh[:rank]
    return nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    n, r = arguments.size, arguments.rank
    pairs = [Pair(torch.randn(r, n), torch.randn(n, r)) for _ in range(arguments.adapters)]
    whole = stack(pairs, [1.0] * len(pairs))
    delta = whole.delta()
    quick, found = seconds(lambda: cut(whole, rank=r), 5)
    dense, iterated = seconds(lambda: best(delta, rank=r), 3)
    slow, exact = seconds(lambda: full_svd(delta, r), 1)
    apart = float((found.pair.delta() - exact).norm() / exact.norm())
    figures = {
        "size": n,
        "rank": r,
        "adapters": len(pairs),
        "seconds by QR of the factors": quick,
        "seconds by iteration on the dense update": dense,
        "seconds by full SVD": slow,
        "times faster": slow / quick,
        "relative difference": apart,
        "error beside the best there is": (iterated.lost / found.lost) ** 0.5 if found.lost else 1.0,
    }
    for name, value in figures.items():
        print(f"{name:44}{value:.4g}")
    processor = torch.cpu.get_capabilities().get("cpu_name", "unknown")
    write_json(arguments.out, {"processor": processor, "threads": torch.get_num_threads(), **figures})


if __name__ == "__main__":
    main()
