"""An adapter as it lies on disk, without the model it belongs to: read, and written through the one writer.

The tensors name the layers, the configuration gives each its scale. That is all that sums, cuts and exports need; what
only the model can tell (is this a layer of it, is it the right base?) is asked when the result is loaded.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit.adapter.fingerprint import join_fingerprints, other_bases
from lorafit.adapter.low_rank import Pair
from lorafit.adapter.peft_config import MADE_ANEW, fields, patterned, read_config, tails
from lorafit.adapter.peft_format import FLOATS, open_adapter, other_base_error, read_note, write_adapter
from lorafit.adapter.untrusted import explained, plain
from lorafit.adapter.weights_file import Entry
from lorafit.config import LoraConfig
from lorafit.errors import AdapterError, UsageError, listing
from lorafit.hub import adapter_folder
from lorafit.lora.inits import factor_dtype
from lorafit.lora.inject import Plan, Target
from lorafit.lora.layers import scale_of

FACTOR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
NAMES = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}
MAGNITUDE = "lora_magnitude_vector"
COPY = re.compile(r".+\.base_layer\.(weight|bias)")  # PEFT repeats the frozen matrix of an adapted embedding or head


@dataclass(frozen=True)
class Stored:
    """What a folder holds: ΔW of each layer as a pair with its scale folded into B, and the rest as it is.

    `alphas` are what it was saved with. `magnitudes` are DoRA's m (out,), `trained` the tensors of modules trained in
    full, `base` the fingerprint of the base model where the file knows it, `by_weight` the layers that PEFT has to know
    by their weight (`target_parameters`).
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    alphas: Mapping[str, float] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    by_weight: frozenset[str] = frozenset()


# --- reading --------------------------------------------------------------------------------------


def read_stored(path: str | Path) -> Stored:
    """Read the adapter in the folder `path`; AdapterError in one line if the files are not what they should be."""
    folder = adapter_folder(path)
    config = read_config(folder)
    if config["init_lora_weights"] in MADE_ANEW:
        raise AdapterError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} means that the base makes part of it: "
            "load it on its base and save it again"
        )
    if config["trainable_token_indices"]:
        raise AdapterError(f"{folder}: trains rows of the embedding, which are no low-rank update: merge it instead")
    by_weight = _named_by_weight(config, folder)
    with open_adapter(folder) as (file, entries):
        layers, trained = _sorted_out(entries, config, folder)
        called = {name: f"{name}.weight" for name in layers if not by_weight.isdisjoint(tails(f"{name}.weight"))}
        try:
            ranks, alphas = (
                patterned(field, config, {name: called.get(name, name) for name in layers})
                for field in ("rank_pattern", "alpha_pattern")
            )
        except UsageError as error:
            raise AdapterError(f"{folder}: {plain(error)}") from error
        wrong = [
            f"{name} has rank {a.shape[0]}, its configuration says {ranks[name]}"
            for name, (a, _) in layers.items()
            if a.shape[0] != ranks[name]
        ]
        if wrong:
            raise AdapterError(f"{folder}: weights and configuration disagree: {listing(wrong, 2)}")
        shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in layers.items()}
        note = read_note(file, _plan(config, shapes, ranks, alphas, _modules(trained, config)))
        with explained(file.path, "intact: its note about the base cannot be read"):
            joint_base([Stored(folder, config, {}, base=note.get("base"))] * 2)
        held = {name: file.read(entry) for name, entry in entries.items() if not COPY.fullmatch(name)}
    if bad := [name for name, tensor in held.items() if not tensor.isfinite().all()]:
        raise AdapterError(f"{folder}: NaN or infinity in {listing(bad)}")
    pairs = {}
    for name in layers:
        embedding = f"{name}.{NAMES[True][0]}" in held
        A, B = (held[f"{name}.{key}"] for key in NAMES[embedding])
        A, B = A.to(factor_dtype(A)), B.to(factor_dtype(B))
        pairs[name] = Pair(A, scale_of(ranks[name], alphas[name], config["use_rslora"]) * B, embedding)
    magnitudes = {name: held[f"{name}.{MAGNITUDE}"] for name in layers if config["use_dora"]}
    rest = {name: held[name] for name in trained}
    return Stored(folder, config, pairs, alphas, magnitudes, rest, note.get("base"), frozenset(called))


def _named_by_weight(config: Mapping[str, Any], folder: Path) -> set[str]:
    """The entries of target_parameters, all of them weights of linear layers; a stack of experts is refused."""
    entries = set(config["target_parameters"] or ())
    if not all(entry.split(".")[-1] == "weight" for entry in entries):
        raise AdapterError(f"{folder}: adapts stacks of experts, which have no one A and B: merge it instead")
    return entries


def _sorted_out(
    entries: Mapping[str, Entry], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, tuple[Entry, Entry]], list[str]]:
    """The two factors of each layer, and the names of what was trained in full; AdapterError if anything is odd."""
    parts: dict[str, dict[str, Entry]] = defaultdict(dict)
    trained, problems = [], []
    for name, entry in entries.items():
        found = FACTOR.fullmatch(name)
        if found and entry.dtype not in FLOATS:
            problems.append(f"{name} is {entry.dtype}")
        elif found:
            parts[found[1]][found[2]] = entry
        elif _trained_module(name, config) is not None:
            trained.append(name)
        elif not COPY.fullmatch(name):
            problems.append(f"{name} is no part of a LoRA adapter")
    layers = {}
    for layer, found_parts in parts.items():
        embedding = NAMES[True][0] in found_parts
        expected = {*NAMES[embedding], *((MAGNITUDE,) if config["use_dora"] else ())}
        if found_parts.keys() != expected:
            problems.append(f"{layer} has {', '.join(sorted(found_parts))} instead of {', '.join(sorted(expected))}")
            continue
        a, b = (found_parts[key] for key in NAMES[embedding])
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not all(a.shape + b.shape):
            problems.append(f"{layer} has factors of the shapes {a.shape} and {b.shape}")
        elif config["use_dora"] and found_parts[MAGNITUDE].shape != b.shape[:1]:
            problems.append(f"{layer} has {b.shape[0]} rows and {found_parts[MAGNITUDE].shape} magnitudes")
        layers[layer] = (a, b)
    if not layers and not trained:
        problems.append("there is no layer in it")
    if problems:
        raise AdapterError(f"{folder}: {listing(problems, 3)}")
    return layers, trained


def _trained_module(tensor: str, config: Mapping[str, Any]) -> str | None:
    """The module trained in full that a tensor belongs to: the outermost whose name ends as modules_to_save says."""
    endings = tuple(config["modules_to_save"] or ())
    owners = [owner for owner in list(_owners(tensor))[1:] if endings and owner.endswith(endings)]
    return owners[-1] if owners else None


def _owners(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`"""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _modules(tensors: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(module for name in tensors if (module := _trained_module(name, config))))


def _plan(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    trained: Sequence[str],
) -> Plan:
    """What such a configuration stands for, as far as it can be said without the model."""
    settings = LoraConfig(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        variant="dora" if config["use_dora"] else "lora",
        rslora=config["use_rslora"],
    )
    targets = tuple(Target(name, ranks[name], float(alphas[name]), shape) for name, shape in shapes.items())
    return Plan(settings, targets, tuple(trained), {}, 0, 0)


# --- writing --------------------------------------------------------------------------------------


def write_stored(path: str | Path, pairs: Mapping[str, Pair], sources: Sequence[Stored], **known: Any) -> Path:
    """Write `pairs` as the adapter folder `path`: plain LoRA of scale 1, with a rank of its own for each layer.

    What it was trained on, and which base it belongs to, is taken from `sources`; so are modules trained in full, of
    which there may be those of one source. `known` are fields of the configuration that are to be otherwise.
    """
    first = sources[0]
    config = LoraConfig(dropout=first.config["lora_dropout"])
    plan = plan_for_pairs(pairs, config, _modules(first.trained, first.config))
    kept = {name: first.config[name] for name in ("base_model_name_or_path", "revision", "task_type")}
    kept["fan_in_fan_out"] = any(source.config["fan_in_fan_out"] for source in sources)
    by_weight = [name for name in pairs if any(name in source.by_weight for source in sources)]
    kept["target_parameters"] = [f"{name}.weight" for name in by_weight] or None
    kept["target_modules"] = _target_names([name for name in pairs if name not in by_weight], sources)
    called = {name: f"{name}.weight" if name in by_weight else name for name in pairs}
    said = fields(plan, called, **{**kept, **known})
    tensors = pair_tensors(pairs) | dict(first.trained)
    base = joint_base(sources, force=True)
    return write_adapter(Path(path), tensors, plan, said, {} if base is None else {"base": base})


def plan_for_pairs(pairs: Mapping[str, Pair], config: LoraConfig, trained: Sequence[str]) -> Plan:
    """Plain LoRA with the ranks of `pairs` and scale 1."""
    usual = Counter(pair.r for pair in pairs.values()).most_common(1)[0][0] if pairs else 1
    config = replace(config, r=usual, alpha=float(usual), variant="lora", rslora=False)
    targets = tuple(Target(name, pair.r, float(pair.r), pair.shape) for name, pair in pairs.items())
    return Plan(config, targets, tuple(trained), {}, 0, 0)


def pair_tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors of `pairs` by their plain names in a file."""
    return {f"{n}.{key}": t for n, p in pairs.items() for key, t in zip(NAMES[p.embedding], (p.A, p.B), strict=True)}


def joint_base(sources: Sequence[Stored], *, force: bool = False) -> dict[str, Any] | None:
    """The fingerprint of the base that all `sources` belong to; AdapterError if two of them differ in it."""
    joint: dict[str, Any] | None = None
    for source in sources:
        if joint is None or source.base is None:
            joint = joint or source.base
            continue
        difference = other_bases(source.base, joint)
        if difference and not force:
            raise other_base_error(source.folder, difference)
        joint = joint if difference else join_fingerprints(joint, source.base)
    return joint


def _target_names(names: list[str], sources: Sequence[Stored]) -> list[str]:
    """The shortest list that is known to name exactly the layers `names`.

    Endings that `sources` used for just these layers, else full names: which other layers the model has, only the
    model knows.
    """
    used: set[str] = set()
    for source in sources:
        said = source.config
        if not isinstance(said["target_modules"], list) or said["exclude_modules"] or said["layers_to_transform"]:
            return sorted(names)
        used.update(said["target_modules"])
    covered = {layer for source in sources for layer in source.pairs.keys() - source.by_weight}
    used = {entry for entry in used if any(entry in tails(name) for name in covered)}
    if covered != set(names) or not all(used.intersection(tails(name)) for name in names):
        return sorted(names)
    return sorted(used)
