"""Put LoRA into a model and take it out again: plan the targets, execute, switch off, remove, merge, count.

Planning is pure: `find_targets` reads a model and a configuration and returns a `Plan` that can be printed
before anything is touched. `add_lora` executes exactly that plan.

Matching follows PEFT: 'all-linear' is every linear layer but the output head; a list holds names or name
endings at a dot; a single string is one regular expression for the whole name. Unlike PEFT, a name that
matches nothing is an error.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafit.config import LoraConfig, Names
from lorafit.errors import NumericError, UsageError, listing, nearest
from lorafit.lora.identity import adapter_digest, note_merged
from lorafit.lora.inits import INITS
from lorafit.lora.layers import VARIANTS, LoraEmbedding, LoraLinear, TrainedCopy
from lorafit.lora.weights import is_readable, read_weight, write_weight

Wrapper = LoraLinear | TrainedCopy


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name in the model, rank, alpha, and the shape (out, in) of its weight."""

    name: str
    r: int
    alpha: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What `add_lora` will do, or has done. `str(plan)` is what a person reads."""

    config: LoraConfig
    targets: tuple[Target, ...]
    trained: tuple[str, ...]
    unreachable: Mapping[str, int]
    trainable: int
    total: int

    def __str__(self) -> str:
        lines = [f"{self.config.variant}, init {self.config.init}"]
        by_shape: dict[tuple[int, float, tuple[int, int]], list[str]] = defaultdict(list)
        for target in self.targets:
            by_shape[target.r, target.alpha, target.shape].append(target.name)
        for (r, alpha, (out, in_)), names in by_shape.items():
            for text, count in collapse(names):
                lines.append(f"  {text}  ×{count}   {out} × {in_}   r={r}, alpha={alpha:g}")
        lines += [f"  {text}  ×{count}   trained in full" for text, count in collapse(self.trained)]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(f"trained: {self.trainable:,} of {self.total:,} parameters ({share:.4f} %)")
        if self.unreachable:
            missed = sum(self.unreachable.values())
            share = 100 * missed / self.total
            lines.append(f"not reachable by LoRA, stays frozen: {missed:,} parameters ({share:.1f} %)")
            lines += [f"  {text}  ×{count}" for text, count in collapse(self.unreachable)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, tied ones counted once."""

    trainable: int
    total: int


@dataclass(frozen=True)
class Attached:
    """What a model remembers of its adapter: the plan, and every parameter's `requires_grad` from before."""

    plan: Plan
    flags: Mapping[str, bool]


# --- planning -------------------------------------------------------------------------------------


def find_targets(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Which layers `config` adapts in `model`, with rank and alpha each. Changes nothing.

    With `strict` every name in the configuration has to match something; without, those that match nothing
    are passed over (files written for several models list names that one of them lacks). Raises UsageError
    naming every pattern that matches nothing, with the nearest names.
    """
    for label, name, known in (("variant", config.variant, VARIANTS), ("init", config.init, INITS)):
        if name not in known:
            raise UsageError(f"unknown {label} '{name}'{nearest(name, known)}; known: {', '.join(known)}")
    modules = plain_modules(model)
    trained = _trained_modules(modules, config.train_modules, strict)
    # nn.MultiheadAttention multiplies with its children's weights itself: a wrapper there is never called.
    closed = (
        *trained,
        *(name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)),
    )
    layers = {
        name: module
        for name, module in modules.items()
        if _is_layer(module) and name not in trained and not name.startswith(tuple(f"{n}." for n in closed))
    }
    chosen = _select(model, layers, config, strict)
    _refuse_unfit(model, {name: layers[name] for name in chosen}, config)
    _check_patterns(config, chosen, strict)
    targets = []
    for name in chosen:
        out, in_ = read_weight(layers[name]).shape
        r = int(_resolve(config.rank_pattern, name, config.r))
        targets.append(Target(name, r, float(_resolve(config.alpha_pattern, name, config.alpha)), (out, in_)))
    if not targets and not trained:
        raise UsageError(f"nothing to adapt: no linear layer in this {type(model).__name__} matches the configuration")
    unreachable = _unreachable(model, trained)
    return Plan(config, tuple(targets), tuple(trained), unreachable, *_counts(model, config, targets, trained))


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the root by its name in the plain model, whether it carries an adapter or not."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, Wrapper):
            inside += (f"{name}.",)
            modules |= {f"{name}.{child}" if child else name: m for child, m in module.base_layer.named_modules()}
        else:
            modules[name] = module
    return modules


def matches(pattern: Names, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for all of `name`; a list holds names or endings."""
    if isinstance(pattern, str):
        return _expression(pattern).fullmatch(name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def _as_names(pattern: Names) -> Names:
    """'q_proj' and 'q_proj,v_proj' mean name endings; only what cannot be a name is a regular expression."""
    if isinstance(pattern, str) and re.fullmatch(r"[\w.]+(,[\w.]+)*", pattern):
        return tuple(pattern.split(","))
    return pattern


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is no regular expression: {error}") from None


def _is_layer(module: nn.Module) -> bool:
    return is_readable(module) and read_weight(module).ndim == 2


def _select(model: nn.Module, layers: Mapping[str, nn.Module], config: LoraConfig, strict: bool) -> list[str]:
    """The names of the layers to adapt, in the model's order."""
    targets, exclude = _as_names(config.targets), _as_names(config.exclude)
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        head = _head(model)
        chosen = [n for n, m in layers.items() if not isinstance(m, nn.Embedding) and m is not head]
    else:
        chosen = [name for name in layers if matches(targets, name)]
        unmatched = [targets] if isinstance(targets, str) and not chosen else []
        if not isinstance(targets, str):
            unmatched = [entry for entry in targets if not any(matches((entry,), name) for name in layers)]
        if unmatched and (strict or not chosen):
            raise UsageError(_no_match("target", unmatched, layers))
    if exclude:
        kept = [name for name in chosen if not matches(exclude, name)]
        if strict:
            entries = [exclude] if isinstance(exclude, str) else [(entry,) for entry in exclude]
            idle = [e if isinstance(e, str) else e[0] for e in entries if not any(matches(e, name) for name in layers)]
            if idle:
                raise UsageError(_no_match("exclude", idle, layers))
        chosen = kept
    if config.layers is not None:
        numbers = {name: _block_number(name) for name in chosen}
        known = sorted({number for number in numbers.values() if number is not None})
        missing = sorted(set(config.layers) - set(known))
        if missing and strict:
            span = f"{known[0]} to {known[-1]}" if known else "none"
            raise UsageError(f"layers: no block {listing(map(str, missing))} to adapt; the model's blocks are {span}")
        chosen = [name for name in chosen if numbers[name] in config.layers]
    return chosen


def _trained_modules(modules: Mapping[str, nn.Module], patterns: tuple[str, ...], strict: bool) -> dict[str, nn.Module]:
    found = {name: module for name, module in modules.items() if patterns and matches(patterns, name)}
    idle = [entry for entry in patterns if strict and not any(matches((entry,), name) for name in modules)]
    if idle:
        raise UsageError(_no_match("train_modules", idle, modules))
    return {name: m for name, m in found.items() if not name.startswith(tuple(f"{n}." for n in found if n != name))}


def _check_patterns(config: LoraConfig, chosen: list[str], strict: bool) -> None:
    for label, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        idle = [key for key in pattern if strict and not any(_key_matches(key, name) for name in chosen)]
        if idle:
            raise UsageError(_no_match(label, idle, chosen))


def _resolve(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value for `name`: of all keys that match the most specific (longest) wins, in any order."""
    keys = [name] if name in pattern else [key for key in pattern if _key_matches(key, name)]
    return pattern[max(keys, key=len)] if keys else default


def _key_matches(key: str, name: str) -> bool:
    return key == name or _expression(rf"(.*\.)?({key})$").match(name) is not None


def _no_match(what: str, patterns: Iterable[str], names: Iterable[str]) -> str:
    names = list(names)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    known = [*endings, *names, "all-linear"] if what == "target" else [*endings, *names]
    patterns = list(patterns)
    wrong = listing([*(f"'{pattern}'{nearest(pattern, known)}" for pattern in patterns[:6]), *patterns[6:]])
    return f"{what} {wrong} matches no layer of the model; its layers end in {listing(endings, 12)}"


def _block_number(name: str) -> int | None:
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return None if number is None else int(number)


def _head(model: nn.Module) -> nn.Module | None:
    """The output head, found by identity: models name it as they like."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if isinstance(head, Wrapper):
        head = head.base_layer
    return head if isinstance(head, nn.Module) else None


def _refuse_unfit(model: nn.Module, chosen: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Refuse what would work only in part: one layer under two names, a formula that does not fit."""
    if config.variant != "lora":
        embeddings = [name for name, layer in chosen.items() if isinstance(layer, nn.Embedding)]
        if embeddings:
            raise UsageError(
                f"variant '{config.variant}' adapts linear layers, not the embedding {listing(embeddings)}"
            )
    first = {id(layer): name for name, layer in chosen.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        other = first.get(id(module), name)
        if other != name and not name.endswith(".base_layer"):
            raise UsageError(f"{other} and {name} are one layer used twice, which a file cannot say: exclude it")


def _unreachable(model: nn.Module, trained: Iterable[str]) -> dict[str, int]:
    """Matrices in no layer that LoRA can wrap, such as the 3-D weights of mixture-of-experts blocks."""
    found = {}
    inside = tuple(f"{name}." for name in trained)
    closed: tuple[str, ...] = ()
    for prefix, module in {"": model, **plain_modules(model)}.items():
        if isinstance(module, nn.MultiheadAttention):
            closed += (f"{prefix}.",)
        if is_readable(module) and not prefix.startswith(closed or ("\0",)):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.ndim >= 2 and not name.startswith(inside or ("\0",)):
                found[name] = parameter.numel()
    return found


def _counts(
    model: nn.Module, config: LoraConfig, targets: Iterable[Target], trained: Mapping[str, nn.Module]
) -> tuple[int, int]:
    extra = 1 if config.variant == "dora" else 0
    trainable = sum(t.r * sum(t.shape) + extra * t.shape[0] for t in targets)
    trainable += sum(p.numel() for module in trained.values() for p in module.parameters())
    plain = {p for m in (model, *plain_modules(model).values()) for p in m.parameters(recurse=False)}
    return trainable, sum(p.numel() for p in plain) + trainable


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """`layers.0.q, layers.1.q` -> [("layers.{0..1}.q", 2)]: names that differ in numbers, in one line."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        groups[".".join("#" if p.isdigit() else p for p in parts)].append(tuple(int(p) for p in parts if p.isdigit()))
    lines = []
    for shape, numbers in groups.items():
        text = shape
        for column in zip(*numbers, strict=True):
            text = text.replace("#", _span(sorted(set(column))), 1)
        lines.append((text, len(numbers)))
    return lines


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


# --- executing ------------------------------------------------------------------------------------


def add_lora(model: nn.Module, config: LoraConfig | None = None) -> Plan:
    """Freeze `model` and wrap the layers that `config` names; returns the plan it executed.

    The base weights are held, not copied. A fresh adapter leaves the model's function as it was (but for the
    init 'gaussian_both'). Random numbers come from torch's global generator: seed it for a reproducible
    start.
    """
    if attached(model) is not None:
        raise UsageError("this model already carries an adapter: unload_lora or merge_lora it first")
    plan = find_targets(model, config or LoraConfig())
    execute(model, plan)
    return plan


def execute(model: nn.Module, plan: Plan) -> None:
    """Wrap the layers of `plan` and remember how to undo it."""
    config = plan.config
    wrappers: dict[str, Wrapper] = {}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        for target in plan.targets:
            layer = model.get_submodule(target.name)
            kind = LoraEmbedding if isinstance(layer, nn.Embedding) else VARIANTS[config.variant]
            wrappers[target.name] = kind(
                layer, target.r, target.alpha, config.dropout, init=config.init, rslora=config.rslora
            )
        for name in plan.trained:
            wrappers[name] = TrainedCopy(model.get_submodule(name))
    except BaseException:
        _restore(model, flags)
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, wrapper in wrappers.items():
        wrapper.train(model.training)
        model.set_submodule(name, wrapper)
    model._lorafit = Attached(plan, flags)  # type: ignore[assignment]


def attached(model: nn.Module) -> Attached | None:
    """What `model` carries, or None for a plain model."""
    found = getattr(model, "_lorafit", None)
    return found if isinstance(found, Attached) else None


def adapted_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The base layers that an adapter of `plan` sits on, by name."""
    modules = plain_modules(model)
    return {name: modules[name] for name in [target.name for target in plan.targets] or plan.trained}


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every wrapped layer with its name in the plain model."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield name, module


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's own parameters and buffers: the layer's name in the plain model + the tensor's in the layer."""
    state = {}
    for name, layer in wrappers(model):
        inner = layer.trained if isinstance(layer, TrainedCopy) else layer
        for key, tensor in inner.state_dict(keep_vars=True).items():
            if not key.startswith("base_layer."):
                state[f"{name}.{key}"] = tensor
    return state


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the base model, bit for bit."""
    layers = [layer for _, layer in wrappers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def remove_lora(model: nn.Module) -> None:
    """Take the wrappers off: weights, names and every `requires_grad` are as before `add_lora`."""
    for name, layer in list(wrappers(model)):
        model.set_submodule(name, layer.base_layer)
    _forget(model)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Make W + ΔW the model's own weights, summed in fp32 and rounded once; the model is plain again. Returns
    it.

    All or nothing: NumericError names every layer whose sum is not finite, and nothing has been changed then.
    A tied weight (embedding and head in one) is untied first, so that the other end keeps what it had, and
    the configuration says so. It also remembers the adapter, so that `load_lora` does not put it in twice.
    """
    found = list(wrappers(model))
    if not found:
        raise UsageError("there is no adapter to merge into this model")
    # Twice over the layers, so that a bad one is found before the first is written; the sum costs r
    # multiplications per weight and is never held for more than one layer.
    bad = [name for name, layer in found if not _all_finite(layer)]
    if bad:
        raise NumericError(f"merging would write NaN or infinity into {listing(bad)}; nothing was changed")
    absorb(model, adapter_digest(adapter_state(model)))
    return model


@torch.no_grad()
def absorb(model: nn.Module, digest: str | None) -> None:
    """Put every merged weight into its layer, looked at by the caller, and note `digest` as what was merged."""
    found = list(wrappers(model))
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name)
    untied = False
    for name, layer in found:
        plain = layer.trained if isinstance(layer, TrainedCopy) else layer.base_layer
        untied |= any(len(owners[id(parameter)]) > 1 for parameter in layer.base_layer.parameters())
        if isinstance(layer, LoraLinear):
            write_weight(plain, layer.merged_weight())
        model.set_submodule(name, plain)
    if untied:
        _declare_untied(model)
    note_merged(model, digest)
    _forget(model)


def _all_finite(layer: Wrapper) -> bool:
    if isinstance(layer, LoraLinear):
        return bool(layer.merged_weight().isfinite().all())
    return all(bool(parameter.isfinite().all()) for parameter in layer.trained.parameters())


def _declare_untied(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _forget(model: nn.Module) -> None:
    """Give every parameter its `requires_grad` from before `add_lora`."""
    found = attached(model)
    if found is not None:
        _restore(model, found.flags)
        del model._lorafit


def _restore(model: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


# --- counting -------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> Counts:
    """How many parameters the model trains, and holds in all."""
    parameters = list(model.parameters())
    return Counts(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def print_trainable_parameters(model: nn.Module) -> None:
    """One line in PEFT's words: `trainable params: 16,896 || all params: 54,744 || trainable%: 30.8637`."""
    n = count_parameters(model)
    share = 100 * n.trainable / n.total
    print(f"trainable params: {n.trainable:,} || all params: {n.total:,} || trainable%: {share:.4f}")


def print_model_parameters(model: nn.Module) -> None:
    """A line per parameter: its name, shape and whether it is trained."""
    for name, parameter in model.named_parameters():
        print(f"{name:60} {tuple(parameter.shape)!s:18} requires_grad={parameter.requires_grad}")
