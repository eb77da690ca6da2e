"""What a process holds of a model while it is loaded and trained: all of it, or with `shard` its slice.

`python -m benchmarks.shard_memory` (two minutes; a model of 393 MB in fp32, random weights, in bfloat16 files). The
figures are peaks of what a process has beyond what it had before, in two parts: memory of its own, and pages of files,
which all processes of a machine have in common and the system takes back as it likes. In fp32 the weights are a
process's own. Memory does not depend on the load of the machine.
"""

import argparse
import gc
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.multiprocessing.spawn import spawn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.speed.measure import machine
from lorafit import Batches, LoraConfig, TrainConfig, add_lora, load_model, train
from lorafit.data.chat import Example
from lorafit.files import write_json
from lorafit.training.distributed import started, world

RESULTS = Path(__file__).parent / "results" / "shard_memory.json"
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 8000}  # fmt: skip
WAYS = ((2, False), (2, True), (4, True))
PARTS = ("RssAnon", "RssFile")


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own (`RssAnon`), and pages of files (`RssFile`)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {part: int(lines[part].split()[0]) * 1024 for part in PARTS}


@contextmanager
def watched(found: dict[str, int], before: dict[str, int]) -> Iterator[None]:
    """Notes the largest of each part beyond `before` that is seen inside, every few milliseconds."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.003):
            for part, now in resident().items():
                found[part] = max(found.get(part, 0), now - before[part])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def make(folder: Path, shape: dict[str, int] = SHAPE) -> int:
    """A model of random weights in bfloat16 files of at most 100 MB, and a tokenizer; returns its bytes in fp32."""
    config = AutoConfig.for_model("llama", **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return 4 * sum(int(parameter.numel()) for parameter in model.parameters())


def trained(folder: str, shard: bool) -> dict[str, dict[str, int]]:
    """Load the model in `folder` and take a step of a row per process; the peaks of this process, and what is kept."""
    rows = [Example(ids=[*range(3, 67)], labels=[*range(3, 67)], source=f"row {i}") for i in range(world().size)]
    before, found = resident(), {"loading": {}, "loaded": {}, "training": {}}  # type: ignore[var-annotated]
    with watched(found["loading"], before):
        model, _ = load_model(folder, dtype="float32", device="cpu", shard=shard)
    gc.collect()
    found["loaded"] = {part: now - before[part] for part, now in resident().items()}
    add_lora(model, LoraConfig(r=8))
    with watched(found["training"], before):
        train(model, Batches(rows, len(rows)), TrainConfig(steps=1, shard=shard))
    return found


def one(rank: int, processes: int, shard: bool, folder: str, port: int, out: str) -> None:
    """`trained` in process `rank`, which writes it to `out`; before it with a tiny model, for all that is imported."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    with started(torch.device("cpu")):
        trained(f"{folder}/tiny", shard)
        write_json(Path(out) / f"{rank}.json", trained(f"{folder}/model", shard))


def measured(folder: str, processes: int, shard: bool) -> list[dict[str, dict[str, int]]]:
    """The peaks of every process."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spawn(one, (processes, shard, folder, port, out), nprocs=processes)  # type: ignore[no-untyped-call]
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "tiny", {**SHAPE, "hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 70})
        size = make(Path(folder) / "model")
        for processes, shard in WAYS:
            ways = {"processes": processes, "shard": shard, "model": size}
            found.append({**ways, "machine": machine(1), "peaks": measured(folder, processes, shard)})
            write_json(arguments.out, found)
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """The largest of all processes, in MB, as a table of Markdown."""
    lines = ["| processes | base | loading | loaded | training | pages of files |", "|---|---|---|---|---|---|"]
    for run in found:
        own = [max(peak[when]["RssAnon"] for peak in run["peaks"]) / 1e6 for when in ("loading", "loaded", "training")]
        files = max(peak["training"]["RssFile"] for peak in run["peaks"]) / 1e6
        kind = "a slice" if run["shard"] else "whole"
        lines.append(f"| {run['processes']} | {kind} | {' | '.join(f'{mb:.0f}' for mb in (*own, files))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
