"""Adapters for other programs, in one profile that every server accepts.

    scale folded into B · one rank for all layers (padded with zeros) · no patterns · plain LoRA on linear layers

With it PEFT's folder needs no field that a server might not read. mlx-lm and llama.cpp have formats of their own; their
layouts were read in the sources that the functions here name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lorafit.adapter.algebra import Outcome, shrink
from lorafit.adapter.check import lora_rank_flag, served_rank
from lorafit.adapter.low_rank import Cut, Pair
from lorafit.adapter.peft_config import CONFIG
from lorafit.adapter.stored import Stored, read_stored, write_stored
from lorafit.errors import AdapterError, UsageError, listing, nearest
from lorafit.files import new_folder, write_json, write_tensors

Format = Literal["peft", "vllm", "mlx", "gguf"]
Facts = Mapping[str, Any]
"""What a base model's configuration says, by transformers' names: model_type, num_attention_heads, …"""


@dataclass(frozen=True)
class Exported(Outcome):
    """Also how the program is called with it."""

    use: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.use}"


@dataclass(frozen=True)
class _Job:
    """What is written: the adapter's pairs, padded to one rank; where to; and what is known of the base."""

    source: Stored
    pairs: Mapping[str, Pair]
    out: Path
    facts: Facts
    base_model: str | None

    @property
    def r(self) -> int:
        return next(iter(self.pairs.values())).r if self.pairs else 1

    @property
    def base(self) -> str:
        return self.base_model or self.source.config["base_model_name_or_path"] or "BASE"


def export_adapter(
    path: str | Path,
    to: Format,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    plain: Mapping[str, Cut] | None = None,
    facts: Facts | None = None,
    base_model: str | None = None,
) -> Exported:
    """Write the adapter in the folder `path` for PEFT, vLLM, mlx-lm or llama.cpp as the folder `out`.

    `rank` and `energy` cut it first, as in `resize_adapter`. `facts` are the base's, where the file does not know
    them; `base_model` is the name to write down. A DoRA adapter needs `plain`, the pairs of `nearest_plain`; without
    it, AdapterError names the ways out. So does what only PEFT reads: embeddings, modules trained in full.
    """
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}{nearest(to, FORMATS)}: there are {', '.join(FORMATS)}")
    source = read_stored(path)
    if source.magnitudes and plain is None:
        raise AdapterError(
            f"{path}: a DoRA adapter has no plain form: merge it into its base (lorafit merge), or export the nearest "
            "plain LoRA, whose error is reported (--rank 32 --model BASE)"
        )
    cuts = shrink(source, rank, energy) if plain is None else plain
    if to != "peft":
        _refuse_beyond_linear(source, to)
    most = max((cut.pair.r for cut in cuts.values()), default=1)
    most = served_rank(most) if to == "vllm" else most
    pairs = {name: cut.pair.padded(most) for name, cut in cuts.items()}
    known = {**(source.base or {}).get("facts", {}), **(facts or {})}
    use = FORMATS[to](_Job(source, pairs, Path(out), known, base_model))
    return Exported(Path(out), cuts, use)


def _refuse_beyond_linear(source: Stored, to: str) -> None:
    beyond = [*(name for name, pair in source.pairs.items() if pair.embedding), *source.trained]
    if beyond:
        raise AdapterError(
            f"{source.folder}: {listing(beyond, 3)} is no LoRA on a linear layer, which is all that every model in "
            f"{to} takes: merge it into its base (lorafit merge), or leave it out of training"
        )


# --- PEFT's folder: PEFT itself, vLLM, SGLang, TGI ------------------------------------------------------


def _peft(job: _Job) -> str:
    _write_plain(job)
    return f"PeftModel.from_pretrained(model, '{job.out}')"


def _vllm(job: _Job) -> str:
    modules = {"target_modules": sorted(job.pairs), "target_parameters": None} if job.source.by_weight else {}
    _write_plain(job, **modules)
    flag = lora_rank_flag(job.r)
    if flag is None:
        return f"vllm: rank {job.r} is more than it takes; export it with --rank 512 or less"
    name = job.out.resolve().name
    return f"vllm serve {job.base} --enable-lora --max-lora-rank {flag} --lora-modules {name}={job.out}"


def _write_plain(job: _Job, **known: Any) -> None:
    named = {} if job.base_model is None else {"base_model_name_or_path": job.base_model}
    write_stored(job.out, job.pairs, [job.source], task_type="CAUSAL_LM", **named, **known)


# --- mlx-lm ---------------------------------------------------------------------------------------------

# Model types whose layers have the same names in mlx_lm/models/*.py as in transformers (tests/adapter/test_consumers.py
# loads each); elsewhere older versions of mlx-lm would pass over the tensors without a word.
MLX_SAME_NAMES = (
    "cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "helium", "hunyuan_v1_dense", "llama",
    "ministral3", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip


def _mlx(job: _Job) -> str:
    """`adapters.safetensors` with `lora_a` (in, r) and `lora_b` (r, out), and which layers they sit on.

    Source: mlx-lm 0.32.2, tuner/utils.py (load_adapters, linear_to_lora_layers) and tuner/lora.py.
    """
    kind = job.facts.get("model_type")
    if kind not in MLX_SAME_NAMES:
        said = f"the names mlx-lm gives the layers of {kind}" if kind else "which base this belongs to (--model BASE)"
        raise AdapterError(f"{job.source.folder}: not known: {said}; known are {', '.join(MLX_SAME_NAMES)}")
    _refuse_tied_head(job, [name for name in job.pairs if _within_block(name) == name])
    tensors: dict[str, Tensor] = {}
    for name, pair in job.pairs.items():
        tensors |= {f"{name}.lora_a": pair.A.T.contiguous(), f"{name}.lora_b": pair.B.T.contiguous()}
    keys = sorted({_within_block(name) for name in job.pairs})
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all: a layer without tensors keeps the B = 0 it starts with
        "lora_parameters": {"rank": job.r, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    with new_folder(job.out, replaces=("adapters.safetensors", CONFIG)) as folder:
        write_tensors(folder / "adapters.safetensors", tensors, about={"format": "mlx"})
        write_json(folder / CONFIG, settings)
    return f"mlx_lm.generate --model {job.base} --adapter-path {job.out}"


def _within_block(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`; what is in no block keeps its name."""
    found = re.fullmatch(r".+?\.\d+\.(.+)", name)
    return found[1] if found else name


def _refuse_tied_head(job: _Job, heads: list[str]) -> None:
    """A head tied to the embedding is no layer of its own there, so that its adapter would be lost."""
    if heads and job.facts.get("tie_word_embeddings") is not False:
        raise AdapterError(
            f"{job.source.folder}: {listing(heads)} can only be adapted where it is not tied to the embedding: name "
            "the base that says so (--model BASE), or merge the adapter (lorafit merge)"
        )


# --- llama.cpp ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """The GGUF architecture of a model type, and whether rows of q and k are laid out for its rotary embedding."""

    arch: str
    permuted: bool = False


# Families whose linear layers llama.cpp takes over as they are, or with LlamaModel.permute on q_proj and k_proj: for
# each it is what its own converter at 0c1e5709 writes (tests/adapter/test_consumers.py). But for gpt2: there the
# converter transposes the factors as if they were the base's Conv1D, and llama.cpp refuses their shapes.
GGUF_FAMILIES = {
    "apertus": _Family("APERTUS"),
    "arcee": _Family("ARCEE", permuted=True),
    "cohere": _Family("COMMAND_R"),
    "cohere2": _Family("COHERE2"),
    "ernie4_5": _Family("ERNIE4_5"),
    "gemma": _Family("GEMMA"),
    "gemma2": _Family("GEMMA2"),
    "gemma3_text": _Family("GEMMA3"),
    "glm": _Family("CHATGLM"),
    "glm4": _Family("GLM4"),
    "gpt2": _Family("GPT2"),
    "gpt_bigcode": _Family("STARCODER"),
    "granite": _Family("GRANITE", permuted=True),
    "hunyuan_v1_dense": _Family("HUNYUAN_DENSE"),
    "llama": _Family("LLAMA", permuted=True),
    "mistral": _Family("LLAMA", permuted=True),
    "mixtral": _Family("LLAMA", permuted=True),
    "nemotron": _Family("NEMOTRON"),
    "olmo": _Family("OLMO", permuted=True),
    "olmo2": _Family("OLMO2"),
    "olmo3": _Family("OLMO2"),
    "phi": _Family("PHI2"),
    "phi3": _Family("PHI3"),
    "qwen2": _Family("QWEN2"),
    "qwen2_moe": _Family("QWEN2MOE"),
    "qwen3": _Family("QWEN3"),
    "qwen3_moe": _Family("QWEN3MOE"),
    "seed_oss": _Family("SEED_OSS"),
    "smollm3": _Family("SMOLLM3", permuted=True),
    "stablelm": _Family("STABLELM"),
    "starcoder2": _Family("STARCODER2"),
}
GGUF_FILE = "adapter.gguf"


def _gguf(job: _Job) -> str:
    """A GGUF file of type "adapter": `<name>.weight.lora_a` (r, in), `.lora_b` (out, r), and one alpha for all.

    Source: llama.cpp convert_lora_to_gguf.py at 0c1e5709; the scale is alpha / r there.
    """
    import gguf

    where, kind = job.source.folder, job.facts.get("model_type")
    if kind not in GGUF_FAMILIES:
        said = f"how llama.cpp lays out {kind}" if kind else "which base this belongs to (--model BASE)"
        raise AdapterError(
            f"{where}: not known: {said}; known are {', '.join(GGUF_FAMILIES)}; for others export it to peft "
            "and use llama.cpp's convert_lora_to_gguf.py"
        )
    family = GGUF_FAMILIES[kind]
    arch = gguf.MODEL_ARCH[family.arch]
    places = gguf.get_tensor_name_map(arch, 1 + max((_block(name) for name in job.pairs), default=0))
    tensors = {}
    for name, pair in job.pairs.items():
        place = places.get_name(name)
        if place is None:
            raise AdapterError(f"{where}: llama.cpp has no place for {name} in {gguf.MODEL_ARCH_NAMES[arch]}")
        if place == "output":
            _refuse_tied_head(job, [name])
        tensors[f"{place}.weight.lora_a"] = pair.A
        tensors[f"{place}.weight.lora_b"] = _for_rotation(name, pair.B, job) if family.permuted else pair.B
    with new_folder(job.out, replaces=("*.gguf",)) as folder:
        writer = gguf.GGUFWriter(folder / GGUF_FILE, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(job.r))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return f"llama-cli -m {job.base}.gguf --lora {job.out / GGUF_FILE}"


def _block(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _for_rotation(name: str, B: Tensor, job: _Job) -> Tensor:
    """Rows of q and k in llama.cpp's order: the two halves of each head interleaved (LlamaModel.permute)."""
    kind = name.rsplit(".", 1)[-1]
    if kind not in ("q_proj", "k_proj"):
        return B
    heads = job.facts.get("num_attention_heads")
    if kind == "k_proj":
        heads = job.facts.get("num_key_value_heads") or heads
    if type(heads) is not int or heads < 1 or B.shape[0] % (2 * heads):
        raise AdapterError(
            f"{job.source.folder}: {name} has {B.shape[0]} rows, which the base's {heads} heads do not share: "
            "name the base (--model BASE)"
        )
    return B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


FORMATS: dict[str, Callable[[_Job], str]] = {"peft": _peft, "vllm": _vllm, "mlx": _mlx, "gguf": _gguf}
