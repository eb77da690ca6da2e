"""One run in a process of its own: `python -m benchmarks.methods.run --task demo --method pissa …` writes its JSON."""

import argparse
import gc
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.methods.methods import all_methods
from benchmarks.methods.plan import TUNING_SEED
from benchmarks.methods.tasks import BATCH, TASKS
from benchmarks.speed.measure import forget_peak, machine, memory
from lorafit import Batches, TrainConfig, add_lora, calibrate, load_model, save_lora, train
from lorafit.app.demo_model import demo_model
from lorafit.errors import NumericError
from lorafit.files import write_json


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What the parent and a run have in common."""
    parser.add_argument("--rows", type=int, default=32, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=12, help="rows to choose a rate by, and as many to report")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dtype", default="float32")


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    return {"rows": asked.rows, "held_out": asked.held_out, "epochs": asked.epochs, "dtype": asked.dtype}


def run(task: str, method: str, lr: float, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """All that came of one method at one rate."""
    chosen = all_methods()[method]
    model, tokenizer = load_model(demo_model(Console(quiet=True)), dtype=settings["dtype"])
    rows = TASKS[task].rows(tokenizer, settings["rows"], settings["held_out"])
    batches = Batches(rows.train, BATCH, seed=seed)
    config = TrainConfig(lr=lr, seed=seed, epochs=settings["epochs"], **chosen.training)
    gc.collect()
    forget_peak()
    loaded = memory("VmRSS")
    torch.manual_seed(seed)
    began, idle = time.perf_counter(), time.process_time()
    plan = add_lora(model, *calibrate(model, chosen.lora_config(), batches))
    started = time.process_time()
    tuning: float | None = None
    reported: float | None = None
    exact = None
    steps = 0
    try:
        result = train(model, batches, config)
        steps = len(result.history)
    except NumericError:
        pass  # too high a rate is an outcome, not a failure
    ended, peak = time.process_time(), memory("VmHWM")
    if steps:
        tuning, reported = rows.loss(model, rows.tuning), rows.loss(model, rows.reported)
        exact = rows.exact(model) if rows.exact and seed != TUNING_SEED else None
    with tempfile.TemporaryDirectory() as folder:
        saved = save_lora(model, Path(folder) / "adapter") / "adapter_model.safetensors" if steps else None
        size = saved.stat().st_size if saved else None
    return {
        "task": task,
        "method": method,
        "lr": lr,
        "seed": seed,
        "settings": settings,
        "machine": machine(torch.get_num_threads()),
        "steps": steps,
        "tuning_loss": tuning if tuning is not None and math.isfinite(tuning) else None,
        "loss": reported if reported is not None and math.isfinite(reported) else None,
        "exact": exact,
        "reported_rows": len(rows.reported),
        "trained": plan.trainable,
        "init_cpu_seconds": started - idle,
        "train_cpu_seconds": ended - started,
        "seconds": time.perf_counter() - began,
        "memory": None if peak is None or loaded is None else peak - loaded,
        "adapter_bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--method", choices=all_methods(), required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    add_settings(parser)
    asked = parser.parse_args()
    write_json(asked.out, run(asked.task, asked.method, asked.lr, asked.seed, settings_of(asked)))


if __name__ == "__main__":
    main()
