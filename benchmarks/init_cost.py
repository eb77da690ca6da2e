"""What each initialisation costs on Qwen1.5-0.5B's shape: seconds, and peak memory beside the model and the adapter.

`python -m benchmarks.init_cost` (about half an hour on two CPU cores; `--layers 2 --inits kaiming pissa` for a look).
Each runs in a process of its own, one after the other; those that look at data see `--rows` rows of workload W2. The
weights are random, which costs as much as trained ones. The figures go to results/init_cost.json after each init, and
one that is there already is not run again.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import forget_peak, load_average, machine, memory
from benchmarks.speed.workloads import WORKLOADS, Setup, make_model, rows_of
from lorafit import INITS, Batches, LoraConfig, add_lora, calibrate
from lorafit.files import write_json
from lorafit.lora.inject import adapter_state

SETUP = Setup()
RESULTS = Path(__file__).parent / "results" / "init_cost.json"


def cost(init: str, layers: int, rows: int, **shape: Any) -> dict[str, Any]:
    """Seconds and bytes of one init in this process."""
    model = make_model(layers, **shape)
    work = WORKLOADS["W2"]
    batches = Batches(rows_of(work, rows, model.config.vocab_size), work.batch)  # type: ignore[union-attr, arg-type]
    gc.collect()
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    config, starts = calibrate(model, LoraConfig(r=SETUP.r, alpha=SETUP.alpha, init=init, init_rows=rows), batches)
    looked = time.perf_counter()
    add_lora(model, config, starts)
    done, peak = time.perf_counter(), memory("VmHWM")
    adapter = sum(tensor.nbytes for tensor in adapter_state(model).values())
    return {
        "init": init,
        "settings": {"layers": layers, "rows": rows, "r": SETUP.r},
        "machine": machine(torch.get_num_threads()),
        "load_average": load_average(),
        "seconds": done - began,
        "of these looking at data": looked - began,
        "adapter": adapter,
        "memory": None if peak is None or before is None else peak - before - adapter,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inits", nargs="+", default=list(INITS), choices=list(INITS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(cost(arguments.one, arguments.layers, arguments.rows)))
        return
    found: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for init in arguments.inits:
        settings = {"layers": arguments.layers, "rows": arguments.rows, "r": SETUP.r}
        if not any(one["init"] == init and one["settings"] == settings for one in found):
            alone = [sys.executable, "-m", "benchmarks.init_cost", "--one", init]
            sizes = ["--layers", str(arguments.layers), "--rows", str(arguments.rows)]
            done = subprocess.run([*alone, *sizes], check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout))
            write_json(arguments.out, found)
    for one in found:
        extra = "" if one["memory"] is None else f"{one['memory'] / 2**20:8,.0f} MiB"
        print(f"{one['init']:16}{one['seconds']:8.1f} s{extra}")


if __name__ == "__main__":
    main()
