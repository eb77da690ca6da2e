"""The same comparison on one CUDA GPU: `python -m benchmarks.gpu` (about 10 minutes). Without one: a line, no error.

W1's rows on Qwen1.5-0.5B's shape in bf16, 16,384 tokens a step and 4 rows a step; every peer is a process of its own,
and one that is there already is not made again. lorafit uses Liger's kernels where `liger-kernel` is installed;
`peft-liger` is PEFT's plain loop on them. Writes results/gpu.json and results/gpu.md.

    python -m benchmarks.gpu --size rows4 --peers lorafit peft
"""

import argparse
import importlib.util
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.growth import RESULTS
from benchmarks.speed.gate import gate
from benchmarks.speed.ladder import BUILDERS
from benchmarks.speed.measure import machine, matrix_peak, useful_flops
from benchmarks.speed.peers import Build, Peer, go_on, peft
from benchmarks.speed.report import TITLES, grid, interval, ratio, spread, told
from benchmarks.speed.runs import Record, code, read_all, run_once
from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import WORKLOADS, Factors, Setup, initial, make_model, real, rows_of, supervised
from lorafit import Batches
from lorafit.data.chat import Example
from lorafit.files import write_json, write_text

SIZES = {"tokens16k": 16384, "rows4": 0}
TOLD = {"tokens16k": "16,384 tokens a step", "rows4": "4 rows a step"}


def peft_liger(task: Task, start: Factors) -> Peer:
    """PEFT's plain loop on a model that Liger has changed, its fused loss included."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(task.model)
    return peft(task, start)


COMPARED: dict[str, Build] = {
    name: BUILDERS[name]
    for name in ("lorafit", "lorafit-compile", "peft", "peft-tuned", "peft-packed", "peft-compiled")
} | {"peft-liger": peft_liger}
NAMES = TITLES | {"peft-liger": "PEFT, plain loop, Liger", "peft-compiled": "PEFT, tuned loop, padded, compiled"}


def main() -> None:
    asked = _arguments()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing was measured. On one, this is all: python -m benchmarks.gpu")
        return
    if asked.out:
        write_json(asked.out, measure(asked.size[0], asked.peer, asked.steps, asked.warmup))
        return
    console = Console(highlight=False, soft_wrap=True)
    folder = RESULTS / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    like = {"steps": asked.steps, "warmup": asked.warmup, "machine": gpu_machine()}
    refused = {}
    for peer in asked.peers:
        if peer == "peft-liger":  # its kernels run on a GPU alone, the gate in fp32 on the CPU: the losses are compared
            refused[peer] = "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
        else:
            refused[peer] = gate([peer])[peer].wrong
        console.print(f"{NAMES[peer]}: {refused[peer] or 'same losses and gradients'}", markup=False)
    plan = [
        (size, number, peer)
        for size in asked.size
        for number in range(asked.rounds)
        for peer in (asked.peers if number % 2 == 0 else asked.peers[::-1])
        if not refused[peer]
    ]
    for done, (size, number, peer) in enumerate(plan, 1):
        label = f"[{done}/{len(plan)}] {size} round {number + 1} {peer}"
        what = {"size": size, "peer": peer, "round": number}
        flags = {"size": size, "peer": peer, "steps": asked.steps, "warmup": asked.warmup}
        mine = {"code": code(["src/lorafit"])} if peer.startswith("lorafit") else {}
        with console.status(label):
            out = folder / f"{size}-{peer}-{number}.json"
            found, there = run_once("benchmarks.gpu", flags, out, what | like | mine)
        milliseconds = [1e3 * seconds for seconds in found.get("seconds", ())]
        said = found.get("failed") or f"{statistics.median(milliseconds):.1f} ms{', was there' if there else ''}"
        console.print(f"{label}: {said}", markup=False)
    records = read_all(folder.glob("*.json"), like)
    lines = summarise(records)
    write_json(RESULTS / "gpu.json", like | {"refused": refused, "lines": lines})
    text = page(lines, records, refused)
    write_text(RESULTS / "gpu.md", text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peers", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--out", type=Path, help="one run, in this process")
    parser.add_argument("--peer", choices=COMPARED)
    return parser.parse_args()


def gpu_machine() -> Record:
    found = machine(len(os.sched_getaffinity(0)))
    return found | {"gpu": torch.cuda.get_device_name()}


def steps_of(tokens: int, steps: int, vocab: int) -> tuple[list[Example], int]:
    """Rows of W1 for `steps` steps, and how many rows a step has: the mean number that makes `tokens`, or 4."""
    if not tokens:
        return rows_of(WORKLOADS["W1"], 4 * steps, vocab), 4
    mean = real(rows_of(WORKLOADS["W1"], 1000, vocab)) / 1000
    rows = round(tokens / mean)
    return rows_of(WORKLOADS["W1"], rows * steps, vocab), rows


def measure(size: str, peer: str, steps: int, warmup: int, device: str = "cuda", **shape: Any) -> Record:
    """One peer's steps."""
    dtype, where, setup = torch.bfloat16, torch.device(device), Setup()
    model = make_model(dtype=dtype, **shape).to(where)
    rows, batch = steps_of(SIZES[size], warmup + steps, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    task = Task(model, Batches(rows, batch, shuffle=False), setup)
    parts = [task.batches.rows(warmup + step) for step in range(steps)]
    flops = [useful_flops(model, part, supervised(part), setup) for part in parts]
    before = matrix_peak(dtype, where)
    cuda = where.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if cuda else 0
    built = COMPARED[peer](task, initial(model, setup))
    timed = built.run(warmup + steps, go_on)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "seconds": [seconds for seconds, _ in timed[warmup:]],
        "losses": [loss for _, loss in timed],
        "real": [real(part) for part in parts],
        "supervised": [supervised(part) for part in parts],
        "useful_flops": flops,
        "matrix_peak": {"before": before, "after": matrix_peak(dtype, where)},
        "memory": {"loaded": loaded, "peak": peak, "above": peak - loaded},
        "config": dict(built.config),
    }


def summarise(records: Sequence[Record]) -> list[Record]:
    """One line per size and peer."""
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "failed" not in record:
            runs.setdefault((record["size"], record["peer"]), []).append(record)
    lines = []
    for (size, peer), mine in sorted(runs.items(), key=lambda item: (item[0][0], list(COMPARED).index(item[0][1]))):
        ours = runs.get((size, "lorafit"), [])
        base = runs.get((size, "peft"), [])
        above = _above(mine)
        pairs = [(run, number) for run in mine for number in range(len(run["seconds"]))]
        lines.append(
            {
                "size": size,
                "peer": peer,
                "step_seconds": spread([run["seconds"][number] for run, number in pairs]),
                "times_lorafit": ratio(mine, ours),
                "real_per_second": statistics.median(run["real"][n] / run["seconds"][n] for run, n in pairs),
                "useful_mfu": statistics.median(
                    run["useful_flops"][n] / run["seconds"][n] / max(run["matrix_peak"].values()) for run, n in pairs
                ),
                "memory_mb": above / 2**20,
                "memory_total_mb": statistics.median(run["memory"]["peak"] for run in mine) / 2**20,
                "memory_over_peft": above / _above(base) if base else None,
                "loss": mine[0]["losses"][0],
                "config": mine[0]["config"],
            }
        )
    return lines


def _above(runs: Sequence[Record]) -> float:
    return float(statistics.median(run["memory"]["above"] for run in runs))


def page(lines: Sequence[Record], records: Sequence[Record], refused: dict[str, str]) -> str:
    """Markdown: a table per size, what is missing, how each peer was set up."""
    speed, memory = ("ms per step", "times lorafit's", "real tok/s", "useful MFU"), ("MiB", "over PEFT's", "MiB in all")
    parts = ["# Speed on a GPU", "Made by `python -m benchmarks.gpu`: W1's rows, Qwen1.5-0.5B's shape, bf16."]
    for size, title in TOLD.items():
        rows = []
        for line in (line for line in lines if line["size"] == size):
            milliseconds = {key: 1e3 * value for key, value in line["step_seconds"].items()}
            over = line["memory_over_peft"]
            rows.append(
                [
                    NAMES[line["peer"]],
                    interval(milliseconds, ".1f"),
                    interval(line["times_lorafit"]),
                    f"{line['real_per_second']:.0f}",
                    f"{100 * line['useful_mfu']:.0f} %",
                    f"{line['memory_mb']:.0f}",
                    "–" if over is None else f"{over:.2f}",
                    f"{line['memory_total_mb']:.0f}",
                ]
            )
        if rows:
            parts += [f"## {title[0].upper()}{title[1:]}", grid(["", *speed, *memory], rows)]
    out = [f"{NAMES[peer]}: {why}" for peer, why in refused.items() if why]
    out += [f"{NAMES[run['peer']]}, {TOLD[run['size']]}: {run['failed']}" for run in records if "failed" in run]
    if out:
        parts.append(f"Not in these tables: {'; '.join(out)}.")
    configs = {line["peer"]: line["config"] for line in lines}
    parts.append("\n".join(f"- **{NAMES[peer]}**: {told(config)}" for peer, config in configs.items()))
    if records:
        machine = records[0]["machine"]
        peak = statistics.median(max(run["matrix_peak"].values()) for run in records if "failed" not in run)
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        parts.append(f"{machine['gpu']}, fastest matrix product {peak / 1e12:.0f} TFLOP/s; {versions}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
