"""The verb merge: from the files to new ones, a tensor at a time; and a look at what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.app.common import OutConfig, base, make_console, need, source, with_adapter
from lorafit.config import ModelConfig, knob


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is looked at afterwards"""

    compare: bool = knob(
        True, "let the model with its adapter and the merged one answer the same prompts, if they fit into memory"
    )


def merge(model: ModelConfig, out: OutConfig, look: CompareConfig) -> None:
    """Add the adapter to the weights and save a plain model folder that needs no lorafit, nor memory for the model."""
    need("merge", model=model.model, adapter=model.adapter, out=out.out)
    from lorafit.files import check_replaceable
    from lorafit.model.load import resolve_device
    from lorafit.training.memory import free_memory

    check_replaceable(out.out, replaces=())
    console = make_console()
    size, dtype, reason = merged(model, out.out)
    if reason:
        console.print(f"merged in memory: {reason}")
    free = free_memory(resolve_device(model.device))
    if look.compare and free is not None and free < ROOM * size:
        console.print(f"not compared: the model has {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")
    elif look.compare:
        console.print(compared(model, out.out))
    console.print(f"merged model {out.out}, in {dtype} (--dtype for another precision)")


ROOM = 1.2  # times the weights, for one model at a time


def merged(model: ModelConfig, out: str) -> tuple[int, Any, str | None]:
    """Write the merged model; returns its bytes, its precision, and why it was made in memory, if it was."""
    from lorafit.adapter.merge import merge_files, reason_against
    from lorafit.files import need_space
    from lorafit.hub import adapter_folder
    from lorafit.lora.inject import merge_lora
    from lorafit.model.load import load_model, load_skeleton, load_tokenizer, model_folder, save_model
    from lorafit.model.storage import store

    adapter = adapter_folder(model.adapter or "")
    reason: str | None = "the base is a GGUF file"
    if model.storage != "dense":
        reason = f"the base is kept as {model.storage}"
    elif not model.model.endswith(".gguf"):
        folder = model_folder(model.model, revision=model.revision)
        skeleton: Any = load_skeleton(**base(model))
        reason = reason_against(skeleton, folder, adapter)
    if reason is None:
        tokenizer = load_tokenizer(**source(model))
        files: dict[str, Any] = {"force_base": model.force_base, "beside": tokenizer.save_pretrained}
        return merge_files(skeleton, folder, adapter, out, **files), skeleton.dtype, None
    net: Any
    net, tokenizer = load_model(**with_adapter(model))
    size = sum(p.numel() for p in net.parameters()) * net.dtype.itemsize
    need_space(Path(out), size)
    merge_lora(net, on_note=make_console().print)
    store(net, "dense")  # other programs read nothing else
    save_model(net, tokenizer, out, replaces=())
    return size, net.dtype, reason


def compared(model: ModelConfig, out: str) -> str:
    """A line on how far the merged model, as it was written, is from the one with its adapter."""
    from lorafit.model.compare import compare, probe
    from lorafit.model.load import load_model

    net, tokenizer = load_model(**with_adapter(model))
    before = probe(net, tokenizer)
    del net  # one model at a time
    net, _ = load_model(out, dtype=model.dtype, device=model.device)
    difference = compare(before, probe(net, tokenizer, like=before))
    return f"adapter and merged model on {len(before.rows)} prompts: {difference}"
