"""The demo with three seeds: what README says about it. `python benchmarks/demo_seeds.py` (about 15 minutes).

A seed is other rows, another order and another start of the adapter. The figures go to results/demo.json.
"""

import argparse
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from lorafit.app.demo import main as demo
from lorafit.files import write_json

RESULTS = Path(__file__).parent / "results" / "demo.json"


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(demo(seed=seed, out=Path(folder) / "demo"))
        write_json(arguments.out, {"machine": machine(), "runs": runs})  # after each: a run takes minutes
    for name in runs[0]["scores"]:
        exact = [f"{run['scores'][name]['exact']}/{run['scores'][name]['rows']}" for run in runs]
        print(f"{name:24}exactly right: {'  '.join(exact)}")


if __name__ == "__main__":
    main()
