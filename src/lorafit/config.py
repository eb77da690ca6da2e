"""Every knob, its default and its sentence, declared once: flags, config files and docs are made from these.

Field names are unique over all four classes, so that the command line and config files stay flat:
`--lr 1e-4`, `lr = 1e-4`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from lorafit.errors import UsageError

Names = str | tuple[str, ...]


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its sentence; a mutable default is made afresh for every instance."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (_is_number(value) and value > 0):
            raise UsageError(f"{name} must be a number greater than 0, not {value!r}")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _within(config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and low <= value < high):
            raise UsageError(f"{name} must be at least {low:g} and below {high:g}, not {value!r}")


def _named(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str) and not all(isinstance(v, str) and v for v in _items(value)):
            raise UsageError(f"{name} must be a string or a list of names, not {value!r}")


def _patterns(config: object, *names: str) -> None:
    for name in names:
        pattern = getattr(config, name)
        if not isinstance(pattern, Mapping):
            raise UsageError(f"{name} must map names to numbers, not {pattern!r}")
        for key, value in pattern.items():
            if not (_is_number(value) and value > 0):
                raise UsageError(f"{name}[{key!r}] must be a number greater than 0, not {value!r}")


def _items(value: Any) -> Any:
    return value if isinstance(value, tuple) else (None,)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted, and how: ΔW = s·B·A with s = alpha/r (or alpha/√r with `rslora`)."""

    r: int = knob(16, "rank of the update")
    alpha: float = knob(32.0, "scale of the update: s = alpha / r, or alpha / sqrt(r) with rslora")
    dropout: float = knob(0.0, "dropout on the input of A while training")
    targets: Names = knob(
        "all-linear",
        "'all-linear' (every linear layer but the output head; experts, too), name endings, or one regular expression",
    )
    parameters: tuple[str, ...] = knob(
        (), "weights outside of linear layers to adapt as well, by name ending: experts.down_proj, gate.weight"
    )
    exclude: Names = knob((), "name endings, or one regular expression, of layers to leave alone")
    layers: tuple[int, ...] | None = knob(None, "adapt only the transformer blocks with these numbers")
    init: str = knob("kaiming", "how A and B start (the names in lorafit.INITS)")
    init_rows: int = knob(256, "rows of the data that an init which looks at data is shown")
    init_rho: float = knob(
        2.0, "eva: a layer's rank may grow to this many times r, at the cost of others; 1, or a rank_pattern: none does"
    )
    variant: str = knob("lora", "the formula (the names in lorafit.VARIANTS)")
    rslora: bool = knob(False, "rank-stabilised scale, alpha / sqrt(r) (arXiv:2312.03732)")
    rank_pattern: Mapping[str, int] = knob({}, "other ranks for some layers: {name ending or regex: r}")
    alpha_pattern: Mapping[str, float] = knob({}, "other alphas for some layers: {name ending or regex: alpha}")
    train_modules: tuple[str, ...] = knob((), "modules trained in full beside LoRA, by name ending: norm, lm_head")
    train_tokens: tuple[int, ...] = knob((), "ids of tokens whose rows are trained, in the embedding and output head")
    token_layers: tuple[str, ...] = knob((), "by name ending, the layers in which they are; none: both")

    def __post_init__(self) -> None:
        one_or_more = ("parameters", "train_modules", "token_layers")
        for name in ("targets", "parameters", "exclude", "layers", "train_modules", "train_tokens", "token_layers"):
            value = getattr(self, name)
            if isinstance(value, list | set) or (name in one_or_more and isinstance(value, str)):
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, value)
        _named(self, "targets", "parameters", "exclude", "train_modules", "token_layers")
        ids = _items(self.train_tokens)
        if not all(type(n) is int and n >= 0 for n in ids) or len(set(ids)) < len(ids):
            raise UsageError(f"train_tokens must be a list of different token ids, not {self.train_tokens!r}")
        if self.token_layers and not ids:
            raise UsageError("token_layers says where train_tokens are, and there are none")
        if self.layers is not None and not all(type(n) is int and n >= 0 for n in _items(self.layers)):
            raise UsageError(f"layers must be a list of block numbers, not {self.layers!r}")
        _positive(self, "r", "alpha", "init_rows", "init_rho")
        _within(self, 0, 1, "dropout")
        _patterns(self, "rank_pattern", "alpha_pattern")
        for rank in (self.r, *self.rank_pattern.values()):
            if rank != int(rank):
                raise UsageError(f"a rank must be a whole number, not {rank!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model, and where it lives."""

    model: str = knob("", "hub name, local folder, or .gguf file of the base model")
    adapter: str | None = knob(None, "adapter to load on top: folder, or owner/name or owner/name@revision on the hub")
    force_base: bool = knob(False, "load the adapter even if it was made on another base model")
    revision: str | None = knob(None, "branch, tag or commit on the hub")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = knob(
        "auto", "precision of the base; auto: bfloat16 where the processor computes it natively, else float32"
    )
    storage: Literal["dense", "int8"] = knob(
        "dense", "how the frozen linear layers are kept; int8: 8-bit codes and a scale per row, half of bfloat16's size"
    )
    device: str = knob("auto", "cpu, cuda, cuda:1, mps …; auto: the first accelerator, else cpu")
    trust_remote_code: bool = knob(False, "run Python code that comes with the model; leave off unless you read it")
    chat_template: str | None = knob(
        None, "file with a Jinja chat template, or 'plain', in place of the tokenizer's own"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from, and how they become batches."""

    data: str = knob("", "hub dataset, or .json .jsonl .csv .parquet file; 'name:train[:1%]' takes a split or slice")
    eval_data: str | None = knob(None, "held-out rows, in the same forms as data")
    eval_rows: int = knob(0, "without eval_data: hold out this many rows of data, drawn by the seed")
    max_length: int = knob(1024, "longest row in tokens; longer ones are cut, and dropped if no answer token is left")
    loss_on: Literal["assistant", "last", "all"] = knob(
        "assistant", "which tokens carry loss: every assistant turn, the last one only, or all tokens"
    )
    allow_dropped: float = knob(0.05, "refuse to start when a larger share of the rows than this has to be dropped")
    batch_size: int = knob(8, "rows per forward pass")
    accumulate: int = knob(1, "forward passes per optimizer step; batch_size x accumulate rows make one step")
    packing: bool = knob(True, "lay rows end to end, isolated from each other; off: pad them to equal length")
    max_tokens_per_pack: int | None = knob(
        None, "cut a forward pass that would hold more tokens than this; none: what the free memory holds"
    )

    def __post_init__(self) -> None:
        _positive(self, "max_length", "batch_size", "accumulate", "max_tokens_per_pack")
        if self.eval_rows < 0:
            raise UsageError(f"eval_rows must not be negative, not {self.eval_rows}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and its schedule."""

    lr: float = knob(2e-4, "peak learning rate")
    epochs: float = knob(1.0, "passes over the data")
    steps: int | None = knob(None, "stop after this many optimizer steps instead of after `epochs`")
    schedule: Literal["cosine", "linear", "constant"] = knob("cosine", "how the learning rate falls after warm-up")
    warmup: float = knob(0.03, "share of the steps in which the learning rate rises from 0 (1 or more: steps)")
    lora_plus_ratio: float = knob(1.0, "LoRA+: learning rate of B over that of A; 16 is usual, with a smaller lr")
    lr_pattern: Mapping[str, float] = knob(
        {}, "other peak learning rates for some of what is trained: {name ending or regex of layer or tensor: rate}"
    )
    lr_embeddings: float | None = knob(None, "peak learning rate of embeddings; none: lr")
    lr_modules: float | None = knob(None, "peak learning rate of modules trained in full; none: lr")
    rule: Literal["adamw", "lora-fa", "riemannian"] = knob(
        "adamw",
        "what AdamW is given: the gradient; with A frozen and B's corrected for it (LoRA-FA); "
        "both preconditioned by the other factor",
    )
    neftune: float = knob(0.0, "NEFTune: noise of this size on the embeddings while training; 5 is usual, 0: none")
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay")
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW's two decay rates")
    eps: float = knob(1e-8, "AdamW's epsilon")
    max_grad_norm: float | None = knob(1.0, "clip the gradient to this norm; none: do not clip")
    seed: int = knob(0, "order of the rows, start of A, dropout")
    eval_every: int | None = knob(None, "evaluate every so many steps; none: once an epoch")
    patience: int | None = knob(None, "stop when this many evaluations in a row brought no better loss")
    keep_best: bool = knob(True, "end with the weights of the best evaluation instead of the last step's")
    save_every: float = knob(300.0, "seconds between two checkpoints; 0: one after every step")
    keep_checkpoints: int = knob(2, "how many of the newest checkpoints are kept")
    checkpointing: bool = knob(
        False, "keep only each block's input and compute the rest again: a third more work, a fraction of the memory"
    )
    compile: bool = knob(
        False, "compile the transformer blocks (torch.compile): a minute at the start, steps as fast or faster"
    )
    shard: bool = knob(
        False, "torchrun: each process keeps a slice of the frozen base instead of all of it (FSDP2); the same result"
    )
    max_bad_steps: int = knob(3, "stop at this many steps in a row whose loss or gradient is not finite")

    def __post_init__(self) -> None:
        _positive(self, "lr", "epochs", "steps", "eps", "max_grad_norm", "eval_every", "patience")
        _positive(self, "keep_checkpoints", "max_bad_steps", "lora_plus_ratio", "lr_embeddings", "lr_modules")
        _patterns(self, "lr_pattern")
        _within(self, 0, math.inf, "neftune")
        if self.rule == "lora-fa" and self.lora_plus_ratio != 1:
            raise UsageError("rule lora-fa trains no A, so there is nothing for lora_plus_ratio to compare: raise lr")
        if self.shard and self.compile:
            raise UsageError("compile works on whole blocks, and shard takes them apart between passes: take one")
        if not (_is_number(self.save_every) and self.save_every >= 0):
            raise UsageError(f"save_every must not be negative, not {self.save_every!r}")
        if self.warmup < 0 or self.weight_decay < 0:
            raise UsageError("warmup and weight_decay must not be negative")
        object.__setattr__(self, "betas", tuple(self.betas))


def as_dict(*configs: Any) -> dict[str, Any]:
    """The settings of all `configs` as one flat dictionary that JSON and TOML can hold."""
    flat: dict[str, Any] = {}
    for config in configs:
        for name, value in dataclasses.asdict(config).items():
            flat[name] = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
    return flat
