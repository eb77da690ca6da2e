"""What DoRA costs beside LoRA, ours and PEFT's: a training step of Qwen1.5-0.5B's shape, in one and the same loop.

`python -m benchmarks.dora_step` (about ten minutes on two CPU cores; `--layers 2` for a look). The four take turns,
step by step, so that what else the machine does meets all of them; the ratios are medians over the turns. Logits are
made for the last 64 tokens of a row only: the head costs all four the same. Attention, loss and optimizer are the same
too; only the layers differ, and lorafit's run as in training, those that see one tensor together. What whole steps of
the two libraries cost is in `benchmarks.small`. The figures go to results/dora_step.json and docs/methods.md.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.measure import load_average, machine
from benchmarks.speed.report import grid, insert
from benchmarks.speed.workloads import Setup, make_model
from lorafit import LoraConfig, add_lora
from lorafit.files import write_json, write_text
from lorafit.training.shared_input import inputs_shared

SETUP = Setup()
RESULTS = Path(__file__).parent / "results" / "dora_step.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
ROWS, LENGTH, SCORED = 4, 256, 64
RATIOS = {
    "lorafit DoRA / lorafit LoRA": ("lorafit dora", "lorafit lora"),
    "PEFT DoRA / lorafit DoRA": ("peft dora", "lorafit dora"),
    "PEFT DoRA / PEFT LoRA": ("peft dora", "peft lora"),
}


def adapted(model: nn.Module, name: str) -> nn.Module:
    """`model` with the adapter called `name`."""
    who, variant = name.split()
    if who == "lorafit":
        add_lora(model, LoraConfig(r=SETUP.r, alpha=SETUP.alpha, variant=variant))
        return model
    import peft

    config = peft.LoraConfig(r=SETUP.r, lora_alpha=SETUP.alpha, target_modules="all-linear", use_dora=variant == "dora")
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def stepper(model: Any) -> Callable[[torch.Tensor], float]:
    """Takes one step on rows of ids, and says how long it took."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SETUP.lr, fused=True)

    def step(ids: torch.Tensor) -> float:
        began = time.perf_counter()
        logits = model(input_ids=ids, logits_to_keep=SCORED + 1, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -SCORED:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def run(turns: int, layers: int, **shape: Any) -> dict[str, Any]:
    """Seconds of each step, and the ratios. The four share the frozen weights."""
    base: Any = make_model(layers, **shape)
    shared = {id(parameter): parameter for parameter in base.parameters()}
    steps = {}
    shared_inputs = ExitStack()
    for name in dict.fromkeys(name for pair in RATIOS.values() for name in pair):
        model = adapted(copy.deepcopy(base, dict(shared)), name)
        if name.startswith("lorafit"):
            shared_inputs.enter_context(inputs_shared(model, packed=False))
        steps[name] = stepper(model)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        ids = torch.randint(base.config.vocab_size, (ROWS, LENGTH), generator=generator)
        for name, step in steps.items():
            took = step(ids)
            if turn:  # the first is for warming up
                seconds[name].append(took)
    ratios = {
        what: statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        for what, (one, other) in RATIOS.items()
    }
    return {
        "settings": {"turns": turns, "layers": layers, "rows": ROWS, "length": LENGTH, "r": SETUP.r},
        "machine": machine(torch.get_num_threads()),
        "load_average": load_average(),
        "seconds": seconds,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = run(arguments.turns, arguments.layers)
    write_json(arguments.out, found)
    print(text := table(found))
    if arguments.out == RESULTS:
        write_text(PAGE, insert(PAGE.read_text(), text, "dora step"))


def table(found: dict[str, Any]) -> str:
    """Markdown: the median of each, and the ratios."""
    how, where = found["settings"], found["machine"]
    rows = [[name, f"{statistics.median(seconds):.2f}"] for name, seconds in found["seconds"].items()]
    ratios = [[what, f"{ratio:.2f}"] for what, ratio in found["ratios"].items()]
    note = (
        f"{how['layers']} layers of Qwen1.5-0.5B's shape, {how['rows']} rows of {how['length']} tokens, "
        f"r = {how['r']}, fp32, {where['cpu']}, threads: {where['threads']}, medians over {how['turns']} turns. Made "
        "by `python -m benchmarks.dora_step`."
    )
    return f"{grid(['a step', 's'], rows)}\n\n{grid(['paired', 'times'], ratios)}\n\n{note}"


if __name__ == "__main__":
    main()
