"""Save and load adapters in PEFT's format. This is the only file that knows PEFT's words.

On disk an adapter is a folder with `adapter_model.safetensors` and `adapter_config.json`. A tensor is called
`base_model.model.` + the layer's name in the plain model + `.lora_A.weight` and so on; that prefix is all
there is to rename, since our modules have PEFT's names.

Loading trusts nothing: the tensors that the model and the configuration call for are computed first, every
difference is reported at once, and only expected tensors are ever copied, and only into A, B and the copies
trained in full.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.config import LoraConfig, Names
from lorafit.errors import AdapterError, NumericError, UsageError, listing, nearest
from lorafit.files import new_folder, write_json
from lorafit.lora import inject
from lorafit.lora.inject import Plan
from lorafit.lora.layers import VARIANTS, LoraEmbedding, TrainedCopy

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Every field PEFT 0.21 writes, with the value it has in a plain LoRA adapter.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Fields that say how an adapter was trained or where it came from: they do not change what it computes.
HISTORY = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type", "velora_config",
}  # fmt: skip
# Fields that are read below.
UNDERSTOOD = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora",
    "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weight alone; for the others PEFT changes the base when it loads a file.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


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
    tensors = adapter_tensors(model)
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise NumericError(f"NaN or infinity in {listing(bad)}; nothing was written")
    target = Path(path)
    with new_folder(target, replaces=(WEIGHTS, CONFIG, "README.md")) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, _describe(model, found.plan, base_model))
    return target


def unload_lora(model: nn.Module, path: str | Path | None = None) -> None:
    """Take the adapter out, first saving it to `path` if given; the model is as it was before it."""
    if path is not None:
        save_lora(model, path)
    inject.remove_lora(model)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under the names they have on disk."""
    tensors = {}
    for name, layer in inject.wrappers(model):
        inner = layer.trained if isinstance(layer, TrainedCopy) else layer
        for key, tensor in inner.state_dict().items():
            if not key.startswith("base_layer."):
                tensors[f"{PREFIX}{name}.{key}"] = tensor.detach().cpu().contiguous().clone()
    return tensors


def _describe(model: nn.Module, plan: Plan, base_model: str | None) -> dict[str, Any]:
    config = plan.config
    modules = inject.plain_modules(model)
    hf_config = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", None)
    causal = callable(head) and head() is not None
    names = [target.name for target in plan.targets]
    return DEFAULTS | {
        "base_model_name_or_path": base_model or getattr(hf_config, "_name_or_path", None) or None,
        "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in names),
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": list(plan.trained) or None,
        "r": config.r,
        "alpha_pattern": _pattern({t.name: _number(t.alpha) for t in plan.targets}, _number(config.alpha)),
        "rank_pattern": _pattern({t.name: t.r for t in plan.targets}, config.r),
        "target_modules": _target_modules(names, [n for n in modules if n not in plan.trained]),
        "task_type": "CAUSAL_LM" if causal else None,
        "use_dora": config.variant == "dora",
        "use_rslora": config.rslora,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _target_modules(names: list[str], modules: list[str]) -> list[str] | str:
    """The shortest list of name endings that matches exactly `names` among `modules`, by PEFT's rule."""
    chosen: set[str] = set()
    wanted = set(names)
    for name in names:
        ending = name.rsplit(".", 1)[-1]
        covered = {n for n in modules if inject.matches((ending,), n)}
        chosen.add(ending if covered <= wanted else name)
    if {n for n in modules if inject.matches(tuple(chosen), n)} != wanted:
        return "|".join(re.escape(name) for name in sorted(names))  # a full name that also ends another one
    return sorted(chosen)


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Disjoint keys for the layers whose value differs: a name ending where all layers with it agree, else
    full names.

    PEFT takes the first matching key of a file whose keys it sorts when writing; with disjoint keys any order
    is right.
    """
    by_ending: dict[str, set[float]] = {}
    for name, value in values.items():
        by_ending.setdefault(name.rsplit(".", 1)[-1], set()).add(value)
    pattern = {}
    for name, value in values.items():
        ending = name.rsplit(".", 1)[-1]
        if value != default:
            ambiguous = any(other != name and other.endswith(f".{name}") for other in values)
            full = f"^{re.escape(name)}" if ambiguous else name
            pattern[ending if len(by_ending[ending]) == 1 else full] = value
    return pattern


# --- loading --------------------------------------------------------------------------------------


def load_lora(model: nn.Module, path: str | Path, *, trainable: bool = True) -> Plan:
    """Put the adapter in the folder `path` into `model`, in place of any it carries; returns what was loaded.

    The model's function then equals PEFT's with the same file. With `trainable=False` A and B are frozen as
    well. Raises AdapterError in one line that lists every missing, unexpected, mis-shaped or non-finite
    tensor; the model is unchanged then, and the base weights are in any case.
    """
    folder = Path(path)
    tensors = _read_tensors(folder)
    raw = _read_config(folder)
    plan = _plan(model, raw, tensors, str(folder))
    _check(model, plan, tensors, str(folder))
    inject.remove_lora(model)
    with torch.random.fork_rng(devices=[]):  # the start of A and B is overwritten: leave the caller's random numbers be
        inject.execute(model, plan)
    with torch.no_grad():
        for name, layer in inject.wrappers(model):
            inner = layer.trained if isinstance(layer, TrainedCopy) else layer
            for key, value in inner.state_dict(keep_vars=True).items():
                if not key.startswith("base_layer."):
                    value.copy_(tensors[f"{name}.{key}"])
                    if isinstance(value, nn.Parameter):
                        value.requires_grad_(trainable)
    return plan


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The file's tensors under plain names: no PEFT prefix, no traces of wrappers and adapter names."""
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder}: adapter_model.bin is a pickle, which lorafit never opens: load it in PEFT and "
                "save it again with save_pretrained, which writes safetensors"
            )
        raise AdapterError(f"{folder}: no {WEIGHTS} here; give the folder that holds an adapter in PEFT's format")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = {key: _plain_key(key) for key in opened.keys()}  # noqa: SIM118
            twice = [key for key, plain in keys.items() if list(keys.values()).count(plain) > 1]
            if twice:
                raise AdapterError(f"{file}: several tensors for one place: {listing(twice)}")
            return {plain: opened.get_tensor(key) for key, plain in keys.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({str(error).splitlines()[0]})") from error


def _plain_key(key: str) -> str:
    key = key.removeprefix("module.").removeprefix(PREFIX).replace("_orig_mod.", "")
    key = re.sub(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.default\b", r".\1", key)
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", key)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{folder}: no {CONFIG} here; give the folder that holds an adapter in PEFT's format"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{file}: a JSON object is expected, not {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type is {raw.get('peft_type')!r}; lorafit opens LORA adapters only")
    for name, value in raw.items():
        if name not in DEFAULTS and value:
            raise AdapterError(
                f"{file}: unknown field {name}={value!r}{nearest(name, DEFAULTS)}; it may change the result"
            )
        if name in DEFAULTS and name not in HISTORY | UNDERSTOOD and value not in (None, False, {}, [], DEFAULTS[name]):
            raise AdapterError(
                f"{file}: {name}={value!r} is not supported; lorafit would compute something else than PEFT"
            )
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterError(
            f"{file}: init_lora_weights={raw['init_lora_weights']!r} belongs to a changed base model; "
            "convert the adapter in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return DEFAULTS | raw


def _plan(model: nn.Module, raw: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> Plan:
    """What the file asks for in this model, with PEFT's meaning of every field."""
    try:
        config = LoraConfig(
            r=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw["lora_dropout"],
            targets=_targets(raw, tensors),
            exclude=_names(raw["exclude_modules"]),
            layers=_layers(raw["layers_to_transform"]),
            variant="dora" if raw["use_dora"] else "lora",
            rslora=bool(raw["use_rslora"]),
            train_modules=_trained_names(raw["modules_to_save"] or [], model, tensors),
        )
        plan = inject.find_targets(model, config, strict=False)
        names = [target.name for target in plan.targets]
        config = replace(
            config,
            rank_pattern=_spelled_out(raw["rank_pattern"], names, raw["r"]),
            alpha_pattern=_spelled_out(raw["alpha_pattern"], names, raw["lora_alpha"]),
        )
        return inject.find_targets(model, config, strict=False)
    except (TypeError, AttributeError, UsageError, re.error) as error:
        raise AdapterError(f"{where}: {CONFIG} does not fit this model: {error}") from error


def _targets(raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> Names:
    if raw["target_modules"] is None:
        # PEFT then looks the model type up in a table; the tensors themselves know better.
        return tuple({key.split(".lora_")[0] for key in tensors if ".lora_" in key})
    return _names(raw["target_modules"])


def _names(value: Any) -> Names:
    if isinstance(value, str):
        # PEFT takes any string as a regular expression, 'q_proj' included; only 'all-linear' is a word.
        return value if value == "all-linear" else f"(?:{value})"
    return tuple(value or ())


def _layers(value: Any) -> tuple[int, ...] | None:
    return None if value in (None, []) else (value,) if isinstance(value, int) else tuple(value)


def _spelled_out(pattern: Mapping[str, Any], names: list[str], default: float) -> dict[str, Any]:
    """PEFT takes the first key that matches, in the file's order: the outcome, one full name per layer."""
    rules = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
    if not rules:
        return {}
    return {name: next((value for rule, value in rules if rule.match(name)), default) for name in names}


def _trained_names(patterns: list[str], model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """PEFT wraps all modules that end in one of the patterns; the file says which of them it holds."""
    if not isinstance(patterns, list):
        raise UsageError(f"modules_to_save is {patterns!r}, not a list of names")
    modules = inject.plain_modules(model)
    ending = [name for name in modules if any(name.endswith(pattern) for pattern in patterns)]
    held = [name for name in ending if any(f"{name}.{key}" in tensors for key in modules[name].state_dict())]
    return tuple(held or patterns)


def _check(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare what model and configuration call for with the file; raise one line with every difference."""
    modules = inject.plain_modules(model)
    expected: dict[str, tuple[int, ...]] = {}
    counters: set[str] = set()  # integer buffers of modules trained in full, such as BatchNorm's
    for target in plan.targets:
        embedding = isinstance(modules[target.name], nn.Embedding)
        kind = LoraEmbedding if embedding else VARIANTS[plan.config.variant]
        for key, shape in kind.tensor_shapes(*target.shape, target.r).items():
            expected[f"{target.name}.{key}"] = shape
    for name in plan.trained:
        for key, tensor in modules[name].state_dict().items():
            expected[f"{name}.{key}"] = tuple(tensor.shape)
            counters |= set() if tensor.is_floating_point() else {f"{name}.{key}"}
    copies = {key for key in tensors if _own_weight(key, modules, plan) is not None}
    shared = sorted(expected.keys() & tensors.keys())
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys() - copies),
        "of the wrong shape": [
            f"{key} is {tuple(tensors[key].shape)}, the model and {CONFIG} say {expected[key]}"
            for key in shared
            if tuple(tensors[key].shape) != expected[key]
        ],
        "of the wrong dtype": [
            f"{key} is {tensors[key].dtype}" for key in shared if tensors[key].is_floating_point() == (key in counters)
        ],
        "NaN or infinite": [key for key in shared if not tensors[key].float().isfinite().all()],
        "copied from another base model": [
            key for key in sorted(copies) if not _equal(_own_weight(key, modules, plan), tensors[key])
        ],
    }
    found = [f"{len(keys)} tensors {what}: {listing(keys, 4)}" for what, keys in problems.items() if keys]
    if found:
        raise AdapterError(f"{where}: does not fit this model; {'; '.join(found)}; nothing was loaded")


def _own_weight(key: str, modules: Mapping[str, nn.Module], plan: Plan) -> Tensor | None:
    """PEFT also writes the frozen matrix of an adapted embedding or head: the one that `key` repeats."""
    name, found, parameter = key.rpartition(".base_layer.")
    if not found or name not in {target.name for target in plan.targets}:
        return None
    return dict(modules[name].named_parameters()).get(parameter)


def _equal(own: Tensor | None, copied: Tensor) -> bool:
    return own is not None and own.shape == copied.shape and torch.equal(own.cpu(), copied.to(own.dtype))
