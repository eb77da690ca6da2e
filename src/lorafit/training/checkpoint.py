"""Exact resume: where the states of a run are kept, and which of them it goes on from.

folder/step-00000120/tensors.safetensors   what is trained, the optimizer's moments, the best weights
folder/step-00000120/run.json              the step, the records, and the settings that the result depends on
folder/step-00000120/manifest.json         sizes and sha256; the versions and the machine that wrote it

Each state is written whole under a new name (`files.py`); the last few are kept. A run goes on from the newest one in
which every bit is as it was written. It ends in the same bits where versions, processor, threads, dtype and device
are the same; elsewhere one line says so.

Of several processes number 0 reads and writes; the others take up what it has, and all prove that they hold the same.
"""

import hashlib
import json
import platform
import re
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lorafit.adapter.fingerprint import base_fingerprint, other_base
from lorafit.config import as_dict
from lorafit.data.batches import Batches
from lorafit.errors import CheckpointError, Interrupted, ProcessError, UsageError, listing
from lorafit.files import (
    MANIFEST,
    damaged,
    need_space,
    new_folder,
    read_manifest,
    remove_folder,
    write_tensors,
    write_text,
)
from lorafit.lora.inject import adapted_layers, attached
from lorafit.training.distributed import broadcast, exchange, together
from lorafit.training.run import Record, Run, check_finite

TENSORS, RUN = "tensors.safetensors", "run.json"
FREE = ("save_every", "keep_checkpoints", "max_bad_steps", "checkpointing", "shard")
"""Settings that may change when a run goes on: they do not change what comes out."""


class Checkpoints:
    """The states of one run, in `folder`; without a folder nothing is kept."""

    def __init__(
        self, run: Run, folder: str | Path | None, evaluation: Batches | None, on_note: Callable[[str], None]
    ) -> None:
        self.run, self.on_note, self.here = run, on_note, run.passes.world
        self.folder = None if folder is None else Path(folder)
        self.evaluation = evaluation
        self.saved: int | None = None
        self.last = time.monotonic()

    def take_up(self, resume: bool) -> None:
        """Go on from the newest whole state if `resume`, and see that there is room for the next ones."""
        if self.here.size > 1:
            prove_alike(settings(self.run, self.evaluation) | {"base model": self._base()})
        with together(self.here):
            self._open(resume)
        if self.here.size > 1:
            share(self.run)
            prove_alike({"adapter": digest(self.run)})

    def _open(self, resume: bool) -> None:
        if self.folder is None or not self.here.is_main:
            return
        if not resume and state_folders(self.folder):
            raise CheckpointError(f"{self.folder} holds an unfinished run: resume it, or choose another folder")
        if states := whole_states(self.folder, self.on_note):
            self._restore(states[-1])
        size = sum(tensor.nbytes for _, tensor in self.run.trained())
        need_space(self.folder, 4 * size * (self.run.config.keep_checkpoints + 1) + size)

    def now_and_then(self) -> None:
        """Save if the last state is older than `save_every` seconds."""
        if time.monotonic() - self.last >= self.run.config.save_every:
            self.save()

    @contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Save the last whole step when the run is stopped inside, or another process of it is lost."""
        try:
            yield
        except (Interrupted, ProcessError) as stopped:
            with together(self.here) if isinstance(stopped, Interrupted) else nullcontext():
                self.save()
            kept = f"saved in {self.folder}" if self.folder else "nothing was saved"
            raise type(stopped)(f"{stopped} after {self.run.taken} of {self.run.steps} steps; {kept}") from None

    def at_the_end(self) -> None:
        """Save the last state, so that what comes after training can be done again."""
        with together(self.here):
            self.save()

    def save(self) -> None:
        """Write the state of the run as a new folder, and let go of the oldest."""
        if self.folder is None or not self.here.is_main or self.saved == self.run.taken:
            return
        tensors, facts = self.run.state()
        check_finite(tensors, self.run.taken)
        target = self.folder / f"step-{self.run.taken:08}"
        if target.exists():  # a damaged one: whole ones are gone on from
            remove_folder(target)
        with new_folder(target, about=environment(self.run)) as folder:
            write_tensors(folder / TENSORS, tensors)
            facts["settings"] = settings(self.run, self.evaluation)
            facts["base"] = self._base()
            write_text(folder / RUN, json.dumps(facts, allow_nan=False))
        self.saved, self.last = self.run.taken, time.monotonic()
        for old in state_folders(self.folder)[: -self.run.config.keep_checkpoints]:
            remove_folder(old)

    def _base(self) -> dict[str, Any]:
        return base_fingerprint(self.run.model, _adapted_layers(self.run.model))

    def _restore(self, path: Path) -> None:
        facts = json.loads((path / RUN).read_bytes())
        was, now = facts.pop("settings"), settings(self.run, self.evaluation)
        changed = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]
        if changed:
            raise CheckpointError(
                f"{path}: this run began with other settings: {listing(changed, 4)}; give the same, or begin a new run"
            )
        if difference := other_base(facts.pop("base"), self.run.model, _adapted_layers(self.run.model)):
            raise CheckpointError(f"{path}: this run was begun on another base model ({difference})")
        about, here = {"processes": 1, **(read_manifest(path) or {})}, environment(self.run)
        moved = [f"{name} {about.get(name)}, here {here[name]}" for name in here if about.get(name) != here[name]]
        if moved:
            self.on_note(f"{path} was written with {listing(moved, 4)}: the run goes on, equal to rounding")
        self.run.restore(load_file(path / TENSORS), facts)
        self.saved = self.run.taken
        self.on_note(f"going on after step {self.run.taken} of {self.run.steps}, from {path}")


def prove_alike(facts: Mapping[str, Any]) -> None:
    """UsageError, the same on every process, if one of them has other `facts` than process 0."""
    first, *others = exchange(facts)
    for rank, found in enumerate(others, start=1):
        if names := sorted(name for name in first | found if first.get(name) != found.get(name)):
            raise UsageError(
                f"process {rank} differs from process 0 in {listing(names)}: "
                "start all of them with the same model, data and settings"
            )


def share(run: Run) -> None:
    """Every process takes up the state of process 0: its adapter, and all that it went on with."""
    tensors, facts = run.state() if run.passes.world.is_main else ({}, {})
    forms = [(name, str(tensor.dtype).removeprefix("torch."), tensor.shape) for name, tensor in tensors.items()]
    (facts, forms), *_ = exchange((facts, forms))
    if not run.passes.world.is_main:
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in forms}
    broadcast(tensors.values())
    if not run.passes.world.is_main:
        run.restore(tensors, facts)


def digest(run: Run) -> str:
    """A hash of everything that training changes, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in run.trained():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_folders(folder: Path) -> list[Path]:
    """All states in `folder`, whole or not, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def whole_states(folder: Path, on_note: Callable[[str], None] = lambda sentence: None) -> list[Path]:
    """The states in `folder` up to the newest whole one; `on_note` hears of each damaged one after that."""
    states = state_folders(folder)
    while states:
        problems = damaged(states[-1]) if (states[-1] / MANIFEST).is_file() else [f"{MANIFEST} is missing"]
        if not problems:
            return states
        on_note(f"{states.pop()} is damaged ({listing(problems, 2)}): not used")
    return []


def saved_records(folder: Path) -> list[Record]:
    """The records of the steps that a run which goes on from `folder` will not do again."""
    states = whole_states(folder)
    records: list[Record] = json.loads((states[-1] / RUN).read_bytes())["history"] if states else []
    return records


def settings(run: Run, evaluation: Batches | None) -> dict[str, Any]:
    """Everything that the result depends on, by name, as JSON gives it back."""
    batches, found = run.batches, attached(run.model)
    adapter = as_dict(found.plan.config) if found else {}
    chosen = {name: value for name, value in as_dict(run.config).items() if name not in FREE}
    made = {name: getattr(batches, name) for name in ("batch_size", "accumulate", "max_tokens_per_pack", "shuffle")}
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in run.trained())
    layers = [(t.name, t.r, t.alpha) for t in found.plan.targets] if found else []
    described = {
        **adapter,
        **chosen,
        **made,
        "order of the rows": batches.seed,
        "packed": run.passes.packed,
        "rows": _digest_rows(batches),
        "held-out rows": _digest_rows(evaluation) if evaluation else None,
        "storage": sorted({type(layer).__name__ for layer in _adapted_layers(run.model).values()}),
        "trained layers": hashlib.sha256(repr((shapes, layers)).encode()).hexdigest()[:16],
    }
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    found = attached(model)
    return adapted_layers(model, found.plan) if found else {}


def _digest_rows(batches: Batches) -> str:
    digest = hashlib.sha256()
    for row in batches.examples:
        digest.update(array("q", [len(row.ids), *row.ids, *row.labels]).tobytes())
    return f"{len(batches.examples)} rows, {digest.hexdigest()[:16]}"


def environment(run: Run) -> dict[str, Any]:
    """What the last bits of a result depend on beside the settings."""
    parameter = next(run.model.parameters())
    on_gpu = parameter.device.type == "cuda"
    return {
        **_versions(),
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(parameter.device) if on_gpu else parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "processes": run.passes.world.size,
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("lorafit", "torch", "transformers")}
