"""The tiny model on which adapters from strangers are tried, and what a load may cost and change."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit import LoraConfig, add_lora, load_lora, save_lora, unload_lora
from lorafit.adapter.peft_config import meaning
from lorafit.errors import LorafitError
from lorafit.lora import inject

TOKENS = torch.arange(1, 25).view(2, 12)
CPU_SECONDS, MEMORY = 2.0, 512 * 2**20
Files = dict[str, bytes]


class Forever(BaseException):
    """A load that did not come to an end; nothing that catches exceptions on the way takes it for one of its own."""


# --- what a case may cost --------------------------------------------------------------------------


@contextmanager
def limited() -> Iterator[None]:
    """Half a gigabyte more than now, ten seconds of work, a minute of waiting: beyond that an exception."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise Forever

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, expired) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    signal.setitimer(signal.ITIMER_PROF, 10)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- the model and its adapters --------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """An adapter folder as it was written, and what it does to the model."""

    files: Files
    meaning: str
    state: dict[str, Tensor]
    logits: Tensor


@cache
def base() -> Any:
    """One tiny model, of which no load may change a byte."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def fingerprint(model: Any) -> str:
    """Every byte and flag of the model, the adapter that it carries included."""
    found = sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(f"{name} {tensor.requires_grad} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in inject.adapter_state(model).items()}


def shaken(model: Any, seed: int) -> None:
    """Values as after training."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in inject.adapter_state(model).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


def saved(seed: int, config: LoraConfig) -> Saved:
    """An adapter of ours on the tiny model."""
    model = base()
    unload_lora(model)
    plan = add_lora(model, config)
    shaken(model, seed)
    with TemporaryDirectory() as folder:
        path = save_lora(model, Path(folder) / "adapter")
        files = {file.name: file.read_bytes() for file in path.iterdir()}
    found = Saved(files, meaning(plan), state_of(model), logits(model))
    unload_lora(model)
    return found


@cache
def ours() -> dict[str, Saved]:
    """Two adapters of one configuration, one of the same shapes and another scale, and one that the model carries."""
    one = LoraConfig(r=2, alpha=4, targets=("q_proj", "down_proj"), train_modules=("model.norm",))
    other = replace(one, alpha=6, rslora=True)
    carried = LoraConfig(r=1, targets=("k_proj", "lm_head"))
    return {"a": saved(1, one), "b": saved(2, one), "c": saved(3, other), "carried": saved(4, carried)}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def carrying(folder: Path) -> Any:
    """The model with the adapter that it has before every case."""
    model, carried = base(), ours()["carried"]
    found = inject.attached(model)
    if found is None or meaning(found.plan) != carried.meaning:
        load_lora(model, write(folder / "carried", carried.files))
    return model


def loaded(folder: Path, scratch: Path) -> tuple[str, Any]:
    """Load `folder` and see what became of the model: what went wrong ("" for nothing), and the model if it loaded."""
    model = carrying(scratch)
    before, plan, began = fingerprint(model), inject.attached(model), time.process_time()
    refused = False
    try:
        with limited():
            load_lora(model, folder)
    except LorafitError as error:
        refused = True
        if not str(error).isprintable() or len(str(error)) > 2000:
            return f"the message is no line: {str(error)[:300]!r}", None
    except (Exception, Forever) as error:
        return f"{type(error).__name__}: {str(error)[:300]}", None
    if time.process_time() - began > CPU_SECONDS:
        return f"it took {time.process_time() - began:.1f} s", None
    if refused:
        same = fingerprint(model) == before and inject.attached(model) is plan
        return "" if same else "a refused adapter has changed the model", None
    if base_weights(model) != _plain_base():
        return "a base weight has changed", None
    return "", model


def base_weights(model: Any) -> dict[str, str]:
    """The hash of each base weight, by its name in the plain model."""
    own = {id(tensor) for tensor in inject.adapter_state(model).values()}
    return {
        name.replace(".base_layer.", "."): sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if id(tensor) not in own
    }


@cache
def _plain_base() -> dict[str, str]:
    return base_weights(base.__wrapped__())  # of the same model, made once more


def differs(model: Any, expected: Saved) -> str:
    """How the loaded adapter differs from the one that was saved; "" if in nothing."""
    found, state = inject.attached(model), inject.adapter_state(model)
    if found is None or meaning(found.plan) != expected.meaning:
        return "another adapter than was saved: other layers, ranks or scales"
    if state.keys() != expected.state.keys() or any(not torch.equal(state[n], expected.state[n]) for n in state):
        return "another adapter than was saved: other values"
    return "" if torch.equal(logits(model), expected.logits) else "other logits than the saved adapter's"
