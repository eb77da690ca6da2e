"""adapter_config.json: what its fields mean, which values they may have, and which layers of a model they name.

The schema is closed: a field that could change the result and is not read here is refused, as is every value out of
range. Patterns that come from a file go to RE2, which is linear in the length of pattern and name; Python's `re` can be
kept busy for years by twenty characters. Whatever the patterns say ends as a list of layers with a rank and an alpha
each, and what is in the weights file has to agree with it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.adapter.patterns import BeyondRE2, first_matches
from lorafit.adapter.untrusted import explained, open_file, parse, plain, shown
from lorafit.config import LoraConfig, Names
from lorafit.errors import AdapterError, UsageError, nearest
from lorafit.lora import inject
from lorafit.lora.experts import expert_weights
from lorafit.lora.inject import Plan
from lorafit.lora.layers import VARIANTS, LoraLinear
from lorafit.lora.tokens import base_embedding, base_head
from lorafit.lora.weights import is_readable

CONFIG = "adapter_config.json"
LONGEST_FILE = 2**20
MOST_NAMES, LONGEST_NAME, LONGEST_PATTERN = 20_000, 1000, 100_000
LARGEST_NUMBER = 10**9
LARGEST_ALPHA = 65_504  # the scale has to be finite in fp16


# --- the schema -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The values that a field may have, and what they are called."""

    expected: str
    fits: Callable[[Any], bool]


def _whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= LARGEST_NUMBER


def _alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST_ALPHA


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= MOST_NAMES and all(map(fits, value))


def _map_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= MOST_NAMES
        and all(len(key) <= LONGEST_PATTERN for key in value)
        and all(map(fits, value.values()))
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


_names = _list_of(lambda value: isinstance(value, str) and 0 < len(value) <= LONGEST_NAME)

FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _text)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
WHOLE = Kind(f"a whole number from 1 to {LARGEST_NUMBER:,}", _whole)
SHARE = Kind("a number of at least 0 and below 1", lambda value: type(value) in (int, float) and 0 <= value < 1)
ALPHA = Kind(f"a number greater than 0 and at most {LARGEST_ALPHA:,}", _alpha)
NAMES = Kind(f"a list of at most {MOST_NAMES:,} names", _names)
PATTERN = Kind(f"a pattern or a list of at most {MOST_NAMES:,} names", lambda value: _text(value) or _names(value))
BLOCKS = Kind(
    "a block number or a list of them", lambda value: _whole(value, 0) or _list_of(lambda n: _whole(n, 0))(value)
)
TOKENS = Kind(
    "a list of token ids, or an object of such lists",
    lambda value: _list_of(lambda n: _whole(n, 0))(value) or _map_to(_list_of(lambda n: _whole(n, 0)))(value),
)
INIT = Kind("true, false or the name of an initialisation", lambda value: isinstance(value, bool) or _text(value))
RANKS = Kind(f"an object of whole numbers from 1 to {LARGEST_NUMBER:,}", _map_to(_whole))
ALPHAS = Kind(f"an object of numbers greater than 0 and at most {LARGEST_ALPHA:,}", _map_to(_alpha))

# Every field PEFT 0.21 writes, with the value it has in a plain LoRA adapter; null is that value, too, but for NEEDED.
# These are read:
READ: dict[str, tuple[Any, Kind]] = {
    "alpha_pattern": ({}, ALPHAS),
    "exclude_modules": (None, PATTERN),
    "init_lora_weights": (True, INIT),
    "layers_pattern": (None, PATTERN),
    "layers_to_transform": (None, BLOCKS),
    "lora_alpha": (8, ALPHA),
    "modules_to_save": (None, NAMES),
    "peft_type": ("LORA", TEXT),
    "r": (8, WHOLE),
    "rank_pattern": ({}, RANKS),
    "target_modules": (None, PATTERN),
    "trainable_token_indices": (None, TOKENS),
    "target_parameters": (None, NAMES),
    "use_dora": (False, FLAG),
    "use_rslora": (False, FLAG),
}
NEEDED = ("lora_alpha", "peft_type", "r")
# These say how an adapter was trained or where it came from; they do not change what it computes:
HISTORY: dict[str, tuple[Any, Kind]] = {
    "auto_mapping": (None, OBJECT),
    "base_model_name_or_path": (None, TEXT),
    "corda_config": (None, OBJECT),
    "ensure_weight_tying": (False, FLAG),
    "eva_config": (None, OBJECT),
    "fan_in_fan_out": (False, FLAG),
    "inference_mode": (True, FLAG),
    "loftq_config": ({}, OBJECT),
    "lora_dropout": (0.0, SHARE),
    "lora_ga_config": (None, OBJECT),
    "megatron_core": ("megatron.core", TEXT),
    "peft_version": (None, TEXT),
    "qalora_group_size": (16, WHOLE),
    "revision": (None, TEXT),
    "task_type": (None, TEXT),
    "velora_config": (None, OBJECT),
}
# These would change what an adapter computes in a way that is not built here; only this value, or nothing, is accepted:
UNSUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
KINDS = {name: kind for name, (_, kind) in (READ | HISTORY).items()}
DEFAULTS: dict[str, Any] = {name: default for name, (default, _) in (READ | HISTORY).items()} | UNSUPPORTED
# Initialisations that leave the base weight alone; for the others PEFT changes the base when it loads a file. It makes
# these anew from the base, which gives the same change again; those that draw random numbers or look at data do not.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MADE_ANEW = ("pissa", "olora")


# --- reading --------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Every field of the configuration in `folder`, checked; AdapterError in one line for the first that is wrong."""
    raw = read_raw(folder)
    for name, value in raw.items():
        if problem := _problem(name, value):
            raise AdapterError(f"{folder / CONFIG}: {problem}")
    return DEFAULTS | {name: value for name, value in raw.items() if value is not None}


def read_raw(folder: Path) -> dict[str, Any]:
    """The fields that the file states, as they stand there; AdapterError if they are not those of a LoRA adapter."""
    file = folder / CONFIG
    with open_file(file) as handle, explained(file, "readable as JSON"):
        text = handle.read(LONGEST_FILE + 1)
        if len(text) > LONGEST_FILE:
            raise ValueError(f"it is longer than {LONGEST_FILE:,} bytes")
        raw = parse(text)
    if not isinstance(raw, dict):
        raise AdapterError(f"{file}: a JSON object is expected, not {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        mlx = "an adapter for mlx-lm, which alone reads it" if "fine_tune_type" in raw else ""
        kind = f"peft_type is {shown(raw.get('peft_type'))}"
        raise AdapterError(f"{file}: {mlx or kind}; lorafit opens LORA adapters only")
    return raw


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with one field of the file, or None."""
    said = f"{plain(name, 80)}={shown(value)}"
    if name not in DEFAULTS:
        return f"unknown field {said}{nearest(name[:80], DEFAULTS)}; it may change the result" if value else None
    if name in UNSUPPORTED:
        refused = value and value != UNSUPPORTED[name]
        return f"{said} is not supported; lorafit would compute something else than PEFT" if refused else None
    if not KINDS[name].fits(value) and (value is not None or name in NEEDED):
        return f"{said}: {KINDS[name].expected} is expected"
    if name == "init_lora_weights" and value not in PLAIN_INITS + MADE_ANEW:
        return (
            f"{said} belongs to a changed base model; "
            "convert the adapter in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return None


# --- writing --------------------------------------------------------------------------------------


def describe(model: nn.Module, plan: Plan, base_model: str | None) -> dict[str, Any]:
    """The fields that say in PEFT's words what `plan` did to `model`."""
    modules = inject.plain_modules(model)
    hf_config = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", None)
    causal = callable(head) and head() is not None
    key = _keys(plan, modules)
    names = [name for name, said in key.items() if said == name and name in modules]
    weights = [said for said in key.values() if said not in names]
    return fields(
        plan,
        key,
        base_model_name_or_path=base_model or getattr(hf_config, "_name_or_path", None) or None,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),
        target_modules=endings_or_regex(names, [n for n in modules if n not in plan.trained]),
        target_parameters=_endings(weights, _parameter_names(modules)) or None,
        task_type="CAUSAL_LM" if causal else None,
        trainable_token_indices=_token_field(model, plan, modules),
    )


def fields(plan: Plan, called: Mapping[str, str] | None = None, **known: Any) -> dict[str, Any]:
    """Every field for `plan`; `known` are those that only the model, or the file that it was read from, can tell.

    `called` is what PEFT has to call the targets, where that is not their name.
    """
    config = plan.config
    key = called or {target.name: target.name for target in plan.targets}
    said = DEFAULTS | {
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": list(plan.trained) or None,
        "r": int(config.r),
        "alpha_pattern": _disjoint({key[t.name]: _number(t.alpha) for t in plan.targets}, _number(config.alpha)),
        "rank_pattern": _disjoint({key[t.name]: t.r for t in plan.targets}, config.r),
        "use_dora": config.variant == "dora",
        "use_rslora": bool(config.rslora),
        **known,
    }
    if problem := next(filter(None, (_problem(*field) for field in said.items())), None):
        raise UsageError(f"this adapter cannot be saved in PEFT's format: {problem}")
    return said


def in_pefts_words(plan: Plan) -> Plan:
    """`plan` with the formula that PEFT has for it; UsageError if it has none.

    Whatever a formula does to A and B, as long as it ends in W + s·B'·A' the pair B', A' is plain LoRA in a file.
    """
    kind = VARIANTS[plan.config.variant]
    if plan.config.variant == "dora":
        return plan
    if kind.merged_weight is not LoraLinear.merged_weight:
        raise UsageError(
            f"variant '{plan.config.variant}' is not W + s·B·A: PEFT's format has no words for it; merge it instead"
        )
    return replace(plan, config=replace(plan.config, variant="lora"))
# In a model with stacks of experts PEFT 0.21 takes these for the experts of older checkpoints, wherever they are.
OLD_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _keys(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """What PEFT has to call the targets: a layer by its weight where it would take the name for another's."""
    plain_lora = plan.config.variant == "lora" and not plan.config.dropout
    mistaken = {n for n in modules if _last(n) in OLD_EXPERTS} if plain_lora and expert_weights(modules) else set()
    return {t.name: f"{t.name}.weight" if t.name in mistaken else t.name for t in plan.targets}


def meaning(plan: Plan) -> str:
    """sha256 of all that a configuration decides: the layers with their ranks and alphas, and the formula.

    Two files that say one thing in different words have one meaning.
    """
    said = {
        "layers": sorted((target.name, target.r, target.alpha) for target in plan.targets),
        "trained": sorted(plan.trained),
        "variant": plan.config.variant,
        "rslora": plan.config.rslora,
    } | ({"tokens": {name: list(ids) for name, ids in plan.tokens.items()}} if plan.tokens else {})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _token_field(model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]) -> Any:
    """A list means the embedding, and a head that is tied to it; anything else is said by layer."""
    embedding = base_embedding(model)
    if [modules[name] for name in plan.tokens] == [embedding]:
        return list(plan.config.train_tokens)
    return {name: list(ids) for name, ids in plan.tokens.items()} or None


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def endings_or_regex(names: Collection[str], modules: Iterable[str]) -> list[str] | str:
    """The shortest list of name endings that matches exactly `names` among `modules`, by PEFT's rule."""
    others = set(modules) - set(names)
    shared = {_last(name) for name in others}
    chosen = {name if _last(name) in shared else _last(name) for name in names}
    if any(not chosen.isdisjoint(tails(name)) for name in others):
        return "|".join(re.escape(name) for name in sorted(names))  # a full name that also ends another one
    return sorted(chosen)


def _endings(names: Collection[str], known: Iterable[str]) -> list[str]:
    """A short list of name endings that matches exactly `names` among `known`; PEFT has no patterns for these."""
    others = {tail for name in set(known) - set(names) for tail in tails(name)}
    shortest = [next((tail for tail in reversed([*tails(name)]) if tail not in others), name) for name in names]
    return sorted(set(shortest))


def _disjoint(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Disjoint keys for the layers whose value differs: a name ending where all layers with it agree, else
    full names.

    PEFT takes the first matching key of a file whose keys it sorts when writing; with disjoint keys any order
    is right.
    """
    by_ending: dict[str, set[float]] = {}
    for name, value in values.items():
        by_ending.setdefault(_last(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != default:
            ambiguous = any(other != name and other.endswith(f".{name}") for other in values)
            full = f"^{re.escape(name)}" if ambiguous else name
            pattern[_last(name) if len(by_ending[_last(name)]) == 1 else full] = value
    return pattern


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def tails(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`"""
    yield name
    while "." in name:
        name = name.split(".", 1)[1]
        yield name


# --- from the file to a plan ----------------------------------------------------------------------


def plan_for(model: nn.Module, raw: Mapping[str, Any], tensors: Collection[str], where: Path) -> Plan:
    """What the configuration asks for in `model`, with PEFT's meaning of every field.

    `tensors` are the plain names in the weights file.
    """
    modules = inject.plain_modules(model)
    layers = raw["layers_to_transform"]
    entries = set(raw["target_parameters"] or [])
    weights = [name for name in _parameter_names(modules) if not entries.isdisjoint(tails(name))]
    # The weight of a linear layer is that layer.
    key = {n.removesuffix(".weight"): n for n in weights if is_readable(modules[n.rpartition(".")[0]])}
    try:
        config = LoraConfig(
            r=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw["lora_dropout"],
            targets=_targets(raw["target_modules"], modules, tensors, key),
            parameters=tuple(name for name in weights if name not in key.values()),
            exclude=_exactly(_named("exclude_modules", raw["exclude_modules"] or [], modules), modules),
            layers=None if layers in (None, []) else tuple(layers) if isinstance(layers, list) else (layers,),
            variant="dora" if raw["use_dora"] else "lora",
            rslora=raw["use_rslora"],
            train_modules=_trained(raw["modules_to_save"] or [], modules, tensors),
            **_tokens(model, raw["trainable_token_indices"], modules),
        )
        found = inject.find_targets(model, config, strict=False).targets
        names = {target.name: key.get(target.name, target.name) for target in found}
        config = replace(
            config,
            rank_pattern=_spelled_out("rank_pattern", raw["rank_pattern"], names, raw["r"]),
            alpha_pattern=_spelled_out("alpha_pattern", raw["alpha_pattern"], names, raw["lora_alpha"]),
        )
        return inject.find_targets(model, config, strict=False)
    except UsageError as error:
        raise AdapterError(f"{where}: {CONFIG} does not fit this model: {plain(error)}") from error


def _targets(
    value: str | list[str] | None, modules: Collection[str], tensors: Collection[str], more: Iterable[str]
) -> Names:
    """The layers that `target_modules` names, and `more`."""
    if isinstance(value, str) and value.lower() == "all-linear":
        return value
    if value is not None:
        with suppress(BeyondRE2):
            found = _named("target_modules", value, modules)
            if value and not found:
                raise UsageError(f"target_modules={shown(value)} names no layer of it")
            return _exactly([*found, *more], modules)
    # For None PEFT looks in a table of model types; the tensors themselves know better. They also know what a pattern
    # stands for that RE2 cannot take.
    held = dict.fromkeys(key.split(".lora_")[0] for key in tensors if ".lora_" in key)
    return _exactly([name for name in held if name in modules], modules)


def _parameter_names(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for module, found in modules.items() for name, _ in found.named_parameters(module, recurse=False)]


def _named(field: str, value: str | list[str], modules: Iterable[str]) -> list[str]:
    """The modules that a pattern or a list in a file names. PEFT takes any text as a pattern, 'q_proj' included."""
    if isinstance(value, str):
        return list(first_matches(field, [value], modules))
    entries = set(value)
    return [name for name in modules if not entries.isdisjoint(tails(name))]


def _exactly(names: Collection[str], modules: Iterable[str]) -> Names:
    """`names` and no other of `modules`, in the words of LoraConfig; nothing in them is a pattern from a file."""
    said = endings_or_regex(names, modules)
    return f"(?:{said})" if isinstance(said, str) else tuple(said)


def _trained(endings: list[str], modules: Mapping[str, nn.Module], tensors: Collection[str]) -> tuple[str, ...]:
    """PEFT wraps all modules that end in one of the names; the file says which of them it holds."""
    ending = [name for name in modules if name.endswith(tuple(endings))]
    held = [name for name in ending if any(f"{name}.{key}" in tensors for key in modules[name].state_dict())]
    return tuple(held or ending)


def _tokens(model: nn.Module, value: Any, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The fields of LoraConfig that say which rows are trained, and in which layers."""
    if not value:
        return {}
    embedding, head = base_embedding(model), base_head(model)
    if isinstance(value, list):
        ids, found = value, [name for name, module in modules.items() if module is embedding]
    else:
        ids = next(iter(value.values()))
        ending = [name for name in modules if name.endswith(tuple(value)) and modules[name] in (embedding, head)]
        found = ending if all(other == ids for other in value.values()) else []
    if not found:
        raise UsageError(f"trainable_token_indices={shown(value)}: the same tokens of embedding and head are expected")
    return {"train_tokens": tuple(ids), "token_layers": tuple(found)}


def patterned(field: str, raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The rank or alpha of layers, by rank_pattern or alpha_pattern; `names` gives for each what PEFT matches."""
    default = raw["r" if field == "rank_pattern" else "lora_alpha"]
    return dict.fromkeys(names, default) | _spelled_out(field, raw[field], names, default)


def _spelled_out(field: str, pattern: Mapping[str, Any], names: Mapping[str, str], default: float) -> dict[str, Any]:
    """PEFT takes the first key that matches, in the file's order: the outcome, one full name per layer.

    `names` gives for our name the one that PEFT matches.
    """
    if not pattern:
        return {}
    values = list(pattern.values())
    first = first_matches(field, list(pattern), names.values(), r"(.*\.)?(KEY)$")
    return {name: values[first[said]] if said in first else default for name, said in names.items()}
