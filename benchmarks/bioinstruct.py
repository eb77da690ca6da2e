"""BioInstruct, the tutorial's run: lorafit and PEFT in a plain loop, on the same batches from the same initial A.

    python benchmarks/bioinstruct.py                       # from the hub: needs a network
    python benchmarks/bioinstruct.py --data train.jsonl --eval-data val.jsonl

250 rows × 3 epochs, batch 8, at most 256 tokens, r = 16 on every linear layer, learning rate 5e-4 held constant,
clipping at 1.0. The base model is the demo's (SmolLM2-135M-Instruct) unless --model names another. The two runs
alternate step by step, so that both feel the same machine. Writes results/bioinstruct.json and .png beside this file.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, evaluate, load_model, read_examples
from lorafit.app.demo_model import demo_model
from lorafit.data.batches import collate
from lorafit.files import write_json
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear
from lorafit.training.loop import begin, take_step
from lorafit.training.optim import lr_at
from lorafit.training.run import Record, Result

RESULTS = Path(__file__).parent / "results"
CONFIG = TrainConfig(lr=5e-4, epochs=3, schedule="constant", warmup=0, seed=0)
RANK, ALPHA, BATCH, LONGEST = 16, 32, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bio-nlp-umass/bioinstruct:train[:250]")
    parser.add_argument("--eval-data", default="bio-nlp-umass/bioinstruct:train[250:500]")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=250)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    name = arguments.model or str(demo_model(console))
    model, tokenizer = load_model(name, dtype=arguments.dtype)
    rows = read_examples(arguments.data, tokenizer, max_length=LONGEST, allow_dropped=0.2)[: arguments.rows]
    held_out = Batches(
        read_examples(arguments.eval_data, tokenizer, max_length=LONGEST, allow_dropped=0.2)[: arguments.rows],
        BATCH,
        shuffle=False,
    )
    batches = Batches(rows, BATCH, seed=CONFIG.seed)
    before = evaluate(model, held_out)
    torch.manual_seed(CONFIG.seed)
    add_lora(model, LoraConfig(r=RANK, alpha=ALPHA))
    twin = peft_twin(name, arguments.dtype, model)
    ours, theirs = run(model, twin, batches, console)
    del twin
    gc.collect()
    result = {
        "model": "SmolLM2-135M-Instruct" if arguments.model is None else arguments.model,
        "dtype": str(model.dtype),
        "rows": len(rows),
        "steps": len(ours["losses"]),
        "validation_before": before,
        "validation_after": evaluate(model, held_out),
        "lorafit": ours | {"epochs": per_epoch(ours, batches)},
        "peft": theirs | {"epochs": per_epoch(theirs, batches)},
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
        "step_time_ratio": ratio(theirs["seconds"], ours["seconds"]),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "bioinstruct.json", result)
    draw(result, len(rows))
    for side in ("lorafit", "peft"):
        console.print(f"{side:8} loss per epoch " + "  ".join(f"{x:.4f}" for x in result[side]["epochs"]))
    console.print(f"validation {before:.4f} -> {result['validation_after']:.4f}")
    spread = "{median:.2f} times lorafit's ({low:.2f} to {high:.2f})".format(**result["step_time_ratio"])
    console.print(f"PEFT's step takes {spread}")


def peft_twin(name: str, dtype: str, model: nn.Module) -> nn.Module:
    """The same base under PEFT's defaults, with lorafit's A (B is 0 in both)."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    twin: nn.Module = peft.get_peft_model(load_model(name, dtype=dtype)[0], config)
    for layer_name, layer in wrappers(model):
        assert isinstance(layer, LoraLinear)
        there: Any = twin.base_model.model.get_submodule(layer_name)  # type: ignore[union-attr]
        there.lora_A["default"].weight.data.copy_(layer.lora_A.weight.data)
    return twin


def run(model: nn.Module, twin: nn.Module, batches: Batches, console: Console) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both, a step each in turn: the loss and seconds of every step, and the supervised tokens."""
    steps = int(CONFIG.epochs * batches.steps_per_epoch)
    mine = begin(model, batches, CONFIG)
    trained = [p for p in twin.parameters() if p.requires_grad]
    twin_optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=0.0)
    model.train(), twin.train()
    ours: dict[str, Any] = {"losses": [], "seconds": [], "tokens": []}
    theirs: dict[str, Any] = {"losses": [], "seconds": [], "tokens": []}
    for step in range(steps):
        mine.pending = take_step(mine)
        record = mine.complete()
        ours["losses"].append(record["loss"])
        ours["tokens"].append(record["tokens"])
        ours["seconds"].append(record["tokens"] / record["tokens_per_second"])
        start = time.perf_counter()
        theirs["losses"].append(peft_step(twin, batches, twin_optimizer, trained, step, steps))
        theirs["seconds"].append(time.perf_counter() - start)
        theirs["tokens"].append(record["tokens"])
        console.print(f"step {step + 1}/{steps}  lorafit {record['loss']:.4f}  PEFT {theirs['losses'][-1]:.4f}")
    return ours, theirs


def peft_step(twin: nn.Module, batches: Batches, optimizer: Any, trained: Any, step: int, steps: int) -> float:
    """What a plain loop around PEFT does: padded rows, all logits in fp32, mean over the supervised tokens."""
    batch = collate(batches.rows(step), packed=False)
    lengths = torch.tensor(batch.lengths)
    mask = (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long()
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.predict + 1] = batch.targets
    logits = twin(input_ids=batch.input_ids, attention_mask=mask).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.view_as(batch.input_ids)[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.param_groups[0]["lr"] = lr_at(step, steps, CONFIG)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def per_epoch(side: dict[str, Any], batches: Batches) -> list[float]:
    """Mean loss per supervised token of each epoch, as `train` reports it."""
    steps = enumerate(zip(side["losses"], side["tokens"], strict=True))
    history: list[Record] = [
        {"epoch": i // batches.steps_per_epoch, "loss": loss, "tokens": n} for i, (loss, n) in steps
    ]
    return Result(history).epoch_losses


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """a / b pair by pair: the median, and the middle half."""
    pairs = sorted(x / y for x, y in zip(a, b, strict=True))
    quarter = len(pairs) // 4
    return {"median": statistics.median(pairs), "low": pairs[quarter], "high": pairs[-1 - quarter]}


def draw(result: dict[str, Any], rows: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for side, colour, width in (("peft", "tab:orange", 3.5), ("lorafit", "tab:blue", 1.2)):
        losses = result[side]["losses"]
        label = "PEFT, plain loop" if side == "peft" else "lorafit"
        axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=label)
        size = len(losses) // len(result[side]["epochs"])
        for epoch, mean in enumerate(result[side]["epochs"]):
            axes.hlines(mean, epoch * size + 1, (epoch + 1) * size, color=colour, linestyle=":", linewidth=width)
    axes.set(
        xlabel="optimizer step",
        ylabel="loss per supervised token",
        title=f"BioInstruct, {rows} rows × 3 epochs, {result['model']}, r = {RANK}\n(dotted: mean of each epoch)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "bioinstruct.png", dpi=150)


if __name__ == "__main__":
    main()
