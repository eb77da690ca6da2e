"""Tiny training runs in processes of their own, for the parts that kill or stop them."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure  # noqa: F401  (imported before the forks, as torch is)
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers

from lorafit.app import cli
from lorafit.app.demo_model import cache
from lorafit.files import MANIFEST, damaged, new_folder

WORDS = ["the", "red", "blue", "cat", "dog", "sees", "likes", "big", "small", "and", "then", "runs", "away", "home"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Every knob that a resumed run could get wrong, in all.
KINDS: tuple[tuple[str, ...], ...] = (
    (),
    ("--dropout", "0.2"),
    ("--accumulate", "3", "--batch-size", "2", "--dropout", "0.1"),
    ("--no-packing", "--dropout", "0.1"),
    ("--schedule", "linear", "--eval-every", "2"),
    ("--schedule", "constant", "--warmup", "3", "--no-keep-best"),
    ("--variant", "dora", "--dropout", "0.1"),
    ("--max-tokens-per-pack", "40", "--eval-every", "3"),
    ("--train-modules", "norm", "--weight-decay", "0.1"),
    ("--dtype", "bfloat16", "--dropout", "0.1"),
    ("--patience", "2", "--lr", "0.3", "--eval-every", "1"),
    ("--rslora", "--init", "gaussian", "--max-grad-norm", "0.5"),
)


@functools.cache
def material() -> tuple[Path, Path]:
    """A tiny chat model as a folder, and a file of rows; made once for all processes, in the user's cache."""
    root = cache() / "soak"
    if not (root / MANIFEST).is_file() or damaged(root):
        with new_folder(root) as folder:
            make_material(folder)
    return root / "model", root / "rows.jsonl"


def make_material(root: Path) -> None:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(root / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    draw = random.Random(0)
    rows = [
        {key: " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for key in ("instruction", "output")}
        for _ in range(26)
    ]
    (root / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def command(kind: int, out: Path) -> list[str]:
    """The command line of a run of kind `kind`: a dozen steps, a checkpoint after most of them."""
    model, rows = material()
    line = f"train --resume --model {model} --data {rows} --out {out} --eval-rows 4 --epochs 2 --lr 0.01 --r 2"
    line += (
        f" --batch-size 4 --device cpu --dtype float32 --save-every {(0, 0, 0.02, 300)[kind // 3 % 4]} --seed {kind}"
    )
    flags = KINDS[kind % len(KINDS)]
    return [*line.split(), *flags]


@dataclass
class Child:
    """A run in a process of its own."""

    pid: int
    output: Path

    def caught(self) -> bool:
        """Whether it has set its handlers for signals."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            mask = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
            return bool(mask >> (signal.SIGTERM - 1) & 1)
        return True

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; negative: the signal that killed it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def ended(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True


def forked(arguments: list[str], output: Path, before: Callable[[], None] = lambda: None) -> Child:
    """`lorafit arguments` in a fork of this process, whose imports are made; `before` is done in it first."""
    if pid := fork():
        return Child(pid, output)
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        for _ in range(2):  # the first time after a fork torch only finds that its pool of threads is gone
            with contextlib.suppress(RuntimeError):
                torch.set_num_threads(1)
        before()
        sys.argv = ["lorafit", *arguments]
        code = cli.main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(99)


def fork() -> int:
    """os.fork. Python warns of threads: those of torch, which the child does not use."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def started(arguments: list[str], output: Path) -> Child:
    """`python -m lorafit arguments`, from its first import on.

    With one thread, as the forks have: the same bits are promised for the same number of threads.
    """
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    with output.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-m", "lorafit", *arguments], stdout=file, stderr=file, env=one)
    process.returncode = 0  # this module waits for it, not subprocess
    return Child(process.pid, output)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its adapter, how many steps it took, and in how many seconds."""

    adapter: dict[str, bytes]
    steps: int
    seconds: float


@functools.cache
def whole(kind: int) -> Whole:
    """The uninterrupted run of `kind`."""
    with tempfile.TemporaryDirectory(prefix="soak-whole-") as scratch:
        out, output, start = Path(scratch) / "run", Path(scratch) / "output", time.monotonic()
        if (code := forked(command(kind, out), output).wait()) != 0:
            raise RuntimeError(f"the uninterrupted run ended with {code}: {output.read_text()}")
        return Whole(adapter(out), steps_in(out), time.monotonic() - start)


def wait_for_a_moment(child: Child, out: Path, kind: int, draw: random.Random, longer: float) -> str:
    """Three times in ten some moment of the run (`longer` seconds are allowed for its start), else one among its steps,
    which are a small part of it. Returns how it was chosen."""
    if draw.random() < 0.3:
        seconds = draw.uniform(0, 0.8 * whole(kind).seconds + longer)
        time.sleep(seconds)
        return f"{seconds:.3f} s"
    step, more = draw.randrange(max(1, whole(kind).steps - 2)), draw.uniform(0, 0.02)
    while steps_in(out) <= step and not child.ended():
        time.sleep(0.0005)
    time.sleep(more)
    return f"step {step} + {more:.3f} s"


def steps_in(out: Path) -> int:
    """How many steps stand in the log of the run in `out`."""
    try:
        return (out / "log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def adapter(out: Path) -> dict[str, bytes]:
    """The bytes of the adapter in the folder of a run, but for the manifest, which names the versions."""
    return {path.name: path.read_bytes() for path in sorted((out / "adapter").glob("adapter_*"))}


def wrong(out: Path, kind: int) -> str | None:
    """What is not as after an uninterrupted run, if anything is."""
    if not (out / "adapter").is_dir():
        return "there is no adapter"
    if adapter(out) != whole(kind).adapter:
        return "the adapter is not the one of the uninterrupted run"
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    if steps != list(range(whole(kind).steps)):
        return f"the log has the steps {steps}"
    left = [path.name for path in out.rglob(".*") if "lorafit" in path.name]
    return f"{left} are left behind" if left else None


def until_one_lands(cut: Callable[[Path], tuple[int, str | None]], folder: Path) -> str | None:
    """`cut` cuts off the run in a folder; it returns how often it did, the run not having ended before, and what went
    wrong. A case in which the run was always quicker tries nothing: it is done again in another folder."""
    for number in range(20):
        landed, problem = cut(folder / f"run-{number}")
        if problem or landed:
            return problem
    return "the run could not be cut off once in 20 times"
