"""The verbs about adapters as files: add them up, cut their rank, take one out of a model, compare two."""

from dataclasses import dataclass
from typing import Any, Literal

from lorafit.app.common import OutConfig, make_console, need, source
from lorafit.app.options import bare
from lorafit.config import ModelConfig, Names, knob


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter"""

    adapter: str = knob("", "adapter folder")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """How much of the update is kept"""

    rank: int | None = knob(None, "the most ranks that a layer keeps")
    energy: float | None = knob(None, "the share of a layer's squared norm to keep, with the least rank that does")


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """What is added up, and how"""

    adapters: tuple[str, ...] = knob((), "adapter folders")
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
class DiffConfig:
    """The two adapters"""

    adapter: str = knob("", "adapter folder")
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
