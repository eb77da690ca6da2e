"""Save and load adapters in PEFT's format.

On disk an adapter is a folder with `adapter_model.safetensors` and `adapter_config.json`. A tensor is called
`base_model.model.` + the layer's name in the plain model + `.lora_A.weight` and so on; that prefix is all
there is to rename, since our modules have PEFT's names. What we save also knows its base and its configuration.

Loading trusts nothing: the tensors that the model and the configuration call for are computed first and compared
with the header of the file; every difference is reported at once. Only then are tensors read, only expected ones,
and copied only into A, B and the modules trained in full.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafit.adapter.fingerprint import base_fingerprint, other_base
from lorafit.adapter.peft_config import CONFIG, describe, meaning, plan_for, read_config
from lorafit.adapter.untrusted import explained, parse, shown
from lorafit.adapter.weights_file import NAME, Entry, WeightsFile, open_weights
from lorafit.errors import AdapterError, NumericError, UsageError, listing
from lorafit.files import MANIFEST, damaged, new_folder, read_manifest, write_json, write_tensors
from lorafit.hub import adapter_folder
from lorafit.lora import inject
from lorafit.lora.identity import adapter_digest, merged_digests
from lorafit.lora.inits import factor_dtype
from lorafit.lora.inject import Plan
from lorafit.lora.layers import VARIANTS, LoraEmbedding
from lorafit.lora.weights import read_weight

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NOTE = "lorafit"
"""The key of what we write into the metadata of the weights: the base's fingerprint, the configuration's meaning."""


# --- saving ---------------------------------------------------------------------------------------


def save_lora(model: nn.Module, path: str | Path, base_model: str | None = None) -> Path:
    """Write the adapter that `model` carries as the folder `path`; PEFT and everything that reads its format
    opens it.

    `base_model` is the name written for whoever loads it (default: where the model came from). An existing
    adapter in `path` is replaced in one step; a folder that holds anything else is left alone. Returns the
    folder. Raises UsageError without an adapter, NumericError (and writes nothing) if it holds NaN or
    infinity.
    """
    found = inject.attached(model)
    if found is None:
        raise UsageError("there is no adapter in this model to save")
    state = inject.adapter_state(model)
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if strange := [name for name in tensors if not NAME.fullmatch(name)]:
        raise UsageError(f"a name in a file is of printable ASCII without blanks, not {listing(map(shown, strange))}")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise NumericError(f"NaN or infinity in {listing(bad)}; nothing was written")
    base = base_fingerprint(model, inject.adapted_layers(model, found.plan))
    note = json.dumps({"base": base, "config": meaning(found.plan)}, sort_keys=True, separators=(",", ":"))
    target = Path(path)
    with new_folder(target, replaces=(WEIGHTS, CONFIG, "README.md")) as folder:
        write_tensors(folder / WEIGHTS, tensors, about={NOTE: note})
        write_json(folder / CONFIG, describe(model, found.plan, base_model))
    return target


def unload_lora(model: nn.Module, path: str | Path | None = None) -> None:
    """Take the adapter out, first saving it to `path` if given; the model is as it was before it."""
    if path is not None:
        save_lora(model, path)
    inject.remove_lora(model)


# --- loading --------------------------------------------------------------------------------------


def load_lora(model: nn.Module, path: str | Path, *, trainable: bool = True, force_base: bool = False) -> Plan:
    """Put the adapter in the folder `path` into `model`, in place of any it carries; returns what was loaded.

    `path` may also be `owner/name` or `owner/name@revision` on the hub. The model's function then equals PEFT's with
    the same file. With `trainable=False` A and B are frozen as well. Raises AdapterError in one line that lists every
    missing, unexpected, mis-shaped or non-finite tensor; the model is unchanged then, and the base weights are in any
    case. So it does if the adapter was made on another base (unless `force_base`), is already merged into this one,
    or is not what was saved.
    """
    plan, tensors = _read(model, adapter_folder(path), force_base)
    inject.remove_lora(model)
    with torch.random.fork_rng(devices=[]):  # the start of A and B is overwritten: leave the caller's random numbers be
        inject.execute(model, plan)
    with torch.no_grad():
        for name, value in inject.adapter_state(model).items():
            value.copy_(tensors[name])
            if isinstance(value, nn.Parameter):
                value.requires_grad_(trainable)
    return plan


def _read(model: nn.Module, folder: Path, force_base: bool) -> tuple[Plan, dict[str, Tensor]]:
    """What to do to `model`, and with which values; AdapterError before anything is done. Changes nothing."""
    if not isfile(folder / WEIGHTS) and isfile(folder / "adapter_model.bin"):
        raise AdapterError(
            f"{folder}: adapter_model.bin is a pickle, which lorafit never opens: load it in PEFT and "
            "save it again with save_pretrained, which writes safetensors"
        )
    with open_weights(folder / WEIGHTS) as file:
        entries = _by_plain_name(file)
        plan = plan_for(model, read_config(folder), entries, folder)
        needed, copies = _needed(model, plan), _copies(model, plan)
        _check_header(needed, entries, copies, folder)
        _check_origin(model, plan, file, force_base)
        tensors = {name: file.read(entries[name]) for name in needed}
        repeated = [] if force_base else [name for name in copies if name in entries]
        problems = {
            "NaN or infinite": [name for name in needed if not _finite(tensors[name], needed[name].dtype)],
            "copied from another base model": [n for n in repeated if not _repeats(copies[n], file, entries[n])],
        }
    _raise_if_any(problems, folder)
    merged = merged_digests(model)
    if merged and adapter_digest(tensors) in merged:
        raise AdapterError(f"{folder}: already merged into this model: load it on the model it was trained on")
    return plan, tensors


def _by_plain_name(file: WeightsFile) -> dict[str, Entry]:
    """What the file holds, without PEFT's prefix and the traces of wrappers and adapter names."""
    plain = {key: _plain_key(key) for key in file.entries}
    counts = Counter(plain.values())
    if twice := [key for key, name in plain.items() if counts[name] > 1]:
        raise AdapterError(f"{file.path}: several tensors for one place: {listing(twice)}")
    return {name: file.entries[key] for key, name in plain.items()}


def _plain_key(key: str) -> str:
    key = key.removeprefix("module.").removeprefix(PREFIX).replace("_orig_mod.", "")
    key = re.sub(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.default\b", r".\1", key)
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", key)


class _Slot(NamedTuple):
    """A place for a tensor: its shape, and its type in the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def takes(self, dtype: torch.dtype) -> bool:
        """Floating-point numbers are converted; integers, such as BatchNorm's counter, have to be the same."""
        return dtype in FLOATS if self.dtype.is_floating_point else dtype == self.dtype


def _needed(model: nn.Module, plan: Plan) -> dict[str, _Slot]:
    """Every tensor that model and configuration call for, by plain name."""
    modules = inject.plain_modules(model)
    slots = {}
    for target in plan.targets:
        layer = modules[target.name]
        kind = LoraEmbedding if isinstance(layer, nn.Embedding) else VARIANTS[plan.config.variant]
        for key, shape in kind.tensor_shapes(*target.shape, target.r).items():
            slots[f"{target.name}.{key}"] = _Slot(shape, factor_dtype(read_weight(layer)))
    for name in plan.trained:
        for key, own in modules[name].state_dict().items():
            slots[f"{name}.{key}"] = _Slot(tuple(own.shape), own.dtype)
    return slots


def _copies(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The base weights that a file may repeat: PEFT also writes the frozen matrix of an adapted embedding or head."""
    layers = inject.adapted_layers(model, plan) if plan.targets else {}
    return {f"{name}.base_layer.{key}": own for name, layer in layers.items() for key, own in layer.named_parameters()}


def _check_header(
    needed: Mapping[str, _Slot], entries: Mapping[str, Entry], copies: Mapping[str, Tensor], folder: Path
) -> None:
    """Compare what is needed with what the file says it holds."""
    shared = sorted(needed.keys() & entries.keys())
    problems = {
        "missing": sorted(needed.keys() - entries.keys()),
        "unexpected": sorted(entries.keys() - needed.keys() - copies.keys()),
        "of the wrong shape": [
            f"{name} is {entries[name].shape}, the model and {CONFIG} say {needed[name].shape}"
            for name in shared
            if entries[name].shape != needed[name].shape
        ],
        "of the wrong dtype": [
            f"{name} is {entries[name].dtype}" for name in shared if not needed[name].takes(entries[name].dtype)
        ],
    }
    _raise_if_any(problems, folder)


def _check_origin(model: nn.Module, plan: Plan, file: WeightsFile, force_base: bool) -> None:
    """What only files of ours can tell: that they are what was saved, together, and on this base."""
    folder, ours = file.path.parent, NOTE in file.metadata
    broken = damaged(folder, [WEIGHTS])
    if broken and (ours or read_manifest(folder) is not None):  # else another program has a manifest.json, too
        raise AdapterError(
            f"{folder}: {'; '.join(broken)}: take the adapter from where it was saved, "
            f"or delete {MANIFEST} if it was changed on purpose"
        )
    if not ours:
        return
    with explained(file.path, f"intact: its metadata '{NOTE}' cannot be read"):
        note = parse(file.metadata[NOTE].encode())
        if not isinstance(note, dict):
            raise ValueError("no object")
        difference = other_base(note.get("base"), model, inject.adapted_layers(model, plan))
    if note.get("config") != meaning(plan):
        raise AdapterError(f"{folder}: {CONFIG} and {WEIGHTS} do not come from one save: take both from the same one")
    if difference and not force_base:
        raise AdapterError(
            f"{folder}: made on another base model ({difference}): "
            "load it on its own, or with force_base (--force-base) if you know that it fits"
        )


def _finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are numbers in the type that they will have."""
    return bool(tensor.to(dtype).isfinite().all())


def _repeats(own: Tensor, file: WeightsFile, entry: Entry) -> bool:
    """Whether the file's tensor is the model's own weight. A model without values is believed."""
    if entry.shape != tuple(own.shape):
        return False
    return own.is_meta or torch.equal(own.cpu(), file.read(entry).to(own.dtype))


def _raise_if_any(problems: Mapping[str, list[str]], folder: Path) -> None:
    """One line with every problem found."""
    found = [f"{len(names)} tensors {what}: {listing(names, 4)}" for what, names in problems.items() if names]
    if found:
        raise AdapterError(f"{folder}: does not fit this model; {'; '.join(found)}; nothing was loaded")
