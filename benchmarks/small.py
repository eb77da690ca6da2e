"""The small waits beside PEFT and transformers: answers, merging, loading an adapter, DoRA, `lorafit --help`.

    python -m benchmarks.small                     # about 4 minutes on two cores
    python -m benchmarks.small --part help merge
    python -m benchmarks.small --quick             # a tiny model: whether it works

Each part is a process of its own; one that is there already is not made again. The figures go to results/small.json,
the table into docs/cost.md. The two sides of a part take turns in one process, and each time is the median of a few.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.growth import MIDDLE, PAGE, RESULTS, TINY, VOCABULARY, make_point_rows
from benchmarks.speed.measure import machine
from benchmarks.speed.peers import PEERS, go_on, peft_config
from benchmarks.speed.report import grid, insert
from benchmarks.speed.run import precision
from benchmarks.speed.runs import ROOT, Record, code, read_all, run_once
from benchmarks.speed.tasks import Task
from benchmarks.speed.workloads import Setup, initial, make_model
from lorafit import Batches, LoraConfig, add_lora, generate, load_lora, load_model, merge_lora, save_lora, stream
from lorafit.app.demo_model import demo_model
from lorafit.files import write_json, write_text
from lorafit.lora.inject import wrappers

Row = dict[str, Any]
"""`what` was done, `unit`, `ours`, and `theirs` with its name in `beside`."""
Work = Callable[[], Any]


@dataclass(frozen=True)
class How:
    """How large and how often."""

    dtype: torch.dtype
    quick: bool

    @property
    def repeats(self) -> int:
        return 2 if self.quick else 5


def in_turns(works: Sequence[Work], repeats: int) -> list[float]:
    """Median seconds of each of `works`, done one after the other `repeats` times, and once before that."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for mine, work in zip(seconds, works, strict=True):
            began = time.perf_counter()
            work()
            mine.append(time.perf_counter() - began)
    return [statistics.median(mine[1:]) for mine in seconds]


# --- the parts ------------------------------------------------------------------------------------


def answers(how: How) -> list[Row]:
    """Tokens per second of greedy answers of one length, no end token."""
    name = str(demo_model(Console(stderr=True)))
    model: Any
    model, tokenizer = load_model(name, dtype=str(how.dtype).removeprefix("torch."), device="cpu")
    model.generation_config.eos_token_id = None  # an answer ends at its length: both sides make the same number
    new, many = (4, 2) if how.quick else (64, 8)
    questions = [f"Tell me about the number {number} in a few words." for number in range(many)]
    messages = [[{"role": "user", "content": question}] for question in questions]

    def ours_one() -> None:
        "".join(stream(model, tokenizer, questions[0], max_new_tokens=new))

    def ours_many() -> None:
        generate(model, tokenizer, questions, max_new_tokens=new, batch_size=many)

    def theirs(count: int) -> None:
        tokenizer.padding_side = "left"
        inputs = tokenizer.apply_chat_template(
            messages[:count], add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=count > 1
        )
        found = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
        tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :])

    one = in_turns([ours_one, lambda: theirs(1)], how.repeats)
    several = in_turns([ours_many, lambda: theirs(many)], how.repeats)
    about = {"unit": "tok/s", "beside": "transformers' generate"}
    return [
        {"what": f"one answer of {new} tokens", "ours": new / one[0], "theirs": new / one[1]} | about,
        {"what": f"{many} answers at once", "ours": many * new / several[0], "theirs": many * new / several[1]} | about,
    ]


def merge(how: How) -> list[Row]:
    """Seconds to make W + s·B·A the weights of the whole model."""
    from peft import get_peft_model

    def ours() -> None:
        add_lora(mine, LoraConfig(r=16))
        began = time.perf_counter()
        merge_lora(mine)
        times["ours"].append(time.perf_counter() - began)

    def theirs() -> None:
        wrapped: Any = get_peft_model(other, peft_config(Setup()))
        began = time.perf_counter()
        wrapped.merge_and_unload(safe_merge=True)
        times["theirs"].append(time.perf_counter() - began)

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    mine, other = _shape(how), _shape(how)
    in_turns([ours, theirs], how.repeats)
    median = {side: statistics.median(found[1:]) for side, found in times.items()}
    return [{"what": "merge an adapter of rank 16", "unit": "s", "beside": "PEFT, safe_merge"} | median]


def adapters(how: How) -> list[Row]:
    """Seconds from two files on disk: putting in the first adapter, and another in its place."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        mine, other = _shape(how), _shape(how)
        files = [Path(folder) / name for name in ("one", "two")]
        for file in files:
            add_lora(mine, LoraConfig(r=16))
            layers: list[tuple[str, Any]] = list(wrappers(mine))
            for _, layer in layers:
                nn.init.normal_(layer.lora_B.weight, std=0.01)
            save_lora(mine, file)
            _plain(mine)
        held: list[Any] = []

        def theirs() -> None:
            held.append(PeftModel.from_pretrained(other, str(files[0])))

        def peft_other() -> None:
            held[-1].load_adapter(str(files[1]), "two")
            held[-1].set_adapter("two")
            held[-1].delete_adapter("default")

        first, second = [], []
        for _ in range(how.repeats + 1):
            times = [_seconds(lambda: load_lora(mine, files[0])), _seconds(theirs)]
            first.append(times)
            second.append([_seconds(lambda: load_lora(mine, files[1])), _seconds(peft_other)])
            _plain(mine)
            held.pop().unload()
    about = {"unit": "s", "beside": "PEFT"}
    return [
        {"what": what, "ours": _median(times, 0), "theirs": _median(times, 1)} | about
        for what, times in (("load an adapter from disk", first), ("another adapter from disk in its place", second))
    ]


def dora(how: How) -> list[Row]:
    """Seconds of a training step with DoRA, and with LoRA."""
    rows = make_point_rows(replace(MIDDLE, layers=2), 4 * MIDDLE.rows)
    seconds = {}
    for peer, variant in (("lorafit", "dora"), ("peft", "dora"), ("lorafit", "lora")):
        setup = Setup(variant=variant)
        model = _shape(how)
        task = Task(model, Batches(rows, MIDDLE.rows, shuffle=False), setup)
        timed = PEERS[peer](task, initial(model, setup)).run(3 if how.quick else 1 + how.repeats, go_on)
        seconds[peer, variant] = statistics.median(second for second, _ in timed[1:])
    ours = seconds["lorafit", "dora"]
    return [
        {"what": "a step with DoRA", "unit": "s", "ours": ours, "theirs": seconds[other], "beside": name}
        for other, name in ((("peft", "dora"), "PEFT's DoRA"), (("lorafit", "lora"), "lorafit's LoRA"))
    ]


def help(how: How) -> list[Row]:
    """Seconds of `lorafit --help`, a new process each time."""

    def ours() -> None:
        command = [sys.executable, "-m", "lorafit", "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    def python() -> None:
        subprocess.run([sys.executable, "-c", ""], check=True)

    mine, bare = in_turns([ours, python], how.repeats)
    return [{"what": "lorafit --help", "unit": "s", "ours": mine, "theirs": bare, "beside": "an empty Python"}]


PARTS: dict[str, Callable[[How], list[Row]]] = {
    "help": help,
    "answers": answers,
    "merge": merge,
    "adapters": adapters,
    "dora": dora,
}


def _shape(how: How) -> nn.Module:
    layers, narrow = (2, TINY) if how.quick else (MIDDLE.layers, {})
    return make_model(layers, how.dtype, vocab_size=VOCABULARY, **narrow)


def _plain(model: nn.Module) -> None:
    from lorafit import unload_lora

    unload_lora(model)


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _median(times: Sequence[Sequence[float]], side: int) -> float:
    return statistics.median(one[side] for one in times[1:])


# --- all of them ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="one part, in this process")
    asked = parser.parse_args()
    how = How(precision(asked.dtype), asked.quick)
    if asked.out:
        torch.set_num_threads(asked.threads)
        write_json(asked.out, {"rows": PARTS[asked.part[0]](how)})
        return
    console = Console(highlight=False, soft_wrap=True)
    results = ROOT / "runs" / "benchmarks" if asked.quick else RESULTS
    folder = results / "small"
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(how.dtype).removeprefix("torch.")
    like = {"dtype": dtype, "quick": asked.quick, "machine": machine(asked.threads)}
    mine = like | {"code": code(["src/lorafit"])}
    for number, part in enumerate(asked.part, 1):
        label = f"[{number}/{len(asked.part)}] {part}"
        flags = {"part": part, "dtype": dtype, "threads": asked.threads, "quick": asked.quick}
        with console.status(label):
            found, there = run_once("benchmarks.small", flags, folder / f"{part}.json", {"part": part} | mine)
        console.print(f"{label}: {found.get('failed') or ('was there' if there else 'done')}", markup=False)
    records = read_all((folder / f"{name}.json" for name in PARTS), like)
    if records:
        text = table(records)
        write_json(results / "small.json", like | {"parts": records})
        print(text)
        if not asked.quick:
            write_text(PAGE, insert(PAGE.read_text(), text, "small"))


def table(records: Sequence[Record]) -> str:
    """Markdown; a part that failed is named below."""
    rows = [
        [row["what"], _amount(row, "ours"), row["beside"], _amount(row, "theirs"), _gain(row)]
        for record in records
        for row in record.get("rows", ())
    ]
    failed = [f"Not measured: {record['part']} ({record['failed']})." for record in records if "failed" in record]
    one = records[0]
    machine = one["machine"]
    note = (
        f"{one['dtype']}, {machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}. "
        "Answers are of SmolLM2-135M-Instruct; the rest is measured on "
        f"{MIDDLE.layers} layers of Qwen1.5-0.5B's shape with {VOCABULARY:,} words."
    )
    return "\n\n".join([grid(["", "lorafit", "beside", "", "faster by"], rows), *failed, note])


def _amount(row: Row, side: str) -> str:
    return f"{row[side]:.3g} {row['unit']}"


def _gain(row: Row) -> str:
    return f"{row['theirs'] / row['ours'] if row['unit'] == 's' else row['ours'] / row['theirs']:.2f}"


if __name__ == "__main__":
    main()
