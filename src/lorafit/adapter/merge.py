"""Merge an adapter into a model that is larger than memory: from its files to new ones, one tensor at a time.

The skeleton goes through the very merge that a model in memory does, without values: that gives the names, shapes and
types of what has to be written, and the configuration. The values are made when their turn comes, each by the layer
that it belongs to. What comes out is, byte for byte, what `merge_lora` and `save_pretrained` would have written.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import GenerationConfig

from lorafit.adapter.peft_format import read_for
from lorafit.adapter.shards import (
    INDEX,
    Shards,
    beyond_layers,
    find,
    load_on,
    open_shards,
    real_layer,
    ties,
    with_adapter,
)
from lorafit.errors import ModelError, NumericError
from lorafit.files import need_space, new_folder, tensor_parts, write_json, write_parts
from lorafit.lora import inject
from lorafit.lora.identity import adapter_digest
from lorafit.lora.inject import Plan, Target
from lorafit.lora.weights import write_weight

LARGEST_FILE = "50GB"  # of save_pretrained
PATTERN = "model{suffix}.safetensors"


def merge_files(
    skeleton: Any,
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    force_base: bool = False,
    beside: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Write the model in the folder `base` with the adapter in the folder `adapter` merged into it as the folder `out`.

    `skeleton` is the base without its weights, in the precision to write (`load_skeleton`); it becomes the merged
    model's. `beside` writes what else belongs into the folder. Returns the bytes of all weights. Raises NumericError,
    and writes nothing, if a sum is not finite; ModelError for a base that `reason_against` names.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if reason := reason_against(skeleton, base, adapter):
        raise ModelError(f"{base}: cannot be merged from its files: {reason}")
    with open_shards(base) as shards:
        plan, tensors = load_on(skeleton, shards, adapter, force_base)
        before = copy.deepcopy(skeleton)
        inject.execute(skeleton, plan)
        inject.absorb(skeleton, adapter_digest(tensors))
        changed = _changed(before, shards, plan, tensors)
        written = _written(before, skeleton, shards, changed)
        size = sum(like.numel() * like.dtype.itemsize for like in written.values())
        need_space(out, size)

        def value(name: str) -> Tensor:
            made = changed[name]() if name in changed else shards.read(find(before, name, shards) or name)
            return made.to(written[name].dtype)

        split = split_torch_state_dict_into_shards(written, filename_pattern=PATTERN, max_shard_size=LARGEST_FILE)
        with new_folder(out, replaces=()) as folder:
            for file, names in split.filename_to_tensors.items():
                write_parts(folder / file, tensor_parts({name: written[name] for name in names}, value))
            if split.is_sharded:
                about = {"total_parameters": skeleton.num_parameters(), **split.metadata}
                write_json(folder / INDEX, {"metadata": about, "weight_map": split.tensor_to_filename})
            _write_settings(skeleton, base, folder)
            beside(folder)
    return size


def reason_against(skeleton: Any, base: Path, adapter: Path) -> str | None:
    """Why the model in `base` has to be merged in memory, in a few words; None if its files will do."""
    if not type(skeleton).__module__.startswith("transformers."):
        return "it brings Python code of its own"
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    kept = getattr(skeleton, "_keep_in_fp32_modules_strict", None)
    if skeleton.dtype == torch.float16:
        kept = kept or getattr(skeleton, "_keep_in_fp32_modules", None)
    if kept and skeleton.dtype in (torch.float16, torch.bfloat16):
        return f"some of its weights stay in fp32 when the rest is {skeleton.dtype}"
    try:
        with open_shards(base) as shards:
            found = read_for(skeleton, adapter, force_base=True)
            if reason := beyond_layers(found):
                return reason
            plan = found.plan
            held, own, tied = shards.entries.keys(), skeleton.state_dict().keys(), ties(skeleton)
            if twice := [name for name in own & held if not held.isdisjoint(tied.get(name, ()))]:
                return f"its files hold {twice[0]} twice"
            missing = [name for name in own if name not in held and held.isdisjoint(tied.get(name, ()))]
            if missing and not held - own:
                return f"its files lack {missing[0]}"
            if renamed := [name for name in _places(skeleton, plan) if name in missing]:
                return f"its files have another name for {renamed[0]}"
    except ModelError as error:
        return str(error)
    return None


# --- what is written --------------------------------------------------------------------------------------


def _places(skeleton: nn.Module, plan: Plan) -> list[str]:
    """The names of all tensors that an adapter of `plan` changes."""
    trained = [f"{name}.{key}" for name in plan.trained for key in skeleton.get_submodule(name).state_dict()]
    return [f"{target.name}.weight" for target in plan.targets] + trained


def _changed(
    before: nn.Module, shards: Shards, plan: Plan, tensors: Mapping[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """How each tensor is made that the adapter changes."""
    make = partial(_merged, before, shards, plan, tensors)
    merged = {f"{target.name}.weight": partial(make, target) for target in plan.targets}
    trained = {name: partial(tensors.__getitem__, name) for name in _places(before, plan) if name not in merged}
    return {**merged, **trained}


@torch.no_grad()
def _merged(before: nn.Module, shards: Shards, plan: Plan, tensors: Mapping[str, Tensor], target: Target) -> Tensor:
    """The layer's new weight, laid out as the layer keeps it."""
    layer = real_layer(before, target.name, shards)
    weight = with_adapter(layer, target, plan, tensors).merged_weight()
    if not weight.isfinite().all():
        raise NumericError(f"merging would write NaN or infinity into {target.name}; nothing was written")
    write_weight(layer, weight)
    return layer.get_parameter("weight")


def _written(before: Any, merged: Any, shards: Shards, changed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names, shapes and types of the new files: the model's own tensors, tied ones once.

    And what the files hold under names that are not the model's: transformers renames or joins that when it loads.
    """
    held, own, tied = shards.entries.keys(), merged.state_dict(), ties(merged)
    kept = {
        name: like
        for name, like in own.items()
        if (name in changed or find(before, name, shards) is not None)
        and (name in held or held.isdisjoint(tied.get(name, ())))
    }
    for name in held - own.keys():
        entry = shards.entries[name][1]
        dtype = merged.dtype if entry.dtype.is_floating_point else entry.dtype
        kept[name] = torch.empty(entry.shape, dtype=dtype, device="meta")
    return {name: kept[name] for name in sorted(kept, key=_in_order)}


def _in_order(name: str) -> list[tuple[int, int | str]]:
    """Block 2 before block 10: the order in which save_pretrained deals tensors to files."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _write_settings(merged: Any, base: Path, folder: Path) -> None:
    """config.json and generation_config.json, as save_pretrained of a loaded model writes them."""
    config = merged.config
    config.dtype, config.architectures = str(merged.dtype).partition(".")[2], [type(merged).__name__]
    config.save_pretrained(folder)
    if merged.can_generate():
        if (base / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(base)
        else:
            generation = GenerationConfig.from_pretrained(base, config_file_name="config.json", _from_model_config=True)
        generation.save_pretrained(folder)
