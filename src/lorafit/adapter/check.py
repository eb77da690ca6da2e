"""What a program that serves adapters will reject or ignore in one, each with where that stands.

A table of rules per program. They were read in the programs' sources at the commits named here, in November 2026; a
program may have moved on since. Files are looked at with nothing believed and nothing loaded: names and shapes only.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorafit.adapter.peft_config import (
    CONFIG,
    DEFAULTS,
    KINDS,
    MADE_ANEW,
    PLAIN_INITS,
    UNSUPPORTED,
    patterned,
    read_raw,
)
from lorafit.adapter.peft_format import NOTE, open_adapter
from lorafit.adapter.stored import COPY, FACTOR, MAGNITUDE, NAMES
from lorafit.adapter.untrusted import parse, plain, shown
from lorafit.errors import AdapterError, UsageError, listing, nearest
from lorafit.hub import adapter_folder

Program = Literal["peft", "vllm", "sglang", "llama.cpp", "tgi"]
Verdict = Literal["rejects", "ignores", "needs"]

PEFT = "PEFT 0.21.2, tuners/lora"
VLLM = "vllm/lora/peft_helper.py, with vllm#59801"
VLLM_TENSORS = "vllm/lora/utils.py, parse_fine_tuned_lora_name"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16
EXPERTS = (".experts", ".experts.base_layer")  # where PEFT keeps target_parameters
SGLANG = "sglang/srt/lora/lora_config.py at 0ceb81fe"
LLAMA = "llama.cpp convert_lora_to_gguf.py at 0c1e5709"
TGI = "text_generation_server/adapters/lora.py at 45d95bdc"
TGI_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj")
TGI_LEAST, TGI_STEP = 8, 16


@dataclass(frozen=True)
class Seen:
    """What the files of an adapter say: the configuration's fields, which of them are there, and by layer the rank
    and whether it embeds; how many blocks the base has, where the adapter knows."""

    raw: Mapping[str, Any]
    stated: frozenset[str]
    ranks: Mapping[str, int]
    embeddings: Sequence[str]
    magnitudes: Sequence[str]
    experts: Sequence[str]
    others: Sequence[str]
    blocks: int
    adds_tokens: bool

    @property
    def most(self) -> int:
        """The largest rank that the configuration or a tensor names."""
        stated: list[int] = [self.raw["r"], *self.raw["rank_pattern"].values()]
        return max(stated + list(self.ranks.values()))

    @property
    def kinds(self) -> dict[str, set[int]]:
        """In which blocks each kind of layer is adapted: `self_attn.q_proj` in 0, 1, 2."""
        kinds: dict[str, set[int]] = defaultdict(set)
        for name in self.ranks:
            if found := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name):
                kinds[found[3]].add(int(found[2]))
        return kinds


@dataclass(frozen=True)
class Finding:
    """One thing that a program does with an adapter, and where that stands."""

    verdict: Verdict
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.what} [{self.source}]"


class Rule(NamedTuple):
    verdict: Verdict
    what: Callable[[Seen], str | None]
    source: str


def check_adapter(path: str | Path, program: Program) -> list[Finding]:
    """What `program` will reject, ignore or need of the adapter `path`; [] if it takes it as it is.

    `path` is a folder, or `owner/name` or `owner/name@revision` on the hub.
    """
    if program not in RULES:
        raise UsageError(f"unknown program {program!r}{nearest(program, RULES)}: there are {', '.join(RULES)}")
    seen = _look(adapter_folder(path))
    said = ((rule, rule.what(seen)) for rule in RULES[program])
    return [Finding(rule.verdict, what, rule.source) for rule, what in said if what]


def lora_rank_flag(rank: int) -> int | None:
    """The `--max-lora-rank` that vLLM needs for an adapter of this rank; None if its largest is too small."""
    return next((n for n in VLLM_RANKS if n >= rank), None)


def served_rank(rank: int) -> int:
    """The least rank from `rank` on that every server runs as it is: TGI pads others, and then scales by the padded."""
    return TGI_LEAST if rank <= TGI_LEAST else -(-rank // TGI_STEP) * TGI_STEP


def _look(folder: Path) -> Seen:
    raw = read_raw(folder)
    for name, value in raw.items():
        if name in KINDS and value is not None and not KINDS[name].fits(value):
            raise AdapterError(f"{folder / CONFIG}: {name}={shown(value)}: {KINDS[name].expected} is expected")
    ranks: dict[str, int] = {}
    embeddings, magnitudes, experts, others = [], [], [], []
    with open_adapter(folder) as (file, entries):
        for name, entry in entries.items():
            found = FACTOR.fullmatch(name)
            if found and found[2] == MAGNITUDE:
                magnitudes.append(found[1])
            elif found and raw.get("target_parameters") and found[1].endswith(EXPERTS):
                experts.append(found[1])
            elif found:
                if found[2] in (NAMES[False][0], NAMES[True][0]) and entry.shape:
                    ranks[found[1]] = entry.shape[0]
                if found[2] == NAMES[True][0]:
                    embeddings.append(found[1])
            elif not COPY.fullmatch(name):
                others.append(name)
        blocks = _blocks(file.metadata.get(NOTE, ""))
    fields = DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    return Seen(
        fields,
        frozenset(raw),
        ranks,
        embeddings,
        magnitudes,
        experts,
        others,
        blocks,
        adds_tokens=(folder / "added_tokens.json").is_file(),
    )


def _blocks(note: str) -> int:
    """How many blocks the base has, by the note in an adapter of ours; 0 if it does not say."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        count = parse(note.encode())["base"]["facts"]["num_hidden_layers"]
        return count if type(count) is int else 0
    return 0


# --- what may be in an adapter ------------------------------------------------------------------------


def _dora(seen: Seen) -> str | None:
    return "DoRA (use_dora and its magnitude vectors)" if seen.raw["use_dora"] or seen.magnitudes else None


def _rslora(seen: Seen) -> str | None:
    return "use_rslora: the scale is taken as alpha / r, √r times too small" if seen.raw["use_rslora"] else None


def _field(name: str, meaning: str = "") -> Callable[[Seen], str | None]:
    def rule(seen: Seen) -> str | None:
        value = seen.raw.get(name)
        return f"{name}={shown(value, 40)}{meaning}" if value and value != DEFAULTS.get(name) else None

    return rule


def _init(*fine: str) -> Callable[[Seen], str | None]:
    def rule(seen: Seen) -> str | None:
        init = seen.raw["init_lora_weights"]
        if init in PLAIN_INITS or (isinstance(init, str) and init.lower() in fine):
            return None
        return f"init_lora_weights={shown(init)}: the adapter belongs to a base that this start has moved"

    return rule


def _only_init(*names: str) -> Callable[[Seen], str | None]:
    return lambda seen: _init()(seen) if seen.raw["init_lora_weights"] in names else None


def _random_init(seen: Seen) -> str | None:
    return _init()(seen) if str(seen.raw["init_lora_weights"]).startswith("pissa_niter_") else None


def _embeddings(seen: Seen) -> str | None:
    return f"LoRA on an embedding: {listing(seen.embeddings, 2)}" if seen.embeddings else None


def _experts(seen: Seen) -> str | None:
    return f"LoRA on stacks of experts: {listing(dict.fromkeys(seen.experts), 2)}" if seen.experts else None


def _conv1d(seen: Seen) -> str | None:
    conv1d = seen.raw["fan_in_fan_out"]
    return "LoRA on Conv1D layers (fan_in_fan_out); lorafit export --to gguf lays it out" if conv1d else None


def _head(seen: Seen) -> str | None:
    heads = [name for name in seen.ranks if name.rsplit(".", 1)[-1] in ("lm_head", "embed_out", "output")]
    return f"LoRA on the output head: {listing(heads, 2)}" if heads else None


def _others(seen: Seen) -> str | None:
    return f"tensors that are no LoRA factors: {listing(map(plain, seen.others), 2)}" if seen.others else None


def _norms(seen: Seen) -> str | None:
    norms = [name for name in seen.others if _is_norm(name)]
    return f"norms trained in full: {listing(map(plain, norms), 2)}" if norms else None


def _no_norms(seen: Seen) -> str | None:
    others = [name for name in seen.others if not _is_norm(name)]
    return f"tensors that are no LoRA factors: {listing(map(plain, others), 2)}" if others else None


def _is_norm(name: str) -> bool:
    """By the converter's own test."""
    return name.endswith(".weight") and ("_layernorm" in name or ".norm" in f".{name}")


def _missing(*names: str) -> Callable[[Seen], str | None]:
    def rule(seen: Seen) -> str | None:
        missing = [name for name in names if name not in seen.stated]
        return f"{listing(missing)} is not in {CONFIG}" if missing else None

    return rule


def _added_tokens(seen: Seen) -> str | None:
    return "added_tokens.json without a token that the base's vocabulary lacks" if seen.adds_tokens else None


def _saved(*fine: str) -> Callable[[Seen], str | None]:
    def rule(seen: Seen) -> str | None:
        names = [name for name in seen.raw["modules_to_save"] or [] if name not in fine]
        return f"modules_to_save: {listing(map(str, names), 3)}" if names else None

    return rule


def _different_alphas(seen: Seen) -> str | None:
    """alpha_pattern, if it changes anything."""
    try:
        alphas = patterned("alpha_pattern", seen.raw, {name: name for name in seen.ranks})
    except (AdapterError, UsageError):
        return _field("alpha_pattern")(seen)
    other = [name for name, alpha in alphas.items() if alpha != seen.raw["lora_alpha"]]
    return f"alpha_pattern: {len(other)} layers are scaled by lora_alpha instead" if other else None


def _different_ranks(seen: Seen) -> str | None:
    other = [name for name, r in seen.ranks.items() if r != seen.raw["r"]]
    r = seen.raw["r"]
    return f"rank_pattern: {len(other)} layers of another rank are scaled as if of rank {r}" if other else None


def _order(seen: Seen) -> str | None:
    """Keys of a pattern that match one layer: the first of the file wins, and files are written with sorted keys."""
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = seen.raw[name]
        if not isinstance(pattern, dict):
            continue
        for layer in seen.ranks:
            plainly = [key for key in pattern if re.fullmatch(r"[\w.]+", key) and f".{layer}".endswith(f".{key}")]
            if len({str(pattern[key]) for key in plainly}) > 1:
                return f"{name}: {listing(plainly)} all match {layer}; the first of the file is taken"
    return None


def _targets(seen: Seen) -> str | None:
    value = seen.raw["target_modules"]
    if value is None:
        return "target_modules is not set"
    return f"target_modules is a pattern, {shown(value, 40)}; a list is read" if isinstance(value, str) else None


def _no_base(seen: Seen) -> str | None:
    named = seen.raw["base_model_name_or_path"]
    return None if named else "the name of the base model, which base_model_name_or_path does not give"


def _padded(seen: Seen) -> str | None:
    r, padded = seen.raw["r"], served_rank(seen.raw["r"])
    if r == padded or len({kind.rsplit(".", 1)[-1] for kind in seen.kinds}) < 2:
        return None
    return f"that r is {r}: it pads it to {padded}, and scales all kinds of layers but the first by alpha / {padded}"


def _other_kinds(seen: Seen) -> str | None:
    others = [name for name in seen.ranks if name.rsplit(".", 1)[-1] not in TGI_KINDS]
    return f"layers of other kinds than {', '.join(TGI_KINDS)}: {listing(others, 2)}" if others else None


def _vllm_rank(seen: Seen) -> str | None:
    flag = lora_rank_flag(seen.most)
    return f"--max-lora-rank {flag} (rank {seen.most})" if flag and seen.most > VLLM_DEFAULT else None


def _vllm_too_large(seen: Seen) -> str | None:
    return f"rank {seen.most}: at most {VLLM_RANKS[-1]}" if lora_rank_flag(seen.most) is None else None


def _gaps(seen: Seen) -> str | None:
    """Kinds of layers that some blocks have and others have not, as far as the adapter shows its blocks."""
    kinds = seen.kinds
    count = max([seen.blocks, *(1 + max(numbers) for numbers in kinds.values())])
    partly = [kind for kind, numbers in kinds.items() if len(numbers) < count]
    return f"layers adapted in some blocks only: {listing(partly, 3)}" if partly else None


def _unread(source: str, names: Iterable[str]) -> tuple[Rule, ...]:
    """For each of the fields: that they are not read, though they change what the adapter computes."""
    return tuple(Rule("ignores", _field(name), f"{source}: the field is not read") for name in sorted(names))


VLLM_READS = ("bias", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
RULES: dict[str, tuple[Rule, ...]] = {
    "peft": (
        Rule("rejects", _only_init("corda"), f"{PEFT}/layer.py, corda_init: it asks for preprocess_corda"),
        Rule("ignores", _only_init("lora_ga"), f"{PEFT}/layer.py, lora_ga_init: moves no base when it loads"),
        Rule("ignores", _random_init, f"{PEFT}/layer.py, pissa_init: moves the base by a random SVD when it loads"),
        Rule("needs", _only_init(*MADE_ANEW, "loftq"), f"{PEFT}/layer.py: moves the base anew when it loads"),
        Rule("ignores", _order, f"{PEFT}/layer.py, get_pattern_key"),
    ),
    "vllm": (
        Rule("rejects", _missing("r", "lora_alpha", "target_modules"), VLLM),
        Rule("rejects", _dora, VLLM),
        Rule("rejects", _saved("classifier", "score"), VLLM),
        Rule("rejects", _init("lora_ga"), VLLM),
        *(Rule("rejects", _field(name), VLLM) for name in VLLM_READS),
        Rule("rejects", _others, f"{VLLM_TENSORS}; vllm#9280"),
        Rule("rejects", _vllm_too_large, "vllm/config/lora.py, MaxLoRARanks"),
        Rule("ignores", _only_init("lora_ga"), VLLM),
        *_unread(VLLM, UNSUPPORTED.keys() - VLLM_READS),
        Rule("needs", _vllm_rank, "vllm/config/lora.py, MaxLoRARanks"),
        Rule("needs", _field("rank_pattern", ": a version with vllm#59801; older ones ignore it"), VLLM),
        Rule("needs", _field("alpha_pattern", ": a version with vllm#59801; older ones ignore it"), VLLM),
        Rule("needs", _experts, "vllm/lora/lora_model.py at 0306474e: a model whose experts it can adapt"),
        Rule("needs", _embeddings, "a model class that lists it, vllm#32599"),
        Rule("needs", _head, "a model class that lists it, vllm#32599"),
    ),
    "sglang": (
        Rule("rejects", _missing("r", "lora_alpha", "target_modules"), SGLANG),
        Rule("rejects", _dora, "sglang#22125"),
        Rule("rejects", _targets, SGLANG),
        Rule("ignores", _rslora, "sglang#40835"),
        Rule("ignores", _init(), f"{SGLANG}: the field is not read"),
        Rule("ignores", _saved(), f"{SGLANG}: the field is not read"),
        *_unread(SGLANG, (*UNSUPPORTED, "trainable_token_indices")),
        Rule("needs", _added_tokens, "sglang/srt/lora/lora_manager.py, validate_new_adapter"),
        Rule("needs", _field("rank_pattern", ": a version that reads it; older ones ignore it"), SGLANG),
        Rule("needs", _field("alpha_pattern", ": a version that reads it; older ones ignore it"), SGLANG),
    ),
    "llama.cpp": (
        Rule("rejects", _missing("lora_alpha"), LLAMA),
        Rule("rejects", _dora, f"{LLAMA}: not a lora_A or lora_B tensor"),
        Rule("rejects", _no_norms, f"{LLAMA}: not a lora_A or lora_B tensor"),
        Rule("rejects", _field("bias"), f"{LLAMA}: not a lora_A or lora_B tensor"),
        Rule("rejects", _experts, f"{LLAMA}: no tensor of that name"),
        Rule("rejects", _conv1d, "llama.cpp conversion/gpt2.py at 0c1e5709 transposes the factors"),
        Rule("rejects", _head, "where it is tied to the embedding, llama.cpp#9065"),
        Rule("ignores", _norms, "llama.cpp src/llama-adapter.cpp at 0c1e5709: passes over *_norm.weight"),
        Rule("ignores", _rslora, f"{LLAMA}: the field is not read"),
        Rule("ignores", _different_alphas, f"{LLAMA}: one adapter.lora.alpha for all"),
        Rule("ignores", _init(), f"{LLAMA}: the field is not read"),
        *_unread(LLAMA, UNSUPPORTED.keys() - {"bias", "alora_invocation_tokens"}),
        Rule("needs", _no_base, f"{LLAMA}: or --base"),
    ),
    "tgi": (
        Rule("ignores", _dora, TGI),
        Rule("ignores", _different_ranks, TGI),
        Rule("ignores", _different_alphas, TGI),
        Rule("ignores", _padded, f"{TGI}, prepare_weights sets config.r; punica_sgmv.pad_rank"),
        Rule("ignores", _saved(), TGI),
        *_unread(TGI, (*UNSUPPORTED, "trainable_token_indices")),
        Rule("ignores", _init(), TGI),
        Rule("ignores", _embeddings, TGI),
        Rule("ignores", _experts, TGI),
        Rule("ignores", _other_kinds, "text_generation_server/models/__init__.py at 45d95bdc, adapter_layers"),
        Rule("ignores", _gaps, f"{TGI}, prepare_weights: a kind that one block lacks is left out everywhere"),
    ),
}
