"""The training loop, on one page.

One optimizer step is a window of forward passes. Its loss is one sum over all of them, divided once by the number of
supervised tokens in all of them: 8 rows at once, 8 times 1 row, packed or padded are the same step.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path

import torch
from torch import nn

from lorafit.config import TrainConfig
from lorafit.data.batches import Batches
from lorafit.errors import NumericError, UsageError, listing
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraLinear
from lorafit.training.attention import packs_exactly, row_attention
from lorafit.training.backoff import PassLimit
from lorafit.training.checkpoint import Checkpoints
from lorafit.training.distributed import all_reduce, smallest, together, world
from lorafit.training.loss import find_head
from lorafit.training.memory import automatic_limit
from lorafit.training.modes import evaluating
from lorafit.training.neftune import noisy
from lorafit.training.optim import lr_at, make_optimizer
from lorafit.training.run import Passes, Record, Result, Run, Stop, heed
from lorafit.training.sharding import is_sharded
from lorafit.training.ways import as_asked
from lorafit.world import ALONE, World

Note = Callable[[str], None]


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig | None = None,
    *,
    evaluation: Batches | None = None,
    checkpoints: str | Path | None = None,
    resume: str | Path | None = None,
    on_step: Callable[[Record], None] = lambda record: None,
    on_note: Note = lambda sentence: None,
    stop: Stop = lambda: None,
) -> Result:
    """Train everything in `model` that requires gradients (after `add_lora`: the adapter) on `batches`.

    Where `torch.distributed` is initialised, the processes share the rows of each step, and of `evaluation`, and end
    with the same adapter; process 0 alone reads and writes `checkpoints`, and its adapter is the one that is trained.

    `evaluation` is looked at every `eval_every` steps. `checkpoints` is a folder to keep the last few states of the
    run in; `resume` is such a folder too, and the run goes on from the newest whole state in it, to the same bits as
    if it had never been cut off (or begins, if there is none). `on_step` gets each step's record, `on_note` a
    sentence when something is done in another way than asked. `stop` is asked between forward passes; if it answers,
    the last whole step is saved and Interrupted raised.

    Leaves the model in evaluation mode, with the best weights if asked. A step whose loss or gradient is not finite is
    not taken; `max_bad_steps` of them in a row raise NumericError. CheckpointError: other settings than the run began
    with.
    """
    config = config or TrainConfig()
    run = begin(model, batches, config, on_note)
    stop = run.passes.asking(stop)
    saves = Checkpoints(run, resume or checkpoints, evaluation, on_note)
    saves.take_up(resume is not None)
    with _training(run, on_note), saves.kept_when_stopped():
        while run.step < run.steps and not run.result.stopped_early:
            run.pending = run.pending or take_step(run, stop=stop, on_note=on_note)
            if evaluation is not None and run.due:
                run.evaluated(evaluate(model, evaluation, passes=run.passes, stop=stop, on_note=on_note))
            on_step(run.complete())
            saves.now_and_then()
    saves.at_the_end()
    _say_if_nothing_moved(model, on_note)
    return run.finish()


def _in_smaller_passes(take: Callable[..., Record]) -> Callable[..., Record]:
    """Where a pass of the step does not fit into memory, it is taken again from its beginning."""

    @wraps(take)
    def whole(run: Run, *, stop: Stop = lambda: None, on_note: Note = lambda sentence: None) -> Record:
        return run.passes.limit.within(partial(take, run, stop=stop, on_note=on_note), on_note)

    return whole


@_in_smaller_passes
def take_step(run: Run, *, stop: Stop = lambda: None, on_note: Note = lambda sentence: None) -> Record:
    """One optimizer step: forward and backward over its window, clip, update. Returns its record."""
    began, model = time.perf_counter(), run.model
    tokens = run.batches.tokens(run.step)
    total = torch.zeros((), dtype=torch.float64)
    run.gradients.begin()
    with together(run.passes.world, total):
        for number, batch in enumerate(run.passes.window(run.batches, run.step)):
            heed(stop)
            torch.manual_seed(run.passes.seed(number, run.config.seed, run.step))  # dropout and noise need no more
            with run.passes.limit.fits(batch), row_attention(model, batch), noisy(model, batch, run.config.neftune):
                loss = run.passes.loss(model, batch.to(run.device), max(tokens, 1))
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().cpu()
    all_reduce(run.gradients.buffers)
    lr, norm = lr_at(run.step, run.steps, run.config), run.gradients.clip(run.config.max_grad_norm)
    finite = math.isfinite(total) and math.isfinite(norm)
    if not finite:
        _refuse(run, total.item(), norm, on_note)
    elif tokens:  # a step without supervised tokens must not move anything: AdamW's momentum would
        run.bad = 0
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        run.optimizer.step()
    return {
        "step": run.step,
        "epoch": run.step // run.batches.steps_per_epoch,
        "loss": total.item() if finite else None,
        "grad_norm": norm if finite else None,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "memory_mb": memory_mb(run.device),
    }


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    passes: Passes | None = None,
    stop: Stop = lambda: None,
    on_note: Note = lambda sentence: None,
) -> float:
    """The loss per supervised token over all rows of `batches`, each once, without dropout."""
    passes = passes or plan_passes(model, batches)
    return passes.limit.within(partial(_try_evaluation, model, batches, passes, stop), on_note)


@torch.no_grad()
def _try_evaluation(model: nn.Module, batches: Batches, passes: Passes, stop: Stop) -> float:
    device = next(model.parameters()).device
    total, tokens = torch.zeros(2, dtype=torch.float64)
    with evaluating(model), together(passes.world, total, tokens):
        for step in range(batches.steps_per_epoch):
            for batch in passes.window(batches, step):
                heed(stop)
                with passes.limit.fits(batch), row_attention(model, batch):
                    total += passes.loss(model, batch.to(device), 1).item()
                tokens += batch.targets.numel()
    return float(total / tokens.clamp(min=1))


def begin(model: nn.Module, batches: Batches, config: TrainConfig, on_note: Note = lambda sentence: None) -> Run:
    """A run before its first step."""
    if config.shard and not is_sharded(model):
        raise UsageError("shard: this model was loaded whole: load_model(…, shard=True), in every process")
    passes = plan_passes(model, batches, on_note, config.checkpointing, world())
    return Run(model, batches, config, passes, make_optimizer(model, config), count_steps(config, batches))


def plan_passes(
    model: nn.Module,
    batches: Batches,
    on_note: Note = lambda sentence: None,
    checkpointing: bool = False,
    here: World = ALONE,
) -> Passes:
    """Try once how this model can be run; `on_note` hears of it when rows have to be padded.

    Of several processes all come here, each as `here`, and run it in the same way.
    """
    packed = batches.packing and packs_exactly(model)
    limit = automatic_limit(model, batches, checkpointing, here.local_size)
    sharded = is_sharded(model)
    if here.size > 1 or sharded:
        packs, fits = smallest(packed, limit or math.inf)
        packed, limit = bool(packs), int(fits) if math.isfinite(fits) else None
    if batches.packing and not packed:
        on_note(f"{type(model).__name__} does not keep packed rows apart: rows are padded instead")
    return Passes(packed, find_head(model), PassLimit(limit, sharded=sharded), here, sharded)


def count_steps(config: TrainConfig, batches: Batches) -> int:
    """How many optimizer steps a run takes."""
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    return max(1, steps)


def _refuse(run: Run, loss: float, norm: float, on_note: Note) -> None:
    """A step that must not be taken: say which rows it was made of, and stop when there are too many of them."""
    run.bad += 1
    rows = listing(row.source for row in run.batches.rows(run.step))
    said = f"step {run.step}: loss {loss:.4g}, gradient norm {norm:.4g}: not taken; its rows: {rows}"
    if run.bad >= min(run.config.max_bad_steps, run.steps):
        raise NumericError(f"{said}; the {run.bad}. such step in a row; lower lr, or look for broken rows or weights")
    on_note(said)


def _say_if_nothing_moved(model: nn.Module, on_note: Note) -> None:
    layers = [layer for _, layer in wrappers(model) if isinstance(layer, LoraLinear)]
    if layers and not any(layer.moved() for layer in layers):
        on_note("nothing was learned: s·B·A is still zero in every layer, so the model answers as before")


@contextmanager
def _training(run: Run, on_note: Note) -> Iterator[None]:
    """Training mode with the caller's random state given back; evaluation mode afterwards."""
    model = run.model
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            with as_asked(run, on_note):
                yield
        finally:
            run.gradients.end()
            model.eval()


def memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MiB: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
