"""What a machine can do and what a step needs: peak of the matrix product, memory, useful floating-point operations."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed.workloads import R, targets
from lorafit.data.chat import Example

SIZES = (512, 768, 1024, 1536, 2048)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def matrix_peak(dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of the fastest square matrix product: what this machine reaches when nothing else is in the way."""
    return max(_speed(size, dtype, repeats) for size in SIZES)


def _speed(size: int, dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def useful_flops(model: nn.Module, rows: list[Example], supervised: int) -> float:
    """What one step on `rows` cannot do without: (4N + 6a)·real + 4H·supervised + causal attention.

    `model` is the plain one. N weights of the frozen layers: forward, and backward to their input; a of the adapter:
    to its weights too; H of the head, where a token carries loss. Attention: two products over the pairs that a causal
    row has, and four backward. Padding, logits without loss and whatever is computed twice do not count.
    """
    layers = targets(model).values()
    N = sum(layer.weight.numel() for layer in layers)
    a = sum(R * (layer.in_features + layer.out_features) for layer in layers)
    config: Any = model.config
    H = config.hidden_size * config.vocab_size
    real = sum(len(row.ids) for row in rows)
    pairs = sum(len(row.ids) * (len(row.ids) + 1) // 2 for row in rows)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * 2 * pairs * width * config.num_attention_heads * config.num_hidden_layers
    return float((4 * N + 6 * a) * real + 4 * H * supervised + attention)


def forget_peak() -> None:
    """Let the kernel begin a new peak of this process's memory, where it can (Linux)."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def memory(key: str) -> int | None:
    """Bytes of 'VmRSS' (now) or 'VmHWM' (peak); None where the system does not say."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def machine() -> dict[str, Any]:
    """What a time depends on and does not change between runs."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
