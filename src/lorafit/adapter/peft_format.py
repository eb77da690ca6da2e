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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.adapter.fingerprint import base_fingerprint, other_base
from lorafit.adapter.kept import begun, widened
from lorafit.adapter.peft_config import (
    CONFIG,
    describe,
    in_pefts_words,
    meaning,
    plan_for,
    read_config,
)
from lorafit.adapter.untrusted import explained, parse, shown
from lorafit.adapter.weights_file import NAME, Entry, WeightsFile, open_weights
from lorafit.errors import AdapterError, NumericError, UsageError, listing
from lorafit.files import MANIFEST, damaged, new_folder, read_manifest, write_json, write_tensors
from lorafit.hub import adapter_folder
from lorafit.lora import inject
from lorafit.lora.identity import adapter_digest, merged_digests
from lorafit.lora.inits import factor_dtype
from lorafit.lora.inject import Plan
from lorafit.lora.layers import LoraLinear
from lorafit.lora.tokens import KEY, ROWS, enlarge
from lorafit.lora.weights import read_weight

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
OWN = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", ROWS)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NOTE = "lorafit"
"""The key of what we write into the metadata of the weights: the base's fingerprint and the configuration's meaning.
Where a start is kept, the init too: the pairs in the file are then [A; A − A0] and [B − B0, B0], of twice the rank."""


# --- saving ---------------------------------------------------------------------------------------


def save_lora(
    model: nn.Module, path: str | Path, base_model: str | None = None, tokenizer: Any = None
) -> Path:
    """Write the adapter that `model` carries as the folder `path`; PEFT and everything that reads its format
    opens it.

    `base_model` is the name written for whoever loads it (default: where the model came from). A `tokenizer` that
    learned tokens is saved beside it; `load_model` takes it from there. An existing
    adapter in `path` is replaced in one step; a folder that holds anything else is left alone. Returns the
    folder. Raises UsageError without an adapter, NumericError (and writes nothing) if it holds NaN or
    infinity.
    """
    found = inject.attached(model)
    if found is None:
        raise UsageError("there is no adapter in this model to save")
    base = base_fingerprint(model, inject.adapted_layers(model, found.plan))
    kept = [name for name, layer in inject.wrappers(model) if isinstance(layer, LoraLinear) and layer.kept]
    plan = in_pefts_words(widened(found.plan, kept) if kept else found.plan)
    note = {"base": base} | ({"init": found.plan.config.init} if kept else {})
    said = describe(model, plan, base_model)
    return write_adapter(Path(path), inject.file_state(model), plan, said, note, tokenizer)


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    said: Mapping[str, Any],
    note: Mapping[str, Any],
    tokenizer: Any = None,
) -> Path:
    """Write an adapter folder: `tensors` by plain name, the configuration `said`, and a `note` for `read_note`."""
    named = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if strange := [name for name in named if not NAME.fullmatch(name)]:
        raise UsageError(f"a name in a file is of printable ASCII without blanks, not {listing(map(shown, strange))}")
    if bad := [name for name, tensor in named.items() if not tensor.isfinite().all()]:
        raise NumericError(f"NaN or infinity in {listing(bad)}; nothing was written")
    known = json.dumps({"config": meaning(plan)} | dict(note), sort_keys=True, separators=(",", ":"))
    with new_folder(path, replaces=(WEIGHTS, CONFIG, "README.md", *TOKENIZER)) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, named, about={NOTE: known})
        write_json(folder / CONFIG, said)
    return path


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
    folder = adapter_folder(path)
    plan, tensors, start = begun(model, *read_for(model, folder, force_base), folder)
    inject.remove_lora(model)
    if plan.tokens and enlarge(model, 1 + max(plan.config.train_tokens)):  # rows that only the adapter knows
        plan = inject.find_targets(model, plan.config, strict=False)
    with torch.random.fork_rng(devices=[]):  # the start of A and B is overwritten: leave the caller's random numbers be
        inject.execute(model, plan, start)
    for name, layer in inject.wrappers(model):
        layer.take({key: tensors[f"{name}.{key}"] for key in layer.saved()})
    for value in inject.adapter_state(model).values():
        if isinstance(value, nn.Parameter):
            value.requires_grad_(trainable)
    return plan


class InFile(NamedTuple):
    """What an adapter folder asks for: where which tensors go (by plain name), and what else it says."""

    plan: Plan
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    note: dict[str, Any]


def read_for(model: nn.Module, folder: Path, force_base: bool) -> InFile:
    """What to do to `model`, and with which values; AdapterError before anything is done. Changes nothing."""
    with open_adapter(folder) as (file, entries):
        raw = read_config(folder)
        plan = plan_for(model, raw, entries, folder)
        needed, copies = _needed(model, plan), _copies(model, plan)
        _check_header(needed, entries, copies, folder)
        note = _check_origin(model, plan, file, force_base)
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
    return InFile(plan, tensors, raw, note)


@contextmanager
def open_adapter(folder: Path) -> Iterator[tuple[WeightsFile, dict[str, Entry]]]:
    """The weights of the adapter in `folder`, header checked, and what they hold by plain name."""
    if not isfile(folder / WEIGHTS) and isfile(folder / "adapter_model.bin"):
        raise AdapterError(
            f"{folder}: adapter_model.bin is a pickle, which lorafit never opens: load it in PEFT and "
            "save it again with save_pretrained, which writes safetensors"
        )
    with open_weights(folder / WEIGHTS) as file:
        yield file, _by_plain_name(file)


def _by_plain_name(file: WeightsFile) -> dict[str, Entry]:
    """What the file holds, without PEFT's prefix and the traces of wrappers and adapter names."""
    plain = {key: _plain_key(key) for key in file.entries}
    counts = Counter(plain.values())
    if twice := [key for key, name in plain.items() if counts[name] > 1]:
        raise AdapterError(f"{file.path}: several tensors for one place: {listing(twice)}")
    return {name: file.entries[key] for key, name in plain.items()}


def _plain_key(key: str) -> str:
    key = key.removeprefix("module.").removeprefix(PREFIX).replace("_orig_mod.", "")
    key = re.sub(rf"\.({'|'.join(OWN)})\.default\b", r".\1", key)
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
    for target, wrapper in inject.wrapper_names(plan):
        layer = modules[target.layer]
        weight = read_weight(layer) if target.parameter is None else layer.get_parameter(target.parameter)
        for key, shape in inject.tensor_shapes(target, layer, plan.config.variant).items():
            slots[f"{wrapper}.{key}"] = _Slot(shape, factor_dtype(weight))
    for name, ids in plan.tokens.items():
        matrix = modules[name].get_parameter("weight")  # (vocab, dim) in both kinds of layer
        slots[f"{name}.{KEY}"] = _Slot((len(ids), matrix.shape[1]), factor_dtype(matrix))
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


def _check_origin(model: nn.Module, plan: Plan, file: WeightsFile, force_base: bool) -> dict[str, Any]:
    """What only files of ours can tell: that they are what was saved, together, and on this base. Returns the note."""
    note = read_note(file, plan)
    if force_base or "base" not in note:
        return note
    with explained(file.path, f"intact: its metadata '{NOTE}' cannot be read"):
        difference = other_base(note["base"], model, inject.adapted_layers(model, plan))
    if difference:
        raise other_base_error(file.path.parent, difference)
    return note


def other_base_error(folder: Path, difference: str) -> AdapterError:
    return AdapterError(
        f"{folder}: made on another base model ({difference}): "
        "load it on its own, or with force_base (--force-base) if you know that it fits"
    )


def read_note(file: WeightsFile, plan: Plan) -> dict[str, Any]:
    """What a file of ours says about itself, {} for others; AdapterError if it is not what was saved, and together."""
    folder, ours = file.path.parent, NOTE in file.metadata
    broken = damaged(folder, [WEIGHTS])
    if broken and (ours or read_manifest(folder) is not None):  # else another program has a manifest.json, too
        raise AdapterError(
            f"{folder}: {'; '.join(broken)}: take the adapter from where it was saved, "
            f"or delete {MANIFEST} if it was changed on purpose"
        )
    if not ours:
        return {}
    with explained(file.path, f"intact: its metadata '{NOTE}' cannot be read"):
        note = parse(file.metadata[NOTE].encode())
        if not isinstance(note, dict):
            raise ValueError("no object")
    if note.get("config") != meaning(plan):
        raise AdapterError(f"{folder}: {CONFIG} and {WEIGHTS} do not come from one save: take both from the same one")
    return note


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
