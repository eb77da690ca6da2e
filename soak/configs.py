"""Configurations from strangers: mutated adapter_config.json of ours and of PEFT's; each means what it says, or is one
line."""

import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from peft.utils.other import get_pattern_key

from lorafit import LoraConfig, unload_lora
from lorafit.adapter.peft_config import CONFIG, DEFAULTS, READ
from lorafit.adapter.peft_format import WEIGHTS
from lorafit.lora import inject
from lorafit.lora.layers import LoraLinear
from soak.adapters import unlike_the_file
from soak.headers import BYTE_EDITS, flip
from soak.hostile import Files, Saved, base, differs, loaded, logits, saved, write

NAME = "configs"
WHAT = "a mutated adapter_config.json means what it says or is refused in one line; ours never means something else"
COUNT = 20_000
LONG = 1_000_000


@cache
def by_lorafit() -> tuple[Saved, ...]:
    """Adapters of ours that use every field we write."""
    return (
        saved(1, LoraConfig(r=2, alpha=4, targets=("q_proj", "down_proj"), train_modules=("model.norm",))),
        saved(2, LoraConfig(r=3, alpha=4, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*": 7})),
        saved(3, LoraConfig(r=2, alpha=0.5, variant="dora", targets=r".*\.1\..*", dropout=0.1)),
    )


PEFT_CONFIGS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["model.norm"], "lora_dropout": 0.1},
    {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 5, "1.self_attn.v_proj": 3},
    },
    {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "use_rslora": True, "alpha_pattern": {"up.*": 3}},
    {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "use_dora": True},
)


@cache
def by_peft() -> tuple[Files, ...]:
    """Adapters that PEFT has written."""
    found = []
    for number, fields in enumerate(PEFT_CONFIGS):
        unload_lora(base())
        with warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(deepcopy(base()), peft.LoraConfig(r=2, lora_alpha=4, **fields))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.01 * (number + 1)
            model.save_pretrained(folder)
            found.append({name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    return tuple(found)


# --- mutations -------------------------------------------------------------------------------------

NAMES = (
    "q_proj", "v_proj", "down_proj", "model.norm", "norm", "lm_head", "embed_tokens", "layers.0", "mlp", "model",
    "proj", "", ".", "a\nb", "\x1b[2J", "\ud800", "ä", "../x", "x" * 2000, "model.layers.0.self_attn.q_proj",
)  # fmt: skip
PATTERNS = (
    "(a+)+$", "(.*)*x", "(.*a){25}", "(.|..)*z", "(x+x+)+y", "(" * 500, "(" * 500 + "a" + ")*" * 500, ".{1000}" * 100,
    "(?=.*q_proj).*", r"(.)\1", "(?!x).*", r".*_proj\Z", "[", "*", ".*", "", "^", "$", "a{,3}", "[[:alpha:]]+",
    "q_proj", r".*\.(q|v)_proj", r".*\.(q|down)_proj", "(.*)(q_proj|down_proj)", r"layers\.\d+\..*", "x)|(y",
    "|" * 300, "all-linear", "ALL-LINEAR", "(?i:Q_PROJ)", "." * 300, "|".join("." * n for n in range(200)),
    "a" * 100_001,
)  # fmt: skip
INITS = (
    True, False, 0, "", "gaussian", "eva", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 4, -1, 10**6, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, 2.0, 65_504, 65_505, 1e308, 5e-324, -0.0,
    float("nan"), float("inf"), -float("inf"), True, False, None, "8", "16", [8],
)  # fmt: skip
MODULES = ("megatron.core", "os", "antigravity", "../../x", "")


def something(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice((*NAMES, *PATTERNS))
    if kind < 6:
        return rng.choice((None, True, False, [], {}, 10 ** rng.randrange(40), rng.uniform(-9, 9)))
    if kind == 6:
        return [something(rng, depth + 1) for _ in range(rng.choice((1, 2, 3, 100)))]
    if kind == 7:
        return {str(something(rng, 9))[:50]: something(rng, depth + 1) for _ in range(rng.choice((1, 2, 5)))}
    return tower(rng.choice((5, 19, 20, 21, 22, 400)))


def tower(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def fitting(rng: random.Random, field: str) -> Any:
    """A value of the kind that the field has, sane or not."""
    many = 30_000 if rng.random() < 0.01 else 5
    names = rng.choices(NAMES, k=rng.choice((0, 1, 2, 3, many)))
    if field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        return rng.choice((names, names, rng.choice(PATTERNS), rng.choice(NAMES)))
    if field in ("rank_pattern", "alpha_pattern"):
        keys = rng.choices((*PATTERNS, *NAMES), k=rng.choice((0, 1, 2, 3)))
        numbers = rng.choice((NUMBERS, (1, 2, 3, 4, 7)))
        more = {f".*{number}.*": 4 for number in range(5000)} if rng.random() < 0.005 else {}
        return {key: rng.choice(numbers) for key in keys} | more
    if field == "layers_to_transform":
        return rng.choice(([0], [1], [0, 1], [], 0, 1, 7, [7], list(range(3000)), [1, "1"], [-1], rng.choice(NUMBERS)))
    if field == "init_lora_weights":
        return rng.choice(INITS)
    if field in ("r", "lora_alpha", "lora_dropout", "qalora_group_size"):
        return rng.choice(NUMBERS)
    if field == "megatron_core":
        return rng.choice(MODULES)
    if isinstance(DEFAULTS.get(field), bool):
        return rng.choice((True, False, None, 0, 1, "true"))
    return rng.choice(({}, {"a": 1}, None, "text", [1], True, {"tensor_model_parallel_size": 1}))


def change(rng: random.Random, fields: dict[str, Any]) -> None:
    name = rng.choice(sorted(rng.choice((READ, DEFAULTS))))
    fields[name] = fitting(rng, name) if rng.random() < 0.7 else something(rng)


def take_away(rng: random.Random, fields: dict[str, Any]) -> None:
    fields.pop(rng.choice(sorted(fields)), None)


def misspell(rng: random.Random, fields: dict[str, Any]) -> None:
    name = rng.choice(sorted(fields))
    place = rng.randrange(len(name))
    fields[name[:place] + rng.choice(("", "x", name[place] * 2, "\n", "\u202e")) + name[place + 1 :]] = fields.pop(name)


def exchange(rng: random.Random, fields: dict[str, Any]) -> None:
    if len(fields) > 1:
        a, b = rng.sample(sorted(fields), 2)
        fields[a], fields[b] = fields[b], fields[a]


def add(rng: random.Random, fields: dict[str, Any]) -> None:
    fields[rng.choice(("use_magic", "runtime_config", "enable_lora", *NAMES))] = something(rng)


def inside(rng: random.Random, fields: dict[str, Any]) -> None:
    """Change a list or an object where it stands."""
    holders = [name for name in sorted(fields) if fields[name] and isinstance(fields[name], dict | list)]
    if holders:
        name = rng.choice(holders)
        value = fields[name] = deepcopy(fields[name])
        if isinstance(value, dict):
            value[rng.choice((*value, *NAMES, *PATTERNS))] = rng.choice(NUMBERS)
        else:
            value.insert(rng.randrange(len(value) + 1), rng.choice((*NAMES, *NUMBERS)))


FIELD_EDITS: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    change, change, change, change, change, change, take_away, misspell, exchange, add, inside, inside,
)  # fmt: skip


def as_text(rng: random.Random, fields: dict[str, Any]) -> bytes:
    """One of the ways to write it down; now and then a field twice, or bytes that are no JSON."""
    pairs = list(fields.items())
    if rng.random() < 0.5:
        rng.shuffle(pairs)
    if rng.random() < 0.03:
        pairs.append(rng.choice(pairs))
    text = "{" + ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"
    data = text.encode()
    if rng.random() < 0.03:
        ways = text.encode("utf-16"), b"\xef\xbb\xbf" + data, data * 2, b"[" + data + b"]", b" " * 2**20 + data
        data = rng.choice(ways)
    return data


# --- the cases -------------------------------------------------------------------------------------


def run(case: int, folder: Path) -> str | None:
    """Ours keep their meaning or are refused. A file of PEFT's means what its mutated fields say."""
    rng = random.Random(case)
    expected = rng.choice(by_lorafit()) if rng.random() < 0.5 else None
    files = dict(expected.files if expected else rng.choice(by_peft()))
    if rng.random() < 0.85:
        fields = json.loads(files[CONFIG])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if fields:
                rng.choice(FIELD_EDITS)(rng, fields)
        if fields:
            files[CONFIG] = as_text(rng, fields)
    else:
        files[CONFIG] = rng.choice((flip, flip, *BYTE_EDITS[:8]))(rng, files[CONFIG])
    target = write(folder / "adapter", files)
    if rng.random() < 0.01:
        disguise(rng, target / CONFIG)
    wrong, model = loaded(target, folder)
    if not wrong and model is not None:
        wrong = differs(model, expected) if expected else unlike_the_file(model, files[WEIGHTS]) or unsaid(model, files)
    return f"case {case} ({'ours' if expected else 'PEFT'}): {wrong}" if wrong else None


def disguise(rng: random.Random, file: Path) -> None:
    """Something else than a file where the configuration should be."""
    file.unlink()
    kind = rng.choice(("folder", "pipe", "device"))
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")


def unsaid(model: Any, files: Files) -> str:
    """Where a result is no number, or the scale of a layer not what PEFT reads in the fields; "" if nowhere.

    Patterns that PEFT might be busy with forever are left out.
    """
    if not logits(model).isfinite().all():
        return "its logits are not finite"
    fields = json.loads(files[CONFIG])
    alphas = fields.get("alpha_pattern") or {}
    if not all(re.fullmatch(r"[\w.]*", key) for key in alphas):
        return ""
    for name, layer in inject.wrappers(model):
        if isinstance(layer, LoraLinear):
            alpha = alphas.get(get_pattern_key(alphas.keys(), name), fields.get("lora_alpha", 8))
            scale = alpha / math.sqrt(layer.r) if fields.get("use_rslora") else alpha / layer.r
            if not math.isclose(layer.scale, scale):
                return f"the scale of {name} is {layer.scale}, for PEFT {scale}"
    return ""
