"""The demo: in a few minutes, on this machine, a small chat model learns to turn a message into JSON.

It goes the way of any fine-tuning: see what the base model can do, adapt it, train it, measure it on rows it has
not seen, merge it, measure again. The base model is told the fields and shown an example; the trained one is told
`INSTRUCTION` alone: what it gains over the base is what it learned.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from torch import nn

from lorafit.adapter.peft_format import save_lora
from lorafit.app import runs
from lorafit.app.about import about
from lorafit.app.demo_data import INSTRUCTION, OPENING, Messages, Row, explained, make_rows
from lorafit.app.demo_model import demo_model
from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, as_dict
from lorafit.data.batches import Batches
from lorafit.data.read import read_examples
from lorafit.files import write_json, write_text
from lorafit.lora.inject import add_lora, lora_disabled, merge_lora
from lorafit.model.generate import generate, stream
from lorafit.model.load import load_model, resolve_device, resolve_dtype, save_model
from lorafit.training.loop import count_steps, evaluate, train

LORA = LoraConfig(r=16, alpha=32)
LR = 1e-3
LONGEST = 64  # tokens of an answer; an order takes about 50
TOGETHER = 50  # rows answered at once


@dataclass(frozen=True)
class Size:
    """How many rows there are of each kind, how long an answer may be in tokens, and how many a report shows."""

    train: int
    held_out: int
    new_patterns: int
    longest: int
    shown: int


FULL = Size(train=320, held_out=100, new_patterns=50, longest=LONGEST, shown=2)
QUICK = Size(train=8, held_out=2, new_patterns=0, longest=12, shown=1)


@dataclass(frozen=True)
class Score:
    """What a model made of some rows: answers that are a JSON object, answers that are the right one, the loss."""

    rows: int
    valid: int
    exact: int
    loss: float


def main(quick: bool = False, seed: int = 0, out: Path = Path("lorafit-demo")) -> dict[str, Any]:
    """Run the demo and leave all it makes in `out`; returns the figures, which also stand in `result.json`."""
    began = time.perf_counter()
    console = Console(highlight=False, markup=False)
    size = QUICK if quick else FULL
    base = str(demo_model(console))
    model_config = ModelConfig(model=base, dtype=quicker_dtype(console))
    data = DataConfig(data=str(out / "rows" / "train.jsonl"), max_length=512, batch_size=4)
    training = TrainConfig(lr=LR, seed=seed)
    if (out / "rows").is_dir():  # an earlier demo, not somebody's training run
        shutil.rmtree(out / runs.ADAPTER, ignore_errors=True)
    settings = as_dict(model_config, LORA, data, training)
    runs.start(out, settings)
    train_rows, held_out, new_patterns = make_rows(seed, size.train, size.held_out, size.new_patterns)
    for name, rows in (("train", train_rows), ("held_out", held_out), ("new_patterns", new_patterns)):
        write_rows(out / "rows" / f"{name}.jsonl", rows)
    model, tokenizer = load_model(base, dtype=model_config.dtype)

    scores = {"base model": score(console, model, tokenizer, held_out, explained(), "base model", size.longest)}
    torch.manual_seed(seed)  # the start of A
    plan = add_lora(model, LORA)
    console.print(f"\n{plan}\n")
    examples = read_examples(data.data, tokenizer)
    batches = Batches(examples, batch_size=data.batch_size, seed=seed)
    started, worked = time.perf_counter(), time.process_time()
    with runs.progress(console, count_steps(training, batches), out / runs.LOG) as on_step:
        result = train(model, batches, training, on_step=on_step, on_note=console.print)
    training_time = {
        "training_seconds": round(time.perf_counter() - started, 1),
        "training_cpu_seconds": round(time.process_time() - worked, 1),
    }
    adapter = save_lora(model, out / runs.ADAPTER, base_model=base)
    runs.draw_losses(result.history, out / runs.PICTURE, title=f"{size.train} orders to JSON")
    scores["with adapter"] = score(console, model, tokenizer, held_out, OPENING, "with adapter", size.longest)
    merged = merge(base, adapter, out / "merged", model_config.dtype)
    scores["merged model"] = score(console, merged, tokenizer, held_out, OPENING, "merged model", size.longest)
    if new_patterns:
        scores["adapter, new patterns"] = score(console, model, tokenizer, new_patterns, OPENING, "new patterns")

    asked = read_examples(str(out / "rows" / "held_out.jsonl"), tokenizer)
    noted = about(model, tokenizer, plan, examples, asked, settings=settings, count=size.shown, tokens=size.longest)
    measured = {name: f"{s.exact} of {s.rows} exactly right, loss {s.loss:.4f}" for name, s in scores.items()}
    write_json(out / runs.ABOUT, noted | {"measured": measured})
    console.print(table(scores, size, quick))
    show_answers(console, model, tokenizer, held_out[0], size.longest)
    console.print(what_now(out, base, adapter), soft_wrap=True)
    figures = {
        "seed": seed,
        "quick": quick,
        "dtype": str(next(model.parameters()).dtype),
        "rows": asdict(size),
        "scores": {name: asdict(value) for name, value in scores.items()},
        **training_time,
        "total_seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "result.json", figures)
    return figures


def what_now(out: Path, base: str, adapter: Path) -> str:
    """Where everything lies, and the commands that go on with it."""
    return (
        f"\nadapter {adapter}   merged model {out / 'merged'}   log {out / runs.LOG}   picture {out / runs.PICTURE}\n"
        f"talk to it: lorafit chat --model {base} --adapter {adapter} --system '{INSTRUCTION}'\n"
        f"show it: lorafit report {out}"
    )


def quicker_dtype(console: Console) -> Literal["auto", "float32"]:
    """bfloat16 or float32, whichever multiplies faster here: some processors have bfloat16, but no faster."""
    device = resolve_device("auto")
    if device.type != "cpu" or resolve_dtype("auto", device) == torch.float32:
        return "auto"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if ratio < 1.1:
        return "auto"
    console.print(f"computing in float32, {ratio:.1f} times as fast on this processor as its bfloat16")
    return "float32"


def write_rows(path: Path, rows: list[Row]) -> None:
    """A file that `lorafit train` and `lorafit eval` read too."""
    lines = [json.dumps({"messages": row.conversation()}, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def score(
    console: Console,
    model: nn.Module,
    tokenizer: Any,
    rows: list[Row],
    opening: Messages,
    name: str,
    longest: int = LONGEST,
) -> Score:
    """Let `model` answer `rows`, and compare with what is right."""
    answers: list[str] = []
    for start in track(range(0, len(rows), TOGETHER), description=f"{name:14}", console=console):
        prompts = [row.messages(opening) for row in rows[start : start + TOGETHER]]
        answers += generate(model, tokenizer, prompts, max_new_tokens=longest, batch_size=TOGETHER)
    orders = [parse(answer) for answer in answers]
    conversations = [{"messages": row.conversation(opening)} for row in rows]
    examples = read_examples(conversations, tokenizer, loss_on="last")
    return Score(
        rows=len(rows),
        valid=sum(order is not None for order in orders),
        exact=sum(order == row.order for order, row in zip(orders, rows, strict=True)),
        loss=evaluate(model, Batches(examples, shuffle=False)),
    )


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object that `answer` is; None when it is anything else."""
    try:
        order = json.loads(answer)
    except ValueError:
        return None
    return order if isinstance(order, dict) else None


def merge(base: str, adapter: Path, folder: Path, dtype: str) -> nn.Module:
    """Save base and adapter as one plain model folder; returns the model read back from it."""
    model, tokenizer = load_model(base, dtype=dtype, adapter=adapter)
    save_model(merge_lora(model), tokenizer, folder)
    return load_model(folder, dtype=dtype)[0]


def table(scores: dict[str, Score], size: Size, quick: bool) -> Table:
    """The result: what each model made of the rows."""
    label = ": a quick run, which shows that everything works, not what can be learned" if quick else ""
    result = Table(
        "",
        "rows",
        "valid JSON",
        "exactly right",
        "loss",
        title=f"held-out orders after {size.train} training rows{label}",
        title_justify="left",
    )
    for name, s in scores.items():
        result.add_row(name, str(s.rows), f"{s.valid / s.rows:.0%}", f"{s.exact / s.rows:.0%}", f"{s.loss:.4f}")
    return result


def show_answers(console: Console, model: nn.Module, tokenizer: Any, row: Row, longest: int) -> None:
    """Stream what the base model and the adapted model say to one message, side by side."""
    console.print(f"\n{row.message}")
    said = {"base model": "", "with adapter": ""}

    def panels() -> Table:
        grid = Table.grid(expand=True)
        grid.add_row(*(Panel(text, title=name) for name, text in said.items()))
        return grid

    with Live(panels(), console=console) as live:
        with lora_disabled(model):
            for piece in stream(model, tokenizer, row.messages(explained()), max_new_tokens=longest):
                said["base model"] += piece
                live.update(panels())
        for piece in stream(model, tokenizer, row.messages(), max_new_tokens=longest):
            said["with adapter"] += piece
            live.update(panels())
