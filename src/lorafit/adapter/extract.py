"""The low-rank adapter that comes nearest to what a fine-tuning, or a DoRA adapter, made of a base model.

Models are read from their files, a layer at a time. ΔW = W_tuned − W_base is dense here, so what a rank leaves out is
measured and reported.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.adapter.algebra import Outcome, check_keep
from lorafit.adapter.fingerprint import LAYERS, base_fingerprint, spread
from lorafit.adapter.low_rank import Cut, best
from lorafit.adapter.peft_config import describe
from lorafit.adapter.peft_format import write_adapter
from lorafit.adapter.shards import Shards, find, load_on, open_shards, real_layer, with_adapter
from lorafit.adapter.stored import pair_tensors, plan_for_pairs
from lorafit.config import LoraConfig, Names
from lorafit.errors import ModelError, NumericError, listing
from lorafit.hub import adapter_folder
from lorafit.lora.inject import find_targets
from lorafit.lora.weights import read_weight


@dataclass(frozen=True)
class Extracted(Outcome):
    """Also the tensors in which the two models differ and that are not in the adapter."""

    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = f"\nchanged, but not extracted: {listing(self.left_out, 4)}" if self.left_out else ""
        return f"{super().__str__()}{left}"


def extract_adapter(
    skeleton: nn.Module,
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Names = "all-linear",
    train_modules: tuple[str, ...] = (),
    base_model: str | None = None,
) -> Extracted:
    """Write the adapter that makes of the model folder `base` what comes nearest to the folder `tuned`.

    `skeleton` is the base without its weights (`load_skeleton`). Layers are chosen as in `LoraConfig`, stacks of
    experts and their routers left out; modules in `train_modules` are taken over in full. `rank` (default 16) is the
    most a layer gets, `energy` the share of its ‖ΔW‖² that it keeps. Layers that did not change get nothing.
    """
    check_keep(rank, energy)
    rank = 16 if rank is None and energy is None else rank
    config = LoraConfig(targets=targets, train_modules=train_modules)
    plan = find_targets(skeleton, config)
    cuts: dict[str, Cut] = {}
    trained: dict[str, Tensor] = {}
    taken: set[str] = set()
    with open_shards(Path(base)) as before, open_shards(Path(tuned)) as after:
        for target in (target for target in plan.targets if not target.parameter):
            delta = _weight(skeleton, target.name, after) - _weight(skeleton, target.name, before)
            taken.update(find(skeleton, f"{target.name}.weight", shards) or "" for shards in (before, after))
            if not delta.isfinite().all():
                raise NumericError(f"NaN or infinity in {target.name} of {tuned} or {base}; nothing was written")
            if delta.any():
                embedding = isinstance(skeleton.get_submodule(target.name), nn.Embedding)
                cuts[target.name] = best(delta, rank, energy, embedding)
        for name in plan.trained:
            state = real_layer(skeleton, name, after).state_dict()
            trained |= {f"{name}.{key}": value for key, value in state.items()}
            taken.update(trained)
        if not cuts and not trained:
            raise ModelError(f"{tuned}: no layer of it that LoRA could adapt differs from {base}")
        left_out = tuple(_changed(before, after, taken))
        adapted = list(cuts) or list(plan.trained)
        sampled = {name: real_layer(skeleton, name, before) for name in spread(adapted, LAYERS)}
    pairs = {name: found.pair for name, found in cuts.items()}
    written = plan_for_pairs(pairs, config, plan.trained)
    said = describe(skeleton, written, base_model or str(base))
    fingerprint = base_fingerprint(skeleton, sampled)
    path = write_adapter(Path(out), pair_tensors(pairs) | trained, written, said, fingerprint)
    return Extracted(path, cuts, left_out)


def _weight(skeleton: nn.Module, name: str, shards: Shards) -> Tensor:
    """W (out, in) in fp32."""
    return read_weight(real_layer(skeleton, name, shards, torch.float32))


def _changed(before: Shards, after: Shards, taken: set[str]) -> list[str]:
    """Tensors outside `taken` that only one of the models has, or that have other values in the other."""
    changed = sorted((before.entries.keys() ^ after.entries.keys()) - taken)
    for name in sorted((before.entries.keys() & after.entries.keys()) - taken):
        was, now = before.read(name), after.read(name)
        wide = torch.promote_types(was.dtype, now.dtype)
        if was.shape != now.shape or not torch.equal(was.to(wide), now.to(wide)):
            changed.append(name)
    return changed


def nearest_plain(
    skeleton: nn.Module,
    base: str | Path,
    adapter: str | Path,
    *,
    rank: int | None,
    energy: float | None,
    force_base: bool = False,
) -> dict[str, Cut]:
    """For every layer of a DoRA adapter the plain LoRA that comes nearest to it on its base, and what that loses.

    ΔW = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ − W has the rank of W.
    """
    check_keep(rank, energy)
    cuts = {}
    with open_shards(Path(base)) as shards:
        plan, tensors = load_on(skeleton, shards, adapter_folder(adapter), force_base)
        for target in plan.targets:
            layer = real_layer(skeleton, target.name, shards, torch.float32)
            with torch.no_grad():
                delta = with_adapter(layer, target, plan, tensors).merged_weight() - read_weight(layer)
            cuts[target.name] = best(delta, rank, energy, isinstance(layer, nn.Embedding))
    return cuts
