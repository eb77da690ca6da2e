"""What an init wants to know from data, gathered from a few rows of it, and the A and B that it makes of that.

The rows run through the plain model as they do in training. Hooks on the layers to be adapted keep sums only: the
moments of what goes in, or Σ ḡᵀ·x, which is the gradient of the layer's weight. No weight requires a gradient, so
beside these sums there is never more than one layer's, and no optimizer. Where the sums of all layers do not fit into
memory, the layers are taken in groups and the rows run once for each; the result is the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.config import LoraConfig
from lorafit.data.batches import Batch, Batches, collate
from lorafit.errors import UsageError, said_of
from lorafit.lora.inits import Init, Moments, Pair, Statistic, factor_dtype, find_init
from lorafit.lora.inject import Target, attached, find_targets
from lorafit.lora.layers import scale_of
from lorafit.lora.weights import read_weight, whole_weight
from lorafit.training.attention import row_attention
from lorafit.training.distributed import smallest
from lorafit.training.loop import plan_passes
from lorafit.training.memory import free_memory
from lorafit.training.modes import evaluating
from lorafit.training.run import Passes

SHARE = 0.5
"""Of the free memory, what the sums may take; the rest is for the passes."""
Note = Callable[[str], None]
Progress = Callable[[int, int], None]


class Calibrated(NamedTuple):
    """What `add_lora` takes behind the model: the configuration with the ranks that were found, and A, B by layer."""

    config: LoraConfig
    starts: Mapping[str, Pair]


def calibrate(
    model: nn.Module,
    config: LoraConfig,
    batches: Batches,
    *,
    on_progress: Progress = lambda done, total: None,
    on_note: Note = lambda sentence: None,
) -> Calibrated:
    """A and B for the plain `model` by an init that looks at data: at the first `init_rows` rows of `batches`.

    `add_lora(model, *calibrate(model, config, batches))`. Where the init shares ranks out (and `init_rho` is above 1,
    and no `rank_pattern` given) the configuration that is returned names them, with alphas that leave every layer's
    scale as it is. For an init that needs no data there is nothing to do. `on_progress` hears of (rows done, rows in
    all). Leaves the model as it was. Raises UsageError for a layer that no row reaches, or of too few directions.
    """
    init = find_init(config.init)
    if init.statistic is None:
        return Calibrated(config, {})
    if attached(model) is not None:
        raise UsageError("this model already carries an adapter: calibrate looks at the plain model, before add_lora")
    targets = [
        target
        for target in find_targets(model, config).targets
        if not isinstance(model.get_submodule(target.name), nn.Embedding)
    ]
    rho = max(1.0, config.init_rho) if init.shares is not None and not config.rank_pattern else 1.0
    starts, shares = {}, {}
    with _frozen(model), evaluating(model):
        for target, statistic in _statistics(model, config, init, targets, batches, on_progress, on_note):
            most = max(target.r, min(round(rho * target.r), *target.shape))
            W, s = whole_weight(model.get_submodule(target.name)), scale_of(target.r, target.alpha, config.rslora)
            with said_of(target.name):
                starts[target.name] = init(W, most, s, statistic)
            if init.shares is not None:
                shares[target.name] = init.shares(statistic)[:most].cpu()
    return Calibrated(config, starts) if rho == 1 else _shared_out(config, targets, starts, shares)


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks that add up to `budget`: the directions that count most over all layers, and at least one in each.

    `shares` are what each direction of a layer counts, falling; a layer gets no more ranks than it has of these.
    """
    ranks = dict.fromkeys(shares, 1)
    owners = [name for name, values in shares.items() for _ in values[1:]]
    order = torch.cat([values[1:] for values in shares.values()]).argsort(descending=True, stable=True)
    for place in order[: max(0, budget - len(ranks))].tolist():
        ranks[owners[place]] += 1
    return ranks


def _shared_out(
    config: LoraConfig, targets: list[Target], starts: Mapping[str, Pair], shares: Mapping[str, Tensor]
) -> Calibrated:
    """The starts cut to the ranks that `share_out` gives them, and the configuration that says so."""
    ranks = share_out(shares, sum(target.r for target in targets))
    grown = {t.name: scale_of(t.r, 1, config.rslora) / scale_of(ranks[t.name], 1, config.rslora) for t in targets}
    changed = [target for target in targets if ranks[target.name] != target.r]
    found = replace(
        config,
        rank_pattern={target.name: ranks[target.name] for target in changed},
        alpha_pattern={**config.alpha_pattern, **{t.name: t.alpha * grown[t.name] for t in changed}},
    )
    return Calibrated(found, {n: (A[: ranks[n]].clone(), B[:, : ranks[n]].clone()) for n, (A, B) in starts.items()})


# --- gathering ----------------------------------------------------------------------------------------


def _statistics(
    model: nn.Module,
    config: LoraConfig,
    init: Init,
    targets: list[Target],
    batches: Batches,
    on_progress: Progress,
    on_note: Note,
) -> Iterator[tuple[Target, Any]]:
    """What `init` wants to know of each layer, for as many layers at a time as fit into memory."""
    assert init.statistic is not None
    passes = plan_passes(model, batches, on_note)
    free = free_memory(next(model.parameters()).device)
    if passes.sharded and free is not None:  # all processes see the same rows in the same passes
        free = int(smallest(free)[0])
    groups = list(_groups(targets, init.statistic, free))
    if len(groups) > 1:
        on_note(f"init '{init.name}': the sums of all layers do not fit into memory: the rows run {len(groups)} times")
    rows = min(config.init_rows, len(batches.examples))
    for number, group in enumerate(groups):

        def tell(done: int, before: int = number * rows) -> None:
            on_progress(before + min(done, rows), len(groups) * rows)

        gather = partial(_gather, model, group, init.statistic, batches, rows, passes, tell)
        found = passes.limit.within(gather, on_note)
        while group:  # nothing else holds a statistic that has been used
            target = group.pop(0)
            yield target, found.pop(target.name)


def _groups(targets: list[Target], kind: Statistic, free: int | None) -> Iterator[list[Target]]:
    """The layers, in the model's order, in groups whose sums fit into a share of the free memory."""
    group: list[Target] = []
    size = 0
    for target in targets:
        out, in_ = target.shape
        needed = 4 * in_ * (in_ if kind == "inputs" else out)
        if group and free is not None and size + needed > SHARE * free:
            yield group
            group, size = [], 0
        group.append(target)
        size += needed
    yield group


def _gather(
    model: nn.Module,
    group: list[Target],
    kind: Statistic,
    batches: Batches,
    rows: int,
    passes: Passes,
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """The statistic of each layer of `group`, over the first `rows` rows."""
    device = next(model.parameters()).device
    layers = {target.name: model.get_submodule(target.name) for target in group}
    if passes.head is not None and passes.head.output in layers.values():
        passes = replace(passes, head=None)  # the head has to be called for its hook to see anything
    watched = [Inputs(layer) if kind == "inputs" else Gradient(layer) for layer in layers.values()]
    done = tokens = 0
    try:
        for batch in _first(batches, rows, passes):
            with passes.limit.fits(batch), row_attention(model, batch), torch.set_grad_enabled(kind == "gradient"):
                loss = passes.loss(model, batch.to(device), 1)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            done, tokens = done + len(batch.lengths), tokens + batch.targets.numel()
            tell(done)
    finally:
        for watch in watched:
            watch.handle.remove()
    found = {}
    for name, watch in zip(layers, watched, strict=True):
        with said_of(name):
            found[name] = watch.statistic(tokens)
    return found


def _first(batches: Batches, rows: int, passes: Passes) -> Iterator[Batch]:
    """Passes over the first `rows` rows (and the rest of the last pass): packed, or a row each, so without padding."""
    for step in range(batches.steps_per_epoch):
        alone = (collate([row], packed=False) for row in batches.rows(step))
        for batch in passes.window(batches, step) if passes.packed else alone:
            if rows <= 0:
                return
            rows -= len(batch.lengths)
            yield batch


class Inputs:
    """The moments of all that goes into a layer."""

    def __init__(self, layer: nn.Module) -> None:
        W = read_weight(layer)
        mean = torch.zeros(W.shape[1], dtype=factor_dtype(W), device=W.device)
        self.moments = Moments(0, mean, torch.diag_embed(mean))
        self.handle = layer.register_forward_hook(self.see)

    def see(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if args[0].numel():
            self.moments.add(args[0].detach().flatten(0, -2))

    def statistic(self, tokens: int) -> Moments:
        if self.moments.count == 0:
            raise UsageError("no row reaches this layer, so that its init knows nothing: exclude it")
        return self.moments


class Gradient:
    """Σ ḡᵀ·x over all that goes through a layer: the gradient of its weight, however that is stored."""

    def __init__(self, layer: nn.Module) -> None:
        W = read_weight(layer)
        self.sum = torch.zeros(W.shape, dtype=factor_dtype(W), device=W.device)
        self.handle = layer.register_forward_hook(self.see)

    def see(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach()
        begins = not y.requires_grad  # nothing below asks for a gradient: it is followed down to here
        y = y.detach().requires_grad_() if begins else y
        y.register_hook(partial(self.add, x))  # type: ignore[no-untyped-call]
        return y.clone() if begins else y  # what the model goes on with may be changed in place

    def add(self, x: Tensor, grad: Tensor) -> None:
        wide = self.sum.dtype
        self.sum.addmm_(grad.flatten(0, -2).to(wide).T, x.flatten(0, -2).to(wide))

    def statistic(self, tokens: int) -> Tensor:
        if not self.sum.any():
            raise UsageError("no row's loss depends on this layer, so that its init knows nothing: exclude it")
        return self.sum / max(tokens, 1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; afterwards each that did does again."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
