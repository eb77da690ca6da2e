"""The only writer: a folder appears whole, or not at all.

Everything is written under a temporary name beside its final place, forced to disk, sealed with a manifest (the size
and sha256 of every file) and moved there in one step. A reader that comes at any moment, or after a crash, finds the
old folder or the new one; `damaged` says whether what it finds is still what was written.

Every call that changes the disk is in the table `SYSTEM`, so that a test can let any one of them fail, or be the last.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorafit.errors import DiskError, listing
from lorafit.locks import hold, opened

MANIFEST = "manifest.json"
_TEMPORARY = ".lorafit-tmp-"


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step: renameat2(2) with RENAME_EXCHANGE, which plain rename cannot do."""
    here, exchange = -100, 2
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or call(here, os.fsencode(a), here, os.fsencode(b), exchange) != 0:
        code = ctypes.get_errno() or errno.ENOSYS
        raise OSError(code, f"this system cannot replace a folder in one step ({os.strerror(code)}): choose a new name")


SYSTEM = SimpleNamespace(
    mkdir=os.mkdir,
    open=os.open,
    write=os.write,
    truncate=os.truncate,
    chmod=os.chmod,
    fsync=os.fsync,
    rename=os.rename,
    exchange=_exchange,
    unlink=os.unlink,
    rmdir=os.rmdir,
)


# --- folders ----------------------------------------------------------------------------------------


@contextmanager
def new_folder(
    path: str | Path, replaces: Iterable[str] | None = None, about: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends without an error.

    An existing `path` is exchanged for the new folder only if it is empty or holds nothing but files matching
    the patterns in `replaces` (None: whatever it holds); otherwise DiskError, and nothing is lost. `about` is
    written into the manifest.
    """
    target = check_replaceable(path, replaces)
    temporary = target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        SYSTEM.mkdir(temporary)
        with opened(temporary) as handle:
            hold(handle)  # so that no other process sweeps it away
            yield temporary
            _seal(temporary, about or {})
            _move(temporary, target)
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            _remove(temporary)


def sweep(folder: Path) -> None:
    """Delete what processes left in `folder` that died while they wrote: their hold on it died with them."""
    for left in folder.glob(f".*{_TEMPORARY}*"):
        with suppress(OSError), opened(left) as handle:
            if hold(handle):
                _remove(left) if left.is_dir() else SYSTEM.unlink(left)


def check_replaceable(path: str | Path, replaces: Iterable[str] | None) -> Path:
    """The place that `path` stands for, or DiskError if `new_folder` would not write there."""
    target = Path(path).expanduser().resolve()
    patterns = ("*",) if replaces is None else (*replaces, MANIFEST)
    try:
        if not target.exists():
            return target
        if not target.is_dir():
            raise DiskError(f"{target} is a file: choose another folder to write to")
        foreign = sorted(p.name for p in target.iterdir() if not any(p.match(pattern) for pattern in patterns))
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{target}: cannot be read: {error.strerror or error}") from error
    if foreign:
        raise DiskError(f"{target} holds other files ({listing(foreign, 3)}): choose a new folder, nothing was written")
    return target


def remove_folder(path: Path) -> None:
    """Take a folder away in one step, then delete it: what is left after a crash is not found under its name."""
    gone = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}-old")
    try:
        SYSTEM.rename(path, gone)
        _sync(path.parent)
        _remove(gone)
    except OSError as error:
        raise DiskError(f"{path}: cannot be removed: {error.strerror or error}") from error


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What `new_folder` wrote about `folder`; None if there is no manifest, or not one bit for bit."""
    try:
        raw = (Path(folder) / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        unsealed = {name: value for name, value in manifest.items() if name != "seal"}
        return manifest if raw == _json(_sealed(unsealed)) else None
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def damaged(folder: str | Path, names: Iterable[str] | None = None) -> list[str]:
    """A sentence for each file of `names` (None: all that the manifest lists) that is not what was written.

    A folder without a manifest file is nobody's promise: nothing in it can be called damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return []
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is damaged"]
    entries = manifest["files"]
    problems = []
    for name in sorted(entries if names is None else names):
        file, entry = folder / name, entries.get(name)
        if entry is None:
            problems.append(f"{name} is not in {MANIFEST}")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.get("size"):
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry.get('size')}")
        elif _sha256(file) != entry.get("sha256"):
            problems.append(f"{name} is not what was written (its sha256 differs)")
    return problems


def _seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Modes as the umask says (safetensors leaves 0600), every byte on disk, and last the manifest."""
    umask = os.umask(0)
    os.umask(umask)
    files = {}
    for path in sorted(folder.rglob("*")):
        SYSTEM.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
        _sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    _write(folder / MANIFEST, (_json(_sealed({**about, "files": files})),))
    SYSTEM.chmod(folder, 0o777 & ~umask)
    _sync(folder)


def _move(source: Path, target: Path) -> None:
    if target.exists():
        SYSTEM.exchange(source, target)  # the old folder now has the temporary name, and is removed with it
    else:
        SYSTEM.rename(source, target)
    _sync(target.parent)


def _remove(folder: Path) -> None:
    """Delete a folder; one that is not there is deleted already."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            SYSTEM.unlink(path)
    SYSTEM.rmdir(folder)


# --- files ------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole, or leave the old one."""
    write_parts(path, (data,))


def write_parts(path: str | Path, parts: Iterable[Any]) -> None:
    """The same for a file that is larger than memory: `parts` (bytes) are made and written one after the other."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, parts)
        SYSTEM.rename(temporary, target)
        _sync(target.parent)
    except Exception as error:
        with suppress(OSError):
            SYSTEM.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise DiskError(f"{target}: cannot be written: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, or leave the old one."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys."""
    write_bytes(path, _json(value))


def write_tensors(path: str | Path, tensors: Mapping[str, Any], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; `about` becomes its metadata. The same tensors give the same bytes.

    (safetensors itself writes the metadata in an order that changes from call to call.)
    """
    write_bytes(path, b"".join(tensor_parts(tensors, tensors.__getitem__, about)))


def tensor_parts(
    shapes: Mapping[str, Any], read: Callable[[str], Any], about: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """The parts of a safetensors file, each tensor asked for when its turn comes.

    `shapes` has something with the dtype and shape of each (a tensor without values will do), `read` the values.
    Order and spelling are safetensors' own: it is asked how it would write the same tensors without a value.
    """
    from safetensors.torch import save
    from torch import empty, uint8

    raw = save({name: empty(0, dtype=like.dtype) for name, like in shapes.items()})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((about or {}).items()))}}
    place = 0
    for name, entry in json.loads(raw[8:]).items():
        end = place + shapes[name].numel() * shapes[name].dtype.itemsize
        header[name] = {"dtype": entry["dtype"], "shape": list(shapes[name].shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in list(header)[1:]:
        yield read(name).detach().contiguous().reshape(-1).view(uint8).numpy().data


def append_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON: a whole line, or nothing."""
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        handle = SYSTEM.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                _write_all(handle, line)
            except OSError:
                SYSTEM.truncate(handle, size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error


def need_space(folder: Path, needed: int) -> None:
    """DiskError if `folder`, or where it will be, has less than `needed` bytes left."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    total, _, left = shutil.disk_usage(there)
    if total and left < needed:  # some network disks do not tell
        raise DiskError(
            f"{folder}: {needed / 2**20:,.0f} MiB are needed and {left / 2**20:,.0f} MiB are free: make room there, "
            "or write to another disk"
        )


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**manifest, "seal": hashlib.sha256(_json(manifest)).hexdigest()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, parts: Iterable[Any]) -> None:
    """A new file at `path`, forced to disk."""
    handle = SYSTEM.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        hold(handle)
        for part in parts:
            _write_all(handle, part)
        SYSTEM.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, data: Any) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[SYSTEM.write(handle, rest) :]


def _sync(path: Path) -> None:
    with opened(path) as handle:
        SYSTEM.fsync(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
