"""What each initialisation costs on Qwen1.5-0.5B's shape: seconds, and peak memory beside the model and the adapter.

`python -m benchmarks.init_cost` (about half an hour on two CPU cores; `--only pissa,eva` for some of it,
`--layers 2` for a look). Each runs in a process of its own, one after the other; those that look at data see `--rows`
rows of workload W2. The weights are random, which costs as much as trained ones. The figures go to
results/init_cost.json and docs/methods.md after each init, and one that is there already is not run again.
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

from benchmarks.speed.__main__ import names
from benchmarks.speed.measure import forget_peak, load_average, machine, memory
from benchmarks.speed.report import grid, insert
from benchmarks.speed.workloads import WORKLOADS, Setup, make_model, rows_of
from lorafit import INITS, Batches, LoraConfig, add_lora, calibrate
from lorafit.files import write_json, write_text
from lorafit.lora.inject import adapter_state

SETUP = Setup()
RESULTS = Path(__file__).parent / "results" / "init_cost.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
SHAPE = 24  # layers


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
    parser.add_argument("--only", type=names(INITS), default=list(INITS), help="inits, with commas")
    parser.add_argument("--layers", type=int, default=SHAPE)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(cost(arguments.one, arguments.layers, arguments.rows)))
        return
    found: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for init in arguments.only:
        settings = {"layers": arguments.layers, "rows": arguments.rows, "r": SETUP.r}
        if not any(one["init"] == init and one["settings"] == settings for one in found):
            alone = [sys.executable, "-m", "benchmarks.init_cost", "--one", init]
            sizes = ["--layers", str(arguments.layers), "--rows", str(arguments.rows)]
            done = subprocess.run([*alone, *sizes], check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout))
            write_json(arguments.out, found)
            if arguments.out == RESULTS and arguments.layers == SHAPE:
                write_text(PAGE, insert(PAGE.read_text(), table(found), "init cost"))
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: what was measured with the settings of the last one."""
    last = found[-1]
    like = [one for one in found if all(one[key] == last[key] for key in ("settings", "machine"))]
    rows = [
        [one["init"], f"{one['seconds']:.1f}", f"{one['of these looking at data']:.1f}", _mebibytes(one["memory"])]
        for one in sorted(like, key=lambda one: list(INITS).index(one["init"]))
    ]
    how, where = last["settings"], last["machine"]
    note = (
        f"{how['layers']} layers of Qwen1.5-0.5B's shape, all linear layers, r = {how['r']}, fp32, {how['rows']} rows "
        f"of workload W2 to look at; memory is the peak above model and adapter. {where['cpu']}, threads: "
        f"{where['threads']}. Made by `python -m benchmarks.init_cost`."
    )
    return f"{grid(['init', 's', 'of these looking at data, s', 'memory, MiB'], rows)}\n\n{note}"


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.0f}"


if __name__ == "__main__":
    main()
