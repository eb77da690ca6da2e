"""What a machine can do and what a step needs: peak of the matrix product, memory, useful floating-point operations."""

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed.workloads import Setup, targets
from lorafit.data.chat import Example

CPU = torch.device("cpu")
SIZES = (512, 768, 1024, 1536, 2048)
GPU_SIZES = (2048, 3072, 4096, 6144, 8192)
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy", "triton", "liger-kernel")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def matrix_peak(dtype: torch.dtype, device: torch.device = CPU, repeats: int = 3) -> float:
    """FLOP/s of the fastest square matrix product: what this machine reaches when nothing else is in the way."""
    return max(_speed(size, dtype, device, repeats) for size in (SIZES if device == CPU else GPU_SIZES))


def _speed(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def useful_flops(model: nn.Module, rows: Sequence[Example], supervised: int, setup: Setup) -> float:
    """What one step on `rows` cannot do without: (4N + 6a)·real + 4H·supervised + causal attention.

    `model` is the plain one. N weights of the frozen layers: forward, and backward to their input; a of the adapter:
    to its weights too; H of the head, where a token carries loss. Attention: two products over the pairs that a causal
    row has, and four backward. Padding, logits without loss and whatever is computed twice do not count.
    """
    layers = targets(model).values()
    N = sum(layer.weight.numel() for layer in layers)
    a = sum(setup.r * (layer.in_features + layer.out_features) for layer in layers)
    config: Any = model.config
    H = config.hidden_size * config.vocab_size
    real = sum(len(row.ids) for row in rows)
    pairs = sum(len(row.ids) * (len(row.ids) + 1) // 2 for row in rows)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * 2 * pairs * width * config.num_attention_heads * config.num_hidden_layers
    return float((4 * N + 6 * a) * real + 4 * H * supervised + attention)


def forget_peak() -> bool:
    """Let the kernel begin a new peak of this process's memory; False where it does not (Linux alone has it)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def memory(key: str) -> int | None:
    """Bytes of 'VmRSS' (now) or 'VmHWM' (peak); None where the system does not say."""
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def machine(threads: int) -> dict[str, Any]:
    """What a time depends on and does not change between runs."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "environment": environment(threads),
        "versions": versions(),
    }


def environment(threads: int) -> dict[str, str]:
    """What every run finds set."""
    return {"OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "2"}


def versions() -> dict[str, str]:
    """Of everything that has a part in a time."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
