"""The base model and its tokenizer: from the hub, a folder, or a GGUF file.

What can be known before anything is read (a mistyped path, an adapter given as a model) is refused first;
whatever transformers refuses after that arrives as one line. A model with a weight missing is refused too:
transformers would fill it with random numbers and go on.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lorafit.adapter.fingerprint import remember_values
from lorafit.adapter.peft_config import read_config
from lorafit.adapter.peft_format import load_lora
from lorafit.errors import DiskError, ModelError, UsageError, listing, nearest
from lorafit.files import new_folder
from lorafit.hub import adapter_folder, reason
from lorafit.lora.tokens import enlarge
from lorafit.model.storage import store, stored_while_loading
from lorafit.training.sharding import check_processes
from lorafit.training.sharding import shard as shard_base

DTYPES = {str(t).partition(".")[2]: t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    storage: str = "dense",
    adapter: str | Path | None = None,
    force_base: bool = False,
    shard: bool = False,
) -> tuple[nn.Module, Any]:
    """The causal LM `name` (hub name, folder or .gguf file) ready for inference, and its tokenizer.

    `storage` "int8" keeps its linear layers in 8 bits. `adapter`, a folder or owner/name on the hub, is loaded on top
    as by `load_lora`, and its tokenizer taken if tokens were learned. `shard` deals the base out over the processes of
    torch.distributed, each of which reads its slices alone; all of them make this call.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    where, options = _source(name, revision, trust_remote_code)
    found = None if adapter is None else adapter_folder(adapter)  # before the long wait for the model
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code, adapter=found)
    if shard:
        _refuse_shard(name, options, storage)
    if "gguf_file" in options:  # left packed, its layers would be no nn.Linear
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if place.type != "cpu":  # straight from the file to the accelerator
        options["device_map"] = {"": place}
    loading = _dealt_out(place, options) if shard else stored_while_loading(storage)
    with _explained(name, "model"), loading:
        model, report = AutoModelForCausalLM.from_pretrained(
            where, dtype=precision, output_loading_info=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: {len(missing)} weights are missing from its files: {listing(missing)}")
    if shard:
        remember_values(model)
    store(model, storage)
    if found is not None:
        if _brings_tokens(found):
            enlarge(model, len(tokenizer))
        load_lora(model, found, trainable=False, force_base=force_base)
    return model.eval(), tokenizer


def _refuse_shard(name: str | Path, options: Mapping[str, Any], storage: str) -> None:
    """What the files or the storage have against being read in slices."""
    check_processes()
    if "gguf_file" in options:
        raise ModelError(f"{name}: a GGUF file is read as a whole: shard needs the model's weights in safetensors")
    if storage != "dense":
        raise UsageError(f"storage '{storage}' is made of whole layers, and shard has slices: take one or the other")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        raise ModelError(f"shard needs transformers 5.23 or newer, not {transformers.__version__}")


@contextmanager
def _dealt_out(place: torch.device, options: dict[str, Any]) -> Iterator[None]:
    """Inside the block transformers loads models that are dealt out over processes as `shard` does it.

    It asks a method of the model how it is distributed, before a value is there, and then reads of each tensor the
    slice that is asked for; renamed and joined tensors (experts) among them. Inside the block that method is ours.
    """
    from transformers.distributed import DistributedConfig

    options["distributed_config"] = DistributedConfig()
    PreTrainedModel.maybe_distribute_model = classmethod(lambda cls, model, config, mesh: shard_base(model, place))
    try:
        yield
    finally:
        del PreTrainedModel.maybe_distribute_model


def load_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
) -> Any:
    """The tokenizer alone, which reads no weights; the one beside `adapter` if that learned tokens."""
    where, options = _source(name, revision, trust_remote_code)
    found = None if adapter is None else adapter_folder(adapter)
    if found is not None and _brings_tokens(found):
        where, options = str(found), {}
    with _explained(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(where, **options)


def _brings_tokens(adapter: Path) -> bool:
    """Whether tokens were learned and the tokenizer that knows them lies beside."""
    return (adapter / "tokenizer_config.json").is_file() and bool(read_config(adapter)["trainable_token_indices"])


def save_model(model: Any, tokenizer: Any, folder: str | Path, replaces: Iterable[str] | None = None) -> None:
    """Write a plain model folder that any program which reads Hugging Face folders loads."""
    with new_folder(folder, replaces) as temporary, _quiet():
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:  # its word for what the disk refuses
            raise DiskError(f"{folder}: cannot be written: {_one_line(error)}") from error


def load_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone."""
    where, options = _source(name, revision, trust_remote_code)
    with _explained(name, "model"):
        return AutoConfig.from_pretrained(where, **options)


def load_skeleton(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    storage: str = "dense",
) -> nn.Module:
    """The model without its weights, on the meta device: for plans and counts that cost nothing."""
    precision = resolve_dtype(dtype, resolve_device(device))
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    with _explained(name, "model"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=precision, trust_remote_code=trust_remote_code
        )
    return store(model.eval(), storage)


def model_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder with the safetensors files of the model `name`, fetched from the hub if it is not one here."""
    where, options = _source(name, revision, trust_remote_code=False)
    if "gguf_file" in options:
        raise ModelError(f"{name}: a GGUF file; this needs the model's weights in safetensors")
    if Path(where).is_dir():
        return Path(where)
    with _explained(name, "files"):
        wanted = ["*.json", "model*.safetensors"]
        return Path(snapshot_download(where, revision=revision, allow_patterns=wanted))


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first accelerator, else the CPU; a device this machine lacks is refused."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' cannot be used here: {_one_line(error)}") from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where `device` computes it natively, else float32: emulated, it is slower."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _native_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPES)}: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _source(name: str | Path, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Where transformers shall look, and the keywords that say how."""
    text = str(name)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not text:
        raise UsageError("no model given: name a model on the hub, a folder, or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file, but no .gguf: give a folder with config.json, or a hub name")
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            raise ModelError(
                f"{name}: GGUF files need transformers 5.23 or newer, not {transformers.__version__}: "
                "pip install -U transformers"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_folder(path)
        return str(path), options
    if isinstance(name, Path) or text[0] in "./~" or text.count("/") > 1 or path.suffix == ".gguf":
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"no such file or folder: {name}{nearest(path.name, siblings)}")
    return text, options


def _check_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter, not a model: give its base as the model, this as the adapter")
    if packed := sorted(path.glob("*.gguf")):
        raise ModelError(f"{path} has no config.json: for a GGUF model name the file, {packed[0]}")
    raise ModelError(f"{path} has no config.json, so it is not a model folder")


@contextmanager
def _explained(name: str | Path, what: str) -> Iterator[None]:
    """Whatever transformers says goes wrong, in one line; and nothing said where nothing does."""
    try:
        with _quiet():
            yield
    except Exception as error:
        raise ModelError(f"{name}: {_reason(what, error)}") from error


def _reason(what: str, error: Exception) -> str:
    if sentence := reason(error, "model"):
        return sentence
    if "custom code" in str(error):
        return "it brings Python code of its own: read that, then load it with trust_remote_code"
    return f"its {what} cannot be loaded: {_one_line(error)}"


def _one_line(error: BaseException, limit: int = 240) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and no bar per tensor from transformers; the hub's download bars stay."""
    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda factory, args, keywords: logging.EmptyTqdm(*args))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)
