"""A kept start in a file. PEFT has no words for a layer that learns the difference to its start (A0, B0), but for the
pair [A; A − A0] and [B − B0, B0] of twice the rank: such a file is right everywhere, and a note in it says what it is.

PEFT's own files of such inits hold A and B alone and mean them on a base that was moved. Where the start can be made
again from the base, as PEFT itself does when it loads one, they become that pair here.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.peft_config import MADE_ANEW
from lorafit.errors import AdapterError, UsageError, listing
from lorafit.lora.inits import BLANK, BLANK_KEPT, Init, find_init
from lorafit.lora.inject import Plan, plain_modules
from lorafit.lora.layers import scale_of
from lorafit.lora.weights import whole_weight


def widened(plan: Plan, names: Collection[str]) -> Plan:
    """`plan` with twice the rank in the layers `names`, and the alpha that leaves their scale as it is."""
    factor = 2**0.5 if plan.config.rslora else 2
    return _resized(plan, names, lambda r: 2 * r, lambda alpha: factor * alpha)


def narrowed(plan: Plan, names: Collection[str]) -> Plan:
    """The plan that `widened` made this of."""

    def alpha_before(wide: float) -> float:
        if not plan.config.rslora:
            return wide / 2
        near = wide / 2**0.5  # the root is not exact: of the numbers that give `wide` again, the simplest
        found = [a for a in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if 2**0.5 * a == wide]
        return min(found or [near], key=lambda a: len(repr(a)))

    return _resized(plan, names, lambda r: r // 2, alpha_before)


def _resized(
    plan: Plan, names: Collection[str], rank: Callable[[int], int], alpha: Callable[[float], float]
) -> Plan:
    """`plan` with other ranks and alphas in the layers `names`."""
    targets = tuple(replace(t, r=rank(t.r), alpha=alpha(t.alpha)) if t.name in names else t for t in plan.targets)
    config = replace(plan.config, r=rank(plan.config.r), alpha=alpha(plan.config.alpha))
    config = replace(
        config,
        rank_pattern={t.name: t.r for t in targets if t.r != config.r},
        alpha_pattern={t.name: t.alpha for t in targets if t.alpha != config.alpha},
    )
    more = sum((new.r - old.r) * sum(new.shape) for new, old in zip(targets, plan.targets, strict=True))
    return replace(plan, config=config, targets=targets, trainable=plan.trainable + more, total=plan.total + more)


def begun(
    model: nn.Module,
    plan: Plan,
    tensors: dict[str, Tensor],
    config: Mapping[str, Any],
    note: Mapping[str, Any],
    folder: Path,
) -> tuple[Plan, dict[str, Tensor], Init]:
    """Plan and tensors of a file (its configuration, its note) for training to go on, and how the layers begin."""
    anew = config["init_lora_weights"] in MADE_ANEW
    if "init" not in note and not anew:
        return plan, tensors, BLANK
    modules = plain_modules(model)
    if strange := [target.name for target in plan.targets if target.parameter is not None]:
        raise AdapterError(f"{folder}: a start that is kept, in what keeps none: {listing(strange)}")
    kept = [target.name for target in plan.targets if not isinstance(modules[target.layer], nn.Embedding)]
    if "init" in note:
        return _narrowed(plan, kept, note["init"], folder), tensors, BLANK_KEPT
    plan = replace(plan, config=replace(plan.config, init=config["init_lora_weights"]))
    return plan, _with_starts(modules, plan, kept, tensors), BLANK_KEPT


def _narrowed(plan: Plan, kept: Collection[str], init: Any, folder: Path) -> Plan:
    """The plan with the rank that was trained, where `plan` is what the file says."""
    odd = [target.name for target in plan.targets if target.name in kept and target.r % 2]
    if odd or plan.config.r % 2:
        raise AdapterError(f"{folder}: its note says that a start is kept, but an odd rank has none: {listing(odd)}")
    plan = narrowed(plan, kept)
    with suppress(UsageError):  # where it is not registered, its name is lost and nothing else
        plan = replace(plan, config=replace(plan.config, init=find_init(str(init)).name))
    return plan


def _with_starts(
    modules: Mapping[str, nn.Module], plan: Plan, kept: Collection[str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The pairs of twice the rank that are, on an untouched base, what PEFT's pairs A, B are on one less s·B0·A0.

    The signs of A0 and B0 are anybody's guess and do not matter for B0·A0; they are taken so that A − A0 is what was
    learned.
    """
    init = find_init(plan.config.init)
    pairs: dict[str, Tensor] = {}
    for target in plan.targets:
        if target.name not in kept:
            continue
        with torch.no_grad():
            s = scale_of(target.r, target.alpha, plan.config.rslora)
            A0, B0 = init(whole_weight(modules[target.layer]).float(), target.r, s)
        names = f"{target.name}.lora_A.weight", f"{target.name}.lora_B.weight"
        A, B = (tensors[name].to(A0) for name in names)
        signs = torch.where((A * A0).sum(dim=1) < 0, -1.0, 1.0)
        A0, B0 = signs[:, None] * A0, B0 * signs
        pairs |= dict(zip(names, (torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)), strict=True))
    return tensors | pairs
