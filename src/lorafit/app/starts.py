"""The start of a fresh adapter, for a command: made from the weights or from the data, with progress, or described."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.app.rows import counted
from lorafit.config import LoraConfig, as_dict
from lorafit.data.batches import Batches
from lorafit.errors import UsageError, said_of
from lorafit.lora.inits import BLANK, BLANK_KEPT, find_init
from lorafit.lora.inject import Plan, add_lora, execute, find_targets
from lorafit.lora.layers import scale_of
from lorafit.lora.names import collapse
from lorafit.lora.weights import whole_weight
from lorafit.training.calibrate import Calibrated, calibrate
from lorafit.training.checkpoint import whole_states
from lorafit.training.distributed import exchange, main_first
from lorafit.training.sharding import is_sharded
from lorafit.world import World

Note = Callable[[str], None]


def put_in(
    net: nn.Module, config: LoraConfig, batches: Batches, on_note: Note, *, kept_in: Path | None = None, here: World
) -> Plan:
    """`add_lora`, behind a look at the data where the init wants one.

    Where `kept_in` holds a state of the run, the values are about to be read from it: what takes long to make is not
    made. Of several processes only the first makes values; `train` gives them to the others. Where each has a slice of
    the base they put one layer after the other together for it, and all make the same.
    """
    init, plan, sharded = find_init(config.init), None, is_sharded(net)
    slow = init.start == "kept" or init.statistic is not None
    with nullcontext() if sharded else main_first(here):
        restored = slow and here.is_main and kept_in is not None and bool(whole_states(kept_in))
        if here.is_main or sharded:
            if exchange(restored)[0] if sharded else restored:
                plan = laid_out(net, config)
            else:
                plan = add_lora(net, *looked_at(net, config, batches, on_note))
    found = exchange(as_dict(plan.config) if plan else None)[0]
    return plan or laid_out(net, LoraConfig(**found))


def looked_at(net: nn.Module, config: LoraConfig, batches: Batches | None, on_note: Note) -> Calibrated:
    """`calibrate`, with progress; UsageError if the init needs data and there is none."""
    if find_init(config.init).statistic is None:
        return Calibrated(config, {})
    if batches is None:
        raise UsageError(f"init '{config.init}' looks at data: give --data")
    with counted(f"init {config.init} looks at the data") as progress:
        return calibrate(net, config, batches, on_progress=progress, on_note=on_note)


def laid_out(net: nn.Module, config: LoraConfig) -> Plan:
    """The adapter of `config` in `net` with no values in it yet; `net` may be without values itself."""
    plan = find_targets(net, config)
    execute(net, plan, BLANK_KEPT if find_init(config.init).start == "kept" else BLANK)
    return plan


def described(net: nn.Module, config: LoraConfig, starts: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
    """A line per kind of layer: how much of ‖W‖² is in s·B·A at the start, which is what such an init trains first."""
    init, shares = find_init(config.init), dict[str, float]()
    for target in find_targets(net, config).targets:
        layer = net.get_submodule(target.name)
        if isinstance(layer, nn.Embedding):
            continue
        W, s = whole_weight(layer), scale_of(target.r, target.alpha, config.rslora)
        with torch.no_grad(), said_of(target.name):
            A, B = starts[target.name] if target.name in starts else init(W, target.r, s)
            shares[target.name] = (s**2 * ((B.T @ B) * (A @ A.T)).sum() / W.to(A.dtype).square().sum()).item()
    yield f"init {config.init}: share of ‖W‖² in s·B·A at the start"
    kinds: dict[str, list[str]] = {}
    for name in shares:
        kinds.setdefault(".".join("#" if part.isdigit() else part for part in name.split(".")), []).append(name)
    for names in kinds.values():
        found = [shares[name] for name in names]
        ((text, count),) = collapse(names)
        mean = sum(found) / count
        yield f"  {text}  ×{count}   mean {mean:.2%}, {min(found):.2%} to {max(found):.2%}"
