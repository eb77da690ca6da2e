"""Killed, or refused by the disk, at every single call that a save makes: a reader finds the old or the new one.

Two ways to get below a save. `files.py` reaches the system through one table, whose k-th call is made to fail or to be
the last; that covers every call of ours. Where a process may be traced, strace does the same to the k-th system call
of a kind, whoever makes it, the libraries included.
"""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, load_lora, save_lora
from lorafit.data.chat import Example
from lorafit.errors import DiskError, LorafitError
from lorafit.files import SYSTEM, append_line, damaged, write_json
from lorafit.model.load import save_model
from lorafit.training.checkpoint import RUN, Checkpoints, whole_states
from lorafit.training.loop import begin
from soak import training

NAME = "crashes"
WHAT = "a save that is killed or refused at its k-th call leaves the old or the new one, and the next save succeeds"

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
CALLS = ("mkdir", "openat", "write", "fsync", "chmod", "fchmod", "rename", "renameat2", "unlink", "rmdir", "ftruncate")
"""System calls by which a save changes the disk; those that one does not make are found to be none."""
TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Save:
    """Something that is saved: how to bring the old one there, save the new one, and tell which of them is there."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]
    read: Callable[[Path], str | None]


@functools.cache
def model(version: int) -> nn.Module:
    """A tiny model with an adapter; the versions differ in the adapter alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
        torch.manual_seed(version)
        add_lora(made, LoraConfig(r=2, init="gaussian_both"))
    return made


def adapter_of(folder: Path) -> str | None:
    """Which version's adapter is in `folder`."""
    if not (folder / "adapter").exists():
        return None
    with torch.random.fork_rng():
        base = model(0)
        load_lora(base, folder / "adapter")
    for version in (1, 2):
        ours, theirs = (dict(m.named_parameters()) for m in (base, model(version)))
        if all(torch.equal(ours[name], p) for name, p in theirs.items()):
            return {1: "old", 2: "new"}[version]
    return "another one"


@functools.cache
def run_of(version: int) -> Any:
    run = begin(model(version), Batches([Example([1, 2, 3], [-100, 2, 3], "row")]), TrainConfig(keep_checkpoints=2))
    return run


def checkpoints(folder: Path, versions: dict[int, int]) -> None:
    """Save a state for each step of {step: version}."""
    for step, version in versions.items():
        run = run_of(version)
        run.step = step
        Checkpoints(run, folder / "checkpoints", None, lambda sentence: None).save()


def checkpoint_of(folder: Path) -> str | None:
    states = whole_states(folder / "checkpoints")
    step = json.loads((states[-1] / RUN).read_text())["step"] if states else None
    return {None: None, 2: "old", 3: "new"}.get(step, "another one")


def merged(folder: Path) -> None:
    tokenizer = SimpleNamespace(save_pretrained=lambda where: (where / "tokenizer.json").write_text("{}"))
    save_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), tokenizer, folder / "merged", ())


def merged_of(folder: Path) -> str | None:
    if not (folder / "merged").exists():
        return None
    return "new" if not damaged(folder / "merged") and (folder / "merged/manifest.json").is_file() else "another one"


def text_of(folder: Path) -> str | None:
    file = folder / "file.json"
    return json.loads(file.read_text()) if file.exists() else None


def lines_of(folder: Path) -> str | None:
    text = (folder / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    known = {("old",): "old", ("old", "new"): "new"}
    return known.get(tuple(lines), "another one") if text.endswith("\n") else "half a line"


def nothing(folder: Path) -> None:
    pass


SAVES = {
    "adapter, fresh": Save(nothing, lambda f: save_lora(model(2), f / "adapter"), adapter_of),
    "adapter, over the old one": Save(
        lambda f: save_lora(model(1), f / "adapter"), lambda f: save_lora(model(2), f / "adapter"), adapter_of
    ),
    "checkpoint, rotated": Save(
        lambda f: checkpoints(f, {1: 1, 2: 1}), lambda f: checkpoints(f, {3: 2}), checkpoint_of
    ),
    "merged model": Save(nothing, merged, merged_of),
    "file": Save(lambda f: write_json(f / "file.json", "old"), lambda f: write_json(f / "file.json", "new"), text_of),
    "log line": Save(
        lambda f: append_line(f / "log.jsonl", "old"), lambda f: append_line(f / "log.jsonl", "new"), lines_of
    ),
}


# --- faults in the table of calls -------------------------------------------------------------------


def with_fault(act: Callable[[], object], action: str, k: int) -> int:
    """Do `act`, its k-th call the last one ("kill"), torn in half ("torn") or refused; returns how many there were."""
    count, before = 0, dict(vars(SYSTEM))

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count == k:
                if action in ("torn", "short") and name == "write":
                    before["write"](given[0], bytes(given[1])[: len(given[1]) // 2])
                if action in ("kill", "torn"):
                    os.kill(os.getpid(), signal.SIGKILL)
                code = ERRORS.get(action, errno.ENOSPC)
                raise OSError(code, os.strerror(code))
            return before[name](*given)

        return call

    try:
        vars(SYSTEM).update({name: wrapped(name) for name in before})
        act()
    finally:
        vars(SYSTEM).update(before)
    return count


def in_child(act: Callable[[], object], ready: Callable[[int], None] = lambda pid: None) -> str:
    """Do `act` in a forked process: "done", "killed", "refused" in one line, or what else became of it."""
    reading, writing = os.pipe()
    gate, opened = os.pipe()
    pid = training.fork()
    if pid == 0:
        said = "done"
        try:
            os.read(gate, 1)
            act()
        except DiskError as error:
            said = "refused" if len(str(error).splitlines()) == 1 else f"several lines: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.writev(writing, [said.encode()])  # not the call that is being refused
        os._exit(0)
    os.close(writing)
    os.close(gate)
    try:
        ready(pid)
    finally:
        os.write(opened, b"!")
        os.close(opened)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
    return said or ("killed" if os.WIFSIGNALED(status) else f"exit {status}")


# --- the same below the libraries -------------------------------------------------------------------


@functools.cache
def traceable() -> bool:
    """Whether there is an strace here that may attach."""
    if not shutil.which("strace"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return bool(traced(nothing, Path(folder), "trace=mkdir")[1] is not None)


def traced(act: Callable[[Path], object], folder: Path, expression: str) -> tuple[str, str | None]:
    """What became of `act` in a process traced with `expression`, and the trace."""
    log = folder.parent / f"{folder.name}.trace"
    tracer: list[subprocess.Popen[bytes]] = []

    def attach(pid: int) -> None:
        tracer.append(
            subprocess.Popen(["strace", "-f", "-o", str(log), "-e", expression, "-p", str(pid)], stderr=subprocess.PIPE)
        )
        assert tracer[0].stderr is not None
        tracer[0].stderr.readline()  # "Process … attached", or why not

    said = in_child(lambda: act(folder), attach)
    tracer[0].communicate()
    return said, log.read_text() if log.exists() and tracer[0].returncode == 0 else None


# --- the cases --------------------------------------------------------------------------------------


@functools.cache
def cases() -> tuple[tuple[str, str, str, int], ...]:
    """(save, how, action, k) of every call of every save: counted, not guessed."""
    found = []
    for name, save in SAVES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "w"
            folder.mkdir()
            save.old(folder)
            calls = with_fault(lambda: save.new(folder), "none", -1)  # noqa: B023
        actions = ["kill", "ENOSPC", "EIO", "short"] + (["torn"] if name != "log line" else [])
        found += [(name, "table", action, k) for action in actions for k in range(1, calls + 1)]
        if traceable():
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "w"
                folder.mkdir()
                save.old(folder)
                _, trace = traced(save.new, folder, f"trace={','.join(CALLS)}")
            for call in CALLS:
                made = [line for line in (trace or "").splitlines() if f" {call}(" in line and "O_RDONLY" not in line]
                actions = ["signal=SIGKILL", "error=EIO", "error=ENOSPC"]
                found += [(name, call, action, k) for action in actions for k in range(1, len(made) + 1)]
    return tuple(found)


def run(case: int, folder: Path) -> str | None:
    """Case number `case` of `cases()`."""
    name, how, action, k = cases()[case % len(cases())]
    save = SAVES[name]
    save.old(folder)
    old = save.read(folder)
    if how == "table":
        said = in_child(lambda: with_fault(lambda: save.new(folder), action, k))
    else:
        said, _ = traced(save.new, folder, f"inject={how}:{action}:when={k}")
    label = f"{name}, {action} at {how} call {k}"
    if said not in ("done", "refused", "killed"):
        return f"{label}: {said}"
    try:
        found = save.read(folder)
    except (LorafitError, OSError, ValueError) as error:
        return f"{label} ({said}): what is there cannot be read: {error}"
    if found not in (old, "new"):
        return f"{label} ({said}): found {found}"
    if said == "done" and found != "new":
        return f"{label}: it said that it was done, and there is {found}"
    shutil.rmtree(folder / "merged", ignore_errors=True)
    save.new(folder)
    if name != "log line" and save.read(folder) != "new":
        return f"{label} ({said}): the next save did not succeed"
    left = [path.name for path in leftovers(folder) if name != "file"]
    return f"{label} ({said}): {left} are left" if left else None


def leftovers(folder: Path) -> Iterator[Path]:
    return folder.rglob(".*lorafit-tmp-*")


COUNT = LONG = len(cases())
