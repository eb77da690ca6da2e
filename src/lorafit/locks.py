"""One process at a time: who holds a file, and who holds the folder of a run."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorafit.errors import BusyError, DiskError

LOCK = ".lorafit-lock"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, or BusyError. The lock of a process that is gone is taken over.

    The system drops its part of the lock (flock) with the process. What stands in the file names the holder, and
    decides where the system cannot: for a run on another machine, or on a disk that knows no locks.
    """
    file, made = folder / LOCK, not folder.exists()
    me = {"pid": os.getpid(), "host": platform.node(), "boot": _boot()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, mine = _open_lock(file)
        try:
            if holder := _holder(file, mine, me):
                raise BusyError(f"{folder} is in use by {holder}: wait for it, or choose another folder")
            os.truncate(handle, 0)
            os.write(handle, json.dumps(me).encode())
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise DiskError(f"{folder}: cannot be locked: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)
            if made:
                os.rmdir(folder)  # which fails, as it should, if there is anything in it
        os.close(handle)


def _open_lock(file: Path) -> tuple[int, bool | None]:
    """The lock file, open, and whether this process holds it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        mine = hold(handle)
        with suppress(FileNotFoundError):
            if mine is False or os.fstat(handle).st_ino == os.stat(file).st_ino:
                return handle, mine
        os.close(handle)  # its holder has just removed it: take the new one


def _holder(file: Path, mine: bool | None, me: Mapping[str, Any]) -> str | None:
    """Who else holds the lock file, if anybody does."""
    owner = _owner(file)
    if mine is False:
        return f"process {owner.get('pid', '?')} on this machine"
    if owner.get("boot", me["boot"]) == me["boot"]:
        alive = mine is None and owner.get("pid") != me["pid"] and Path(f"/proc/{owner.get('pid')}").exists()
        return f"process {owner['pid']} on this machine" if alive else None
    if owner.get("host") == me["host"]:  # which was started anew since
        return None
    return f"process {owner.get('pid')} on {owner.get('host')} (if that run is gone, remove {file})"


def _owner(file: Path) -> dict[str, Any]:
    """What the holder wrote into the lock file; nothing if it was cut off."""
    try:
        owner = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _boot() -> str:
    """What this start of this machine is called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def hold(handle: int) -> bool | None:
    """Whether this process now holds an open file or folder, until it is closed; False: another process does; None:
    this disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
