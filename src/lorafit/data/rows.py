"""Where rows come from: a file, the hub, a list; each row with the place it stands at."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from lorafit.data.formats import READERS, Row, memory, without_nulls
from lorafit.data.messages import names, plain
from lorafit.errors import DataError, UsageError, listing, nearest


def find_rows(data: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Row]:
    """The rows that `data` names, each with where it stands."""
    if not isinstance(data, str | Path):
        return [(f"data:{number}", _in_memory(row)) for number, row in enumerate(data, 1)]
    name, split, part = parse_name(str(data))
    path = Path(name)
    reader = next((READERS[end] for end in READERS if name.lower().endswith(end)), None)
    status = _status(path)
    if status is None and reader:
        raise DataError(f"{name}: no such file{_beside(path)}")
    if status is None or (S_ISDIR(status.st_mode) and not reader):
        return _hub(name, (split or "train") + (f"[{part}]" if part else ""))
    if not S_ISREG(status.st_mode):
        what = "a folder" if S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DataError(f"{name}: this is {what}, not a file: give a file, and save what comes out of a program in one")
    if reader is None:
        raise DataError(f"{name}: unknown kind of file: known are {listing(READERS, 20)}")
    if split not in ("", "train"):
        raise DataError(f"{name}: a file has no split '{split}': write {name}:[...] for a part of it")
    if status.st_size > memory() // 4:  # the rows of a file take several times its size
        raise DataError(f"{name}: {status.st_size:,} bytes are too many for {memory():,} of memory: split the file")
    rows = list(reader(path))
    chosen = rows[_slice(part, len(rows))]
    if rows and not chosen:
        raise DataError(f"{name}: [{part}] selects none of its {len(rows)} rows")
    return chosen


def parse_name(data: str) -> tuple[str, str, str]:
    """`name:split[part]` taken apart; a file whose own name has a colon is found first."""
    match = re.fullmatch(r"(.+):(\w*)(?:\[([-\d%]*:[-\d%]*)\])?", data)
    if match is None or not (match[2] or match[3]) or _status(Path(data)):
        return data, "", ""
    return match[1], match[2], match[3] or ""


def _status(path: Path) -> os.stat_result | None:
    """What the system says about `path`; None if there is nothing."""
    try:
        return path.stat()
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (OSError, ValueError):  # ValueError: no name at all, it holds a byte 0
        return None


def _beside(path: Path) -> str:
    try:
        return nearest(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return ""


def _in_memory(row: Any) -> Any:
    try:
        return plain(row)
    except RecursionError:
        return DataError("nested too deeply: take out what is nested so")


def _slice(part: str, rows: int) -> slice:
    """`:100`, `-50:`, `10%:20%` as a slice; percentages round to the nearest row, as in `datasets`."""

    def bound(text: str) -> int | None:
        if not re.fullmatch(r"(-?\d{1,18}%?)?", text):
            raise UsageError(f"[{part}] is no slice: write [:100], [-50:] or [10%:20%]")
        if text.endswith("%"):
            return round(int(text[:-1]) * rows / 100)
        return int(text) if text else None

    start, _, stop = part.partition(":")
    return slice(bound(start), bound(stop))


def _hub(name: str, split: str) -> Iterator[Row]:
    """Rows of a dataset on the hub, or of a local folder of data files; `owner/name/configuration` names a part."""
    import datasets

    *_, configuration = name.split("/") if name.count("/") == 2 and not _status(Path(name)) else [None]
    path = name.removesuffix(f"/{configuration}") if configuration else name
    try:
        rows = datasets.load_dataset(path, configuration, split=split)
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        (shown,) = names([name])
        raise DataError(f"{shown}: neither a file here nor a dataset that can be loaded ({what})") from None
    return ((f"{name}:{number}", without_nulls(row)) for number, row in enumerate(rows, 1))
