"""What has been done so far, so that a soak that was stopped goes on; and the dated results."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soak.workers import Outcome

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Progress:
    """One part's cases below `done`, and what went wrong among them; those finished beyond it are done again."""

    source: str
    done: int = 0
    seconds: float = 0.0
    failures: list[Outcome] = field(default_factory=list)
    beyond: dict[int, Outcome] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        self.beyond[outcome.case] = outcome
        while (found := self.beyond.pop(self.done, None)) is not None:
            self.done += 1
            if found.failure is not None:
                self.failures.append(found)


class State:
    """The progress of every part, in one file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Progress] = {}
        if path.exists():
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
                failures = [Outcome(**outcome) for outcome in entry.pop("failures")]
                self.parts[name] = Progress(failures=failures, **entry)

    def save(self) -> None:
        entries = {name: asdict(progress) for name, progress in self.parts.items()}
        for entry in entries.values():
            del entry["beyond"]
        write_whole(self.path, entries)


def write_whole(path: Path, content: Any) -> None:
    """Write JSON to `path` so that a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def source_of(folders: Iterable[str]) -> str:
    """A hash of every Python file in `folders` of the repository: results are those of one source."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def write_results(folder: Path, entries: dict[str, dict[str, Any]]) -> Path:
    """Add the parts in `entries` to today's file."""
    path = folder / f"{date.today().isoformat()}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    where = {name: version(name) for name in ("torch", "transformers", "peft")}
    write_whole(
        path,
        {
            "python": platform.python_version(),
            **where,
            "processor": _processor(),
            "parts": dict(sorted({**before, **entries}.items())),
        },
    )
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
