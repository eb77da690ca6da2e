"""Runs, each in a process of its own, and what is there of them already."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import environment
from lorafit.files import write_json

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


def run_once(module: str, flags: Record, out: Path, like: Record, *, fresh: bool = False) -> tuple[Record, bool]:
    """The record that `python -m module --flags --out` leaves in `out`, and whether it was there already.

    It counts as there if all that `like` says is true of it and the run did not fail. A run that fails leaves a record
    too, of `like` and why: under "failed".
    """
    found = None if fresh else read(out)
    if found and "failed" not in found and alike(found, like):
        return found, True
    told = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items() if value is not False]
    command = [sys.executable, "-m", module, "--out", str(out), *told]
    variables = os.environ | environment(like["machine"]["threads"])
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        write_json(out, like | flags | {"failed": _why(done)})
    else:
        write_json(out, json.loads(out.read_text()) | like)
    return json.loads(out.read_text()), False


def read(path: Path) -> Record | None:
    found: Record | None = json.loads(path.read_text()) if path.exists() else None
    return found


def read_all(paths: Iterable[Path], like: Record) -> list[Record]:
    """The records in `paths` of which all that `like` says is true."""
    return [found for path in sorted(paths) if (found := read(path)) is not None and alike(found, like)]


def alike(record: Record, like: Record) -> bool:
    """Whether `record` has all that `like` says; a setting that is None there may be anything."""
    return all(_same(record.get(key), value) for key, value in like.items())


def _same(found: Any, asked: Any) -> bool:
    if isinstance(asked, dict) and isinstance(found, dict) and None in asked.values():
        return found.keys() == asked.keys() and all(found[key] == v for key, v in asked.items() if v is not None)
    return bool(found == asked)


def code(folders: Iterable[str]) -> str:
    """A short hash of the Python files of these folders: a run of other code is another run."""
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit status {done.returncode}"
