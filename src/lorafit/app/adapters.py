"""The verbs about adapters as files: add them up, cut their rank, take one out of a model, compare two."""

from dataclasses import dataclass
from typing import Any, Literal

from lorafit.app.common import OutConfig, make_console, need, source
from lorafit.app.options import bare
from lorafit.config import ModelConfig, Names, knob
from lorafit.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter"""

    adapter: str = knob("", "adapter folder, or owner/name on the hub")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """How much of the update is kept"""

    rank: int | None = knob(None, "the most ranks that a layer keeps")
    energy: float | None = knob(None, "the share of a layer's squared norm to keep, with the least rank that does")


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """What is added up, and how"""

    adapters: tuple[str, ...] = knob((), "adapter folders, or names on the hub")
    weights: tuple[float, ...] = knob((), "a weight for each; none: equal shares")
    method: Literal["sum", "ties", "dare"] = knob(
        "sum", "sum: exact, the ranks add up; ties (arXiv:2306.01708) and dare (arXiv:2311.03099): on the dense update"
    )
    density: float = knob(0.2, "the share of an update's values that ties and dare keep")
    seed: int = knob(0, "which values dare keeps")
    force_base: bool = knob(False, "add them up even if they were made on different base models")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is taken out of a fine-tuned model"""

    tuned: str = knob("", "the fine-tuned model: hub name or folder")
    targets: Names = knob("all-linear", "which layers, as for train")
    train_modules: tuple[str, ...] = knob((), "modules to take over in full, by name ending: norm, lm_head")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The other program"""

    to: Literal["peft", "vllm", "mlx", "gguf"] | None = knob(
        None, "peft; vllm and other servers that read PEFT's folder; mlx (mlx-lm); gguf (llama.cpp)"
    )


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The other program"""

    for_: Literal["peft", "vllm", "sglang", "llama.cpp", "tgi"] | None = knob(None, "the program to serve it")


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """The two adapters"""

    adapter: str = knob("", "adapter folder, or owner/name on the hub")
    other: str = knob("", "adapter folder to compare it with")


@bare("adapters*")
def combine(what: CombineConfig, keep: KeepConfig, out: OutConfig) -> None:
    """Add adapters up to one, by weights; exact, or cut to a rank with the error reported."""
    need("combine", adapters=",".join(what.adapters), out=out.out)
    from lorafit.adapter.algebra import combine_adapters

    weights = what.weights or (1 / len(what.adapters),) * len(what.adapters)
    settings: dict[str, Any] = {"method": what.method, "density": what.density, "seed": what.seed}
    settings |= {"rank": keep.rank, "energy": keep.energy, "force_base": what.force_base}
    print(combine_adapters(what.adapters, weights, out.out, **settings))


@bare("adapter")
def resize(adapter: AdapterConfig, keep: KeepConfig, out: OutConfig) -> None:
    """Give an adapter a smaller rank: the nearest there is, by rank or by the share of the update it keeps."""
    need("resize", adapter=adapter.adapter, out=out.out)
    from lorafit.adapter.algebra import resize_adapter

    print(resize_adapter(adapter.adapter, out.out, rank=keep.rank, energy=keep.energy))


def extract(model: ModelConfig, what: ExtractConfig, keep: KeepConfig, out: OutConfig) -> None:
    """Take the nearest adapter out of a fine-tuned model and its base, a layer at a time."""
    need("extract", model=model.model, tuned=what.tuned, out=out.out)
    from lorafit.adapter.extract import extract_adapter
    from lorafit.model.load import load_skeleton, model_folder

    outcome = extract_adapter(
        load_skeleton(**source(model), dtype="float32"),
        model_folder(model.model, revision=model.revision),
        model_folder(what.tuned),
        out.out,
        rank=keep.rank,
        energy=keep.energy,
        targets=what.targets,
        train_modules=what.train_modules,
        base_model=model.model,
    )
    make_console().print(str(outcome))


@bare("adapter", "other")
def diff(two: DiffConfig) -> None:
    """Say how far the updates of two adapters are apart, and in which layers."""
    need("diff", adapter=two.adapter, other=two.other)
    from lorafit.adapter.algebra import diff_adapters

    print(diff_adapters(two.adapter, two.other))


@bare("adapter")
def export(model: ModelConfig, what: ExportConfig, keep: KeepConfig, out: OutConfig) -> None:
    """Write an adapter for another program: scale folded in, one rank, no patterns; --model where the base is asked."""
    need("export", adapter=model.adapter, to=what.to, out=out.out)
    assert model.adapter is not None
    assert what.to is not None
    from lorafit.adapter.export import export_adapter
    from lorafit.adapter.extract import nearest_plain
    from lorafit.adapter.fingerprint import facts_of
    from lorafit.adapter.stored import read_stored
    from lorafit.model.load import load_config, load_skeleton, model_folder

    settings: dict[str, Any] = {"rank": keep.rank, "energy": keep.energy}
    if model.model:
        config = load_config(**source(model))
        tied = getattr(config, "tie_word_embeddings", None)
        settings |= {"facts": {**facts_of(config), "tie_word_embeddings": tied}, "base_model": model.model}
        if (keep.rank or keep.energy) and read_stored(model.adapter).magnitudes:
            folder = model_folder(model.model, revision=model.revision)
            skeleton = load_skeleton(**source(model), dtype="float32")
            kept: dict[str, Any] = {"rank": keep.rank, "energy": keep.energy, "force_base": model.force_base}
            settings["plain"] = nearest_plain(skeleton, folder, model.adapter, **kept)
    make_console().print(str(export_adapter(model.adapter, what.to, out.out, **settings)))


@bare("adapter")
def check(adapter: AdapterConfig, program: CheckConfig) -> None:
    """Say what another program will reject or ignore in an adapter, each with its source; exit code 5 if anything."""
    need("check", adapter=adapter.adapter, **{"for": program.for_})
    assert program.for_ is not None
    from lorafit.adapter.check import check_adapter

    findings = check_adapter(adapter.adapter, program.for_)
    for finding in findings:
        print(finding)
    if wrong := [finding for finding in findings if finding.verdict != "needs"]:
        raise AdapterError(
            f"{adapter.adapter}: {program.for_} would not run it as trained ({len(wrong)} findings): "
            "lorafit export writes it so that it does"
        )
    print(f"{adapter.adapter}: {program.for_} takes it" + (", given what it needs" if findings else ""))
