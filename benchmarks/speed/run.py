"""One run in a process of its own: `python -m benchmarks.speed.run --workload W1 --peer peft …` writes its JSON."""

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import forget_peak, load_average, machine, matrix_peak, memory, useful_flops
from benchmarks.speed.peers import BUILDERS
from benchmarks.speed.workloads import WORKLOADS, initial, make_model, real, rows_of, supervised
from lorafit import Batches
from lorafit.files import write_json
from lorafit.model.load import resolve_dtype


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What the parent and a run have in common."""
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="auto")


def precision(name: str) -> torch.dtype:
    return resolve_dtype(name, torch.device("cpu"))


def run(workload: str, peer: str, steps: int, warmup: int, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """All that one peer did in one run."""
    work = WORKLOADS[workload]
    before, load = matrix_peak(dtype), load_average()
    model = make_model(layers, dtype)
    rows = rows_of(work, work.batch * (warmup + steps), model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    batches = Batches(rows, work.batch, shuffle=False)
    of_steps = [batches.rows(number) for number in range(warmup, warmup + steps)]
    flops = [useful_flops(model, part, supervised(part)) for part in of_steps]
    gc.collect()
    forget_peak()
    loaded = memory("VmRSS")
    timed = BUILDERS[peer](model, batches, initial(model)).run(warmup + steps)[warmup:]
    peak = memory("VmHWM")
    return {
        "workload": workload,
        "peer": peer,
        "dtype": str(dtype).removeprefix("torch."),
        "settings": {"steps": steps, "warmup": warmup, "layers": layers},
        "machine": machine(),
        "load_average": load,
        "matrix_peak": max(before, matrix_peak(dtype)),
        "seconds": [seconds for seconds, _ in timed],
        "losses": [loss for _, loss in timed],
        "real": [real(part) for part in of_steps],
        "supervised": [supervised(part) for part in of_steps],
        "useful_flops": flops,
        "memory": None if peak is None or loaded is None else peak - loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--peer", choices=BUILDERS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--round", type=int, default=0)
    add_settings(parser)
    asked = parser.parse_args()
    dtype = precision(asked.dtype)
    record = run(asked.workload, asked.peer, asked.steps, asked.warmup, asked.layers, dtype)
    write_json(asked.out, record | {"round": asked.round})


if __name__ == "__main__":
    main()
