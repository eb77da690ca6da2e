"""Put LoRA into a model and take it out again: plan the targets, execute, switch off, remove, merge, count.

Planning is pure: `find_targets` reads a model and a configuration and returns a `Plan` that can be printed
before anything is touched. `add_lora` executes exactly that plan.

Matching follows PEFT: 'all-linear' is every linear layer but the output head, experts and their routers among
them; a list holds names or name endings at a dot; a single string is one regular expression for the whole name.
Unlike PEFT, a name that matches nothing is an error.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorafit.config import LoraConfig
from lorafit.errors import NumericError, UsageError, listing, nearest, said_of
from lorafit.lora.experts import LoraParameter, expert_weights, held_weights, refuse_unfit
from lorafit.lora.identity import adapter_digest, note_merged
from lorafit.lora.inits import Init, Pair, find_init
from lorafit.lora.layers import VARIANTS, LoraLinear, TrainedCopy, formula
from lorafit.lora.names import as_names, block_number, collapse, key_matches, matches, no_match, resolve
from lorafit.lora.tokens import TiedHead, TokenRows, find_rows, wrap_rows
from lorafit.lora.weights import is_readable, read_weight

Wrapper = LoraLinear | TrainedCopy | TokenRows | TiedHead


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name in the model, rank, alpha, and the shape (out, in) of its weight.

    Or a weight of another module, under its full name: `parameter` is then its last part, and a stack of experts has
    the shape (experts, out, in).
    """

    name: str
    r: int
    alpha: float
    shape: tuple[int, ...]
    parameter: str | None = None

    @property
    def layer(self) -> str:
        """The module that is wrapped."""
        return self.name if self.parameter is None else self.name.removesuffix(f".{self.parameter}")


@dataclass(frozen=True)
class Plan:
    """What `add_lora` will do, or has done. `str(plan)` is what a person reads."""

    config: LoraConfig
    targets: tuple[Target, ...]
    trained: tuple[str, ...]
    unreachable: Mapping[str, int]
    trainable: int
    total: int
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.config.variant}, init {self.config.init}"]
        by_shape: dict[tuple[int, float, tuple[int, ...]], list[str]] = defaultdict(list)
        for target in self.targets:
            by_shape[target.r, target.alpha, target.shape].append(target.name)
        for (r, alpha, shape), names in by_shape.items():
            for text, count in collapse(names):
                lines.append(f"  {text}  ×{count}   {' × '.join(map(str, shape))}   r={r}, alpha={alpha:g}")
        lines += [f"  {text}  ×{count}   trained in full" for text, count in collapse(self.trained)]
        lines += [f"  {name}   {len(ids)} rows trained" for name, ids in self.tokens.items()]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(f"trained: {self.trainable:,} of {self.total:,} parameters ({share:.4f} %)")
        if self.unreachable:
            missed = sum(self.unreachable.values())
            share = 100 * missed / self.total
            lines.append(f"not reachable by LoRA, stays frozen: {missed:,} parameters ({share:.1f} %)")
            lines += [f"  {text}  ×{count}" for text, count in collapse(self.unreachable)]
        return "\n".join(lines)


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
    if config.variant not in VARIANTS:
        near = nearest(config.variant, VARIANTS)
        raise UsageError(f"unknown variant '{config.variant}'{near}; known: {', '.join(VARIANTS)}")
    find_init(config.init)
    modules = plain_modules(model)
    trained = _trained_modules(modules, config.train_modules, strict)
    # nn.MultiheadAttention multiplies with its children's weights itself: a wrapper there is never called.
    closed = (
        *trained,
        *(name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)),
    )
    inside = tuple(f"{name}." for name in closed)
    layers = {
        name: module
        for name, module in modules.items()
        if is_readable(module) and read_weight(module).ndim == 2 and not f"{name}.".startswith(inside)
    }
    held = {name: shape for name, shape in held_weights(modules).items() if not name.startswith(inside)}
    chosen = _select(model, layers, held, config, strict)
    _refuse_unfit(model, modules, [name for name in chosen if name in layers], config)
    _check_patterns(config, list(chosen), strict)
    targets = []
    for name, matrices in chosen.items():
        shape = tuple(read_weight(layers[name]).shape) if name in layers else held[name]
        r = int(resolve(config.rank_pattern, name, config.r * matrices))
        alpha = float(resolve(config.alpha_pattern, name, config.alpha * matrices))
        targets.append(Target(name, r, alpha, shape, None if name in layers else name.rpartition(".")[2]))
    _refuse_shared(model, {id(modules[target.layer]): target.layer for target in targets})
    refuse_unfit([target.name for target in targets if target.parameter], config)
    if not targets and not trained:
        raise UsageError(f"nothing to adapt: no linear layer in this {type(model).__name__} matches the configuration")
    tokens = find_rows(model, modules, (*chosen, *trained), config, strict)
    rows = sum(len(ids) * modules[name].get_parameter("weight").shape[1] for name, ids in tokens.items())
    counts = _counts(model, config, targets, trained, rows)
    unreachable = _unreachable(model, trained, {target.name for target in targets})
    return Plan(config, tuple(targets), tuple(trained), unreachable, *counts, tokens)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the root by its name in the plain model, whether it carries an adapter or not."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, Wrapper):
            inside += (f"{name}.",)
            base = module.holder if isinstance(module, LoraParameter) else module.base_layer
            modules |= {f"{name}.{child}" if child else name: m for child, m in base.named_modules()}
        else:
            modules[name] = module
    return modules


def _select(
    model: nn.Module, layers: Mapping[str, nn.Module], held: Mapping[str, Any], config: LoraConfig, strict: bool
) -> dict[str, int]:
    """What to adapt, in the model's order: names of `layers`, then of `held` weights; and how many matrices in each."""
    targets, experts = as_names(config.targets), expert_weights(plain_modules(model))
    experts = {name: count for name, count in experts.items() if name in held}
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        head = _head(model)
        chosen = {n: 1 for n, m in layers.items() if not isinstance(m, nn.Embedding) and m is not head} | experts
    else:
        chosen = {name: 1 for name in layers if matches(targets, name)}
        unmatched = [targets] if isinstance(targets, str) and not chosen else []
        if not isinstance(targets, str):
            unmatched = [entry for entry in targets if not any(matches((entry,), name) for name in layers)]
        if unmatched and (strict or not chosen):
            raise UsageError(no_match("target", unmatched, layers))
    if idle := [entry for entry in config.parameters if strict and not any(matches((entry,), name) for name in held)]:
        raise UsageError(no_match("parameter", idle, held))
    chosen |= {f"{name}.weight": 1 for name in chosen if f"{name}.weight" in experts}  # a router is more than a layer
    chosen |= {name: 1 for name in held if matches(config.parameters, name)}
    chosen = {name: count for name, count in chosen.items() if f"{name}.weight" not in chosen}
    chosen = {name: chosen[name] for name in (*layers, *held) if name in chosen}
    return _narrowed(chosen, layers, held, config, strict)


def _narrowed(
    chosen: dict[str, int], layers: Iterable[str], held: Iterable[str], config: LoraConfig, strict: bool
) -> dict[str, int]:
    """Of `chosen` what `exclude` and `layers` leave; a weight goes by the name of its module, too."""
    if exclude := as_names(config.exclude):
        known = {name: (name,) for name in layers} | {name: (name, name.rpartition(".")[0]) for name in held}
        entries = [exclude] if isinstance(exclude, str) else [(entry,) for entry in exclude]
        called = {name for names in known.values() for name in names}
        idle = [e if isinstance(e, str) else e[0] for e in entries if not any(matches(e, name) for name in called)]
        if idle and strict:
            raise UsageError(no_match("exclude", idle, known))
        chosen = {n: count for n, count in chosen.items() if not any(matches(exclude, name) for name in known[n])}
    if config.layers is not None:
        numbers = {name: block_number(name) for name in chosen}
        blocks = sorted({number for number in numbers.values() if number is not None})
        missing = sorted(set(config.layers) - set(blocks))
        if missing and strict:
            span = f"{blocks[0]} to {blocks[-1]}" if blocks else "none"
            raise UsageError(f"layers: no block {listing(map(str, missing))} to adapt; the model's blocks are {span}")
        chosen = {name: count for name, count in chosen.items() if numbers[name] in config.layers}
    return chosen


def _trained_modules(modules: Mapping[str, nn.Module], patterns: tuple[str, ...], strict: bool) -> dict[str, nn.Module]:
    found = {name: module for name, module in modules.items() if patterns and matches(patterns, name)}
    idle = [entry for entry in patterns if strict and not any(matches((entry,), name) for name in modules)]
    if idle:
        raise UsageError(no_match("train_modules", idle, modules))
    parameters = [(key, p) for name, module in found.items() for key, p in module.named_parameters(name)]
    if stored := [key for key, p in parameters if not p.is_floating_point()]:
        raise UsageError(f"train_modules: {listing(stored)} are no floating-point numbers, which cannot be trained")
    return {name: m for name, m in found.items() if not name.startswith(tuple(f"{n}." for n in found if n != name))}


def _check_patterns(config: LoraConfig, chosen: list[str], strict: bool) -> None:
    for label, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        idle = [key for key in pattern if strict and not any(key_matches(key, name) for name in chosen)]
        if idle:
            raise UsageError(no_match(label, idle, chosen))


def _head(model: nn.Module) -> nn.Module | None:
    """The output head, found by identity: models name it as they like."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if isinstance(head, Wrapper):
        head = head.base_layer
    return head if isinstance(head, nn.Module) else None


def _refuse_unfit(model: nn.Module, modules: Mapping[str, nn.Module], chosen: list[str], config: LoraConfig) -> None:
    """Refuse a formula that does not fit a layer."""
    embeddings = [name for name in chosen if isinstance(modules[name], nn.Embedding)]
    if config.variant != "lora" and embeddings:
        raise UsageError(f"variant '{config.variant}' adapts linear layers, not the embedding {listing(embeddings)}")


def _refuse_shared(model: nn.Module, first: Mapping[int, str]) -> None:
    """Refuse one layer under two names, which would work only in part."""
    for name, module in model.named_modules(remove_duplicate=False):
        other = first.get(id(module), name)
        if other != name and not name.endswith(".base_layer"):
            raise UsageError(f"{other} and {name} are one layer used twice, which a file cannot say: exclude it")


def _unreachable(model: nn.Module, trained: Iterable[str], reached: Collection[str]) -> dict[str, int]:
    """Matrices in no linear layer that are not adapted either."""
    found = {}
    inside = tuple(f"{name}." for name in trained)
    closed: tuple[str, ...] = ()
    for prefix, module in {"": model, **plain_modules(model)}.items():
        if isinstance(module, nn.MultiheadAttention):
            closed += (f"{prefix}.",)
        if is_readable(module) and not prefix.startswith(closed or ("\0",)):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.ndim >= 2 and name not in reached and not name.startswith(inside or ("\0",)):
                found[name] = parameter.numel()
    return found


def tensor_shapes(target: Target, layer: nn.Module, variant: str) -> dict[str, tuple[int, ...]]:
    """What a file holds for one target: names below its wrapper's own, and shapes."""
    kind: Any = formula(layer, variant) if target.parameter is None else LoraParameter
    shapes: dict[str, tuple[int, ...]] = kind.tensor_shapes(*target.shape, target.r)
    return shapes


def _counts(
    model: nn.Module, config: LoraConfig, targets: Iterable[Target], trained: Mapping[str, nn.Module], rows: int
) -> tuple[int, int]:
    modules = plain_modules(model)
    shapes = [tensor_shapes(target, modules[target.layer], config.variant) for target in targets]
    trainable = rows + sum(math.prod(shape) for layer in shapes for shape in layer.values())
    trainable += sum(p.numel() for module in trained.values() for p in module.parameters())
    plain = {p for m in (model, *modules.values()) for p in m.parameters(recurse=False)}
    return trainable, sum(p.numel() for p in plain) + trainable


# --- executing ------------------------------------------------------------------------------------


def add_lora(model: nn.Module, config: LoraConfig | None = None, starts: Mapping[str, Pair] | None = None) -> Plan:
    """Freeze `model` and wrap the layers that `config` names; returns the plan it executed.

    The base weights are held, not copied. A fresh adapter leaves the model's function as it was (but for the
    init 'gaussian_both'). Random numbers come from torch's global generator: seed it for a reproducible
    start. An init that looks at data has its (A, B) in `starts`: `add_lora(model, *calibrate(model, config, batches))`.
    """
    if attached(model) is not None:
        raise UsageError("this model already carries an adapter: unload_lora or merge_lora it first")
    plan = find_targets(model, config or LoraConfig())
    execute(model, plan, starts=starts)
    return plan


def execute(model: nn.Module, plan: Plan, init: Init | None = None, starts: Mapping[str, Pair] | None = None) -> None:
    """Wrap the layers of `plan` and remember how to undo it.

    `init`, if given, takes the place of the plan's; `starts` are A and B that are made already, by layer.
    """
    config = plan.config
    start, starts = init or find_init(config.init), starts or {}
    wrappers: dict[str, Wrapper] = {}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        for target in plan.targets:
            layer = wrappers.get(target.layer) or model.get_submodule(target.layer)
            kind: Callable[..., LoraLinear] = formula(layer, config.variant)
            if target.parameter is not None:
                kind = partial(LoraParameter, parameter=target.parameter)
            own = start.made(starts[target.name]) if target.name in starts else start
            with said_of(target.name):
                wrappers[target.layer] = kind(
                    layer, target.r, target.alpha, config.dropout, init=own, rslora=config.rslora
                )
        for name in plan.trained:
            wrappers[name] = TrainedCopy(model.get_submodule(name))
        wrappers |= wrap_rows(model, plan.tokens)
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
    return {name: modules[name] for name in [target.layer for target in plan.targets] or plan.trained}


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every wrapped layer with its name in the plain model; a wrapper in a wrapper is called `….base_layer`."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield name, module


def wrapper_names(plan: Plan) -> Iterator[tuple[Target, str]]:
    """Every target with the name that `wrappers` gives to the one around it."""
    around = Counter(target.layer for target in plan.targets)
    for target in plan.targets:
        around[target.layer] -= 1
        yield target, target.layer + ".base_layer" * around[target.layer]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's own parameters and buffers: the layer's name in the plain model + the tensor's in the layer."""
    state = {}
    for name, layer in wrappers(model):
        inner = layer.trained if isinstance(layer, TrainedCopy) else layer
        for key, tensor in inner.state_dict(keep_vars=True).items():
            if not key.startswith("base_layer."):
                state[f"{name}.{key}"] = tensor
    return state


def file_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter as a file holds it, by the same names; a layer with a kept start has twice the rank there."""
    return {f"{name}.{key}": tensor for name, layer in wrappers(model) for key, tensor in layer.saved().items()}


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
    for name, layer in reversed(list(wrappers(model))):  # the inner ones first
        model.set_submodule(name, layer.base_layer)
    _forget(model)


@torch.no_grad()
def merge_lora(model: nn.Module, on_note: Callable[[str], object] = warnings.warn) -> nn.Module:
    """Make W + ΔW the model's own weights, summed in fp32 and rounded once. Returns the model, which is plain again.

    All or nothing: NumericError names every layer whose sum is not finite, and nothing has been changed then.
    A tied weight (embedding and head in one) is untied first, so that the other end keeps what it had, and
    the configuration says so. It also remembers the adapter, so that `load_lora` does not put it in twice. Layers
    whose storage cannot hold the sum (8 bits) become dense, of which `on_note` hears.
    """
    found = list(wrappers(model))
    if not found:
        raise UsageError("there is no adapter to merge into this model")
    # Twice over the layers, so that a bad one is found before the first is written and no sum is ever held for more
    # than one layer.
    bad = [name for name, layer in found if not _all_finite(layer)]
    if bad:
        raise NumericError(f"merging would write NaN or infinity into {listing(bad)}; nothing was changed")
    absorb(model, adapter_digest(file_state(model)), on_note)
    return model


@torch.no_grad()
def absorb(model: nn.Module, digest: str | None, on_note: Callable[[str], object] = warnings.warn) -> None:
    """Put every merged weight into its layer, looked at by the caller, and note `digest` as what was merged."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name)
    untied, thawed = False, []
    for name, layer in reversed(list(wrappers(model))):  # the inner ones first
        if not isinstance(layer, TokenRows | TiedHead):  # which stay tied
            untied |= any(len(owners[id(parameter)]) > 1 for parameter in layer.base_layer.parameters())
        plain = layer.trained if isinstance(layer, TrainedCopy) else layer.write_merged()
        thawed += [name] if type(plain) is not type(layer.base_layer) else []
        model.set_submodule(name, plain)
    if thawed:
        said = listing(thawed[::-1])
        on_note(f"merged into what their storage held, not into the original weights, and dense now: {said}")
    if untied:
        _declare_untied(model)
    note_merged(model, digest)
    _forget(model)


def _all_finite(layer: Wrapper) -> bool:
    if isinstance(layer, LoraLinear):
        # Plain LoRA's bound spares the sum where it fits; the half leaves room for rounding.
        plain = type(layer).merged_weight is LoraLinear.merged_weight
        fits = plain and layer.bound() < torch.finfo(layer.base_weight().dtype).max / 2
        return fits or bool(layer.merged_weight().isfinite().all())
    return all(bool(tensor.isfinite().all()) for tensor in layer.saved().values())


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
