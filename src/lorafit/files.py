"""The only writer: a folder appears whole, or not at all.

Everything is written under a temporary name beside its final place, forced to disk, and moved there in one
step. A reader that comes at any moment, or after a crash, finds the old folder or the new one.
"""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorafit.errors import DiskError, listing


@contextmanager
def new_folder(path: str | Path, replaces: Iterable[str] | None = None) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends without an error.

    An existing `path` is exchanged for the new folder only if it is empty or holds nothing but files matching
    the patterns in `replaces` (None: whatever it holds); otherwise DiskError, and nothing is lost.
    """
    target = Path(path).expanduser().resolve()
    _check_replaceable(target, replaces)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        _move(temporary, target)
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole, or leave the old one."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DiskError(f"{target}: cannot be written: {error.strerror or error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON, in a single write."""
    line = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check_replaceable(target: Path, replaces: Iterable[str] | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise DiskError(f"{target} is a file: choose another folder to write to")
    if replaces is None:
        return
    patterns = tuple(replaces)
    foreign = sorted(p.name for p in target.iterdir() if not any(p.match(pattern) for pattern in patterns))
    if foreign:
        raise DiskError(f"{target} holds other files ({listing(foreign, 3)}): choose a new folder, nothing was written")


def _settle(folder: Path) -> None:
    """Modes as the umask says (safetensors leaves 0600), every byte on disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(source: Path, target: Path) -> None:
    if target.exists():
        _exchange(source, target)  # the old folder now has the temporary name, and is removed with it
    else:
        os.rename(source, target)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step: renameat2(2) with RENAME_EXCHANGE, which plain rename cannot do."""
    here, exchange = -100, 2
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or call(here, os.fsencode(a), here, os.fsencode(b), exchange) != 0:
        code = ctypes.get_errno() or errno.ENOSYS
        raise OSError(code, f"this system cannot replace a folder in one step ({os.strerror(code)}): choose a new name")
