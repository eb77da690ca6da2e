"""One run in a process of its own: `python -m benchmarks.speed.run --workload W1 --peer peft …` writes its JSON."""

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.ladder import BUILDERS, counter
from benchmarks.speed.measure import forget_peak, load_average, machine, matrix_peak, memory, useful_flops
from benchmarks.speed.peers import Build
from benchmarks.speed.tasks import Goal, Task, held_out_loss, make_task
from benchmarks.speed.workloads import WORKLOADS, initial, real, supervised
from lorafit.files import write_json
from lorafit.model.load import resolve_dtype

SETTINGS = ("steps", "warmup", "layers", "quick")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What the parent and a run have in common."""
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short rows: whether it works")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def precision(name: str) -> torch.dtype:
    return resolve_dtype(name, torch.device("cpu"))


def measured(task: Task, build: Build, steps: int, warmup: int) -> dict[str, Any]:
    """What a peer did with `task`: `steps` steps behind `warmup` others, or as many as it takes to reach the goal.

    Memory in bytes: `loaded` what the process held with the model and nothing else, `peak` the most that it held from
    then on, `above` the difference. Where the kernel keeps an older peak (`peak_reset` false) both may be too large.
    """
    dtype, load = next(task.model.parameters()).dtype, load_average()
    device = next(task.model.parameters()).device
    before = matrix_peak(dtype, device)
    total = warmup + steps if task.goal is None else task.goal.most
    rows = [task.batches.rows(number) for number in range(total)]
    useful = [useful_flops(task.model, part, supervised(part), task.setup) for part in rows]
    gc.collect()
    reset = forget_peak()
    loaded = memory("VmRSS")
    watch = _Watch(task.goal)
    began = time.perf_counter()
    peer = build(task, initial(task.model, task.setup))
    watch.model = peer.model
    timed = peer.run(total, watch.after)
    wall = time.perf_counter() - began
    peak = memory("VmHWM")
    counted = slice(warmup, len(timed))
    return {
        "seconds": [seconds for seconds, _ in timed[counted]],
        "losses": [loss for _, loss in timed],
        "real": [real(part) for part in rows[counted]],
        "supervised": [supervised(part) for part in rows[counted]],
        "useful_flops": useful[counted],
        "matrix_peak": {"before": before, "after": matrix_peak(dtype, device)},
        "memory": {
            "loaded": loaded,
            "peak": peak,
            "above": None if peak is None or loaded is None else peak - loaded,
            "peak_reset": reset,
        },
        "beside_steps": wall - sum(seconds for seconds, _ in timed) - watch.seconds,
        "load_average": load,
        "config": dict(peer.config),
        "notes": task.notes,
    } | watch.reached([seconds for seconds, _ in timed])


class _Watch:
    """Looks at the held-out rows now and then, and ends the run where the goal is reached."""

    def __init__(self, goal: Goal | None) -> None:
        self.goal, self.model, self.seconds = goal, torch.nn.Module(), 0.0
        self.seen: list[tuple[int, float]] = []

    def after(self, step: int) -> bool:
        if self.goal is None:
            return False
        began = time.perf_counter()
        done = False
        if (step + 1) % self.goal.every == 0:
            loss = held_out_loss(self.model, self.goal.held_out)
            self.seen.append((step + 1, loss))
            done = loss <= self.goal.target
        self.seconds += time.perf_counter() - began
        return done

    def reached(self, seconds: list[float]) -> dict[str, Any]:
        if self.goal is None:
            return {}
        last = self.seen[-1] if self.seen else (0, float("inf"))
        there = last[1] <= self.goal.target
        return {
            "held_out": self.seen,
            "target": self.goal.target,
            "seconds_to_target": sum(seconds[: last[0]]) if there else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--peer", choices=BUILDERS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--round", type=int, default=0)
    add_settings(parser)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = precision(asked.dtype)
    task = make_task(asked.workload, asked.warmup + asked.steps, asked.layers, dtype, asked.quick)
    count = counter(task.model, task.setup, asked.peer)
    record = measured(task, BUILDERS[asked.peer], asked.steps, asked.warmup)
    if count is not None:
        parts = [task.batches.rows(asked.warmup + step) for step in range(len(record["seconds"]))]
        record["predicted_flops"] = [count(part) for part in parts]
    head = {key: getattr(asked, key) for key in ("workload", "peer", "round")}
    settings = {key: getattr(asked, key) for key in SETTINGS}
    about = {"dtype": str(dtype).removeprefix("torch."), "settings": settings, "machine": machine(asked.threads)}
    write_json(asked.out, head | about | record)


if __name__ == "__main__":
    main()
