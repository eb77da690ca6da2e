"""The weights of a model folder, read one tensor at a time: for work on models that are larger than memory.

A skeleton (the model on the meta device) knows what its layers are; `real_layer` gives one of them its values, and
`with_adapter` puts an adapter's values on that one layer, so that every formula is the one in `layers.py`.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.adapter.fingerprint import other_base
from lorafit.adapter.peft_config import MADE_ANEW
from lorafit.adapter.peft_format import InFile, open_adapter, other_base_error, read_for
from lorafit.adapter.untrusted import explained, open_file, parse
from lorafit.adapter.weights_file import Entry, WeightsFile, open_weights
from lorafit.errors import AdapterError, ModelError, listing
from lorafit.lora.inject import Plan, Target
from lorafit.lora.layers import VARIANTS, LoraEmbedding, LoraLinear

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Shards:
    """The tensors of a model's files by name; `read` gives the values of one."""

    folder: Path
    entries: Mapping[str, tuple[WeightsFile, Entry]]

    def read(self, name: str) -> Tensor:
        file, entry = self.entries[name]
        return file.read(entry)


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`; ModelError if it has none, or not all of them."""
    index = folder / INDEX
    names = {SINGLE}
    if index.is_file():
        with _of_a_model(index), open_file(index) as file, explained(index, "a readable index of shards"):
            listed = parse(file.read())
            names = set(listed["weight_map"].values()) if isinstance(listed, dict) else set()
            if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("its weight_map is none")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ModelError(f"{folder}: no {listing(missing)} here, which this needs: weights in safetensors")
    return [folder / name for name in sorted(names)]


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """All weights of the model in `folder`, none of them read yet."""
    with ExitStack() as stack:
        entries: dict[str, tuple[WeightsFile, Entry]] = {}
        for path in shard_files(folder):
            with _of_a_model(path):
                file = stack.enter_context(open_weights(path))
            entries |= {name: (file, entry) for name, entry in file.entries.items()}
        yield Shards(folder, entries)


def real_layer(skeleton: nn.Module, name: str, shards: Shards, dtype: torch.dtype | None = None) -> nn.Module:
    """The layer `name` of `skeleton` with its values from `shards`, in `dtype` or that of the skeleton."""
    layer = copy.deepcopy(skeleton.get_submodule(name))
    values = {}
    for key, own in layer.state_dict().items():
        place = find(skeleton, f"{name}.{key}", shards)
        if place is None:
            raise ModelError(f"{shards.folder}: its files hold no {name}.{key}")
        value = shards.read(place)
        if value.shape != own.shape or not value.is_floating_point():
            raise ModelError(
                f"{shards.folder}: {place} is {value.dtype} {tuple(value.shape)}; {tuple(own.shape)} in a plain "
                "floating-point type is needed"
            )
        values[key] = value.to(dtype or own.dtype)
    layer.load_state_dict(values, assign=True)
    return layer.requires_grad_(False)


def find(skeleton: nn.Module, name: str, shards: Shards) -> str | None:
    """Under which name the files hold a tensor of the model: its own, without the outer prefix, or that of a twin."""
    prefix = getattr(skeleton, "base_model_prefix", "")
    for known in (name, name.removeprefix(f"{prefix}.")):
        if known in shards.entries:
            return known
    return next((twin for twin in ties(skeleton).get(name, ()) if twin in shards.entries), None)


def ties(model: nn.Module) -> dict[str, list[str]]:
    """For every name of a tied parameter its other names."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = [names for names in owners.values() if len(names) > 1]
    return {name: [other for other in names if other != name] for names in tied for name in names}


def with_adapter(layer: nn.Module, target: Target, plan: Plan, tensors: Mapping[str, Tensor]) -> LoraLinear:
    """`layer` wrapped as `plan` says, with the adapter's values `tensors` (by plain name)."""
    kind = LoraEmbedding if isinstance(layer, nn.Embedding) else VARIANTS[plan.config.variant]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        made = kind(layer, target.r, target.alpha, rslora=plan.config.rslora)
        for key, value in made.state_dict(keep_vars=True).items():
            if not key.startswith("base_layer."):
                value.copy_(tensors[f"{target.name}.{key}"])
    return made


def load_on(skeleton: nn.Module, shards: Shards, adapter: Path, force_base: bool) -> tuple[Plan, dict[str, Tensor]]:
    """What `load_lora` would put into the model, and where, refused for all that it refuses."""
    plan, tensors, _, note = found = read_for(skeleton, adapter, force_base)
    if reason := beyond_layers(found):
        raise AdapterError(f"{adapter}: {reason}")
    if force_base:
        return plan, tensors
    with open_adapter(adapter) as (file, entries):
        base = note.get("base")
        known = base["values"] if base else {}
        layers = {
            target.name: real_layer(skeleton, target.name, shards)
            for target in plan.targets
            if f"{target.name}.weight" in known or f"{target.name}.base_layer.weight" in entries
        }
        if base and (difference := other_base(base, skeleton, layers)):
            raise other_base_error(adapter, difference)
        for name, layer in layers.items():
            for key, own in layer.named_parameters():
                copied = entries.get(f"{name}.base_layer.{key}")
                if copied and not torch.equal(file.read(copied).to(own.dtype), own):
                    raise other_base_error(adapter, f"it repeats {name}.{key} with other values")
    return plan, tensors


def beyond_layers(found: InFile) -> str | None:
    """Why an adapter cannot be worked with one layer at a time, in a few words; None if it can."""
    if found.config["init_lora_weights"] in MADE_ANEW:
        return f"init_lora_weights={found.config['init_lora_weights']!r} means that the whole base makes part of it"
    if any(target.parameter for target in found.plan.targets):
        return "it adapts stacks of experts"
    return "it trains rows of the embedding" if found.plan.tokens else None


@contextmanager
def _of_a_model(path: Path) -> Iterator[None]:
    """What readers of adapter files refuse is here something about a model."""
    try:
        yield
    except AdapterError as error:
        raise ModelError(str(error)) from error
