"""Where rows come from: files, the hub, a list; each row with the place it stands at.

Local JSON, JSON Lines and CSV are read here and not through `datasets`, which forgets the line, turns `NaN` and
missing columns into nulls, and guesses types. Parquet goes through pyarrow, names on the hub through `datasets`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, UsageError, nearest

Row = tuple[str, Any]
"""Where it stands (`train.jsonl:17`), and what stands there: a mapping if all is well, or the DataError it is."""


def find_rows(data: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Row]:
    """The rows that `data` names, each with where it stands."""
    if not isinstance(data, str | Path):
        return [(f"data:{number}", row) for number, row in enumerate(data, 1)]
    name, split, part = parse_name(str(data))
    path = Path(name)
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix.lower())
    if path.is_file() or reader:
        if reader is None:
            raise DataError(f"{name}: unknown kind of file: known are {', '.join(READERS)} and, but for parquet, .gz")
        if not path.is_file():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{name}: no such file{nearest(path.name, beside)}")
        if split not in ("", "train"):
            raise DataError(f"{name}: a file has no split '{split}': write {name}:[...] for a part of it")
        rows = list(reader(path))
        chosen = rows[_slice(part, len(rows))]
        if rows and not chosen:
            raise DataError(f"{name}: [{part}] selects none of its {len(rows)} rows")
        return chosen
    return _hub(name, (split or "train") + (f"[{part}]" if part else ""))


def parse_name(data: str) -> tuple[str, str, str]:
    """`name:split[part]` taken apart; a file whose own name has a colon is found first."""
    match = re.fullmatch(r"(.+):(\w*)(?:\[([-\d%]*:[-\d%]*)\])?", data)
    if match is None or not (match[2] or match[3]) or Path(data).exists():
        return data, "", ""
    return match[1], match[2], match[3] or ""


def _slice(part: str, rows: int) -> slice:
    """`:100`, `-50:`, `10%:20%` as a slice; percentages round to the nearest row, as in `datasets`."""

    def bound(text: str) -> int | None:
        if not re.fullmatch(r"(-?\d+%?)?", text):
            raise UsageError(f"[{part}] is no slice: write [:100], [-50:] or [10%:20%]")
        if text.endswith("%"):
            return round(int(text[:-1]) * rows / 100)
        return int(text) if text else None

    start, _, stop = part.partition(":")
    return slice(bound(start), bound(stop))


def _hub(name: str, split: str) -> Iterator[Row]:
    """Rows of a dataset on the hub, or of a local folder of data files; `owner/name/configuration` names a part."""
    import datasets

    *_, configuration = name.split("/") if name.count("/") == 2 and not Path(name).exists() else [None]
    path = name.removesuffix(f"/{configuration}") if configuration else name
    try:
        rows = datasets.load_dataset(path, configuration, split=split)
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: neither a file here nor a dataset that can be loaded ({what})") from None
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise DataError(f"{path}:1: this is UTF-16 or UTF-32: save the file as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes) -> str | tuple[int, int, DataError]:
    """UTF-8 text; or line, column and what is wrong there."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8")) + 1
        wrong = DataError(f"byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8")
        return before.count(b"\n") + 1, column, wrong


def _jsonl(path: Path) -> Iterator[Row]:
    for number, raw in enumerate(_bytes(path).split(b"\n"), 1):
        if not raw.strip():
            continue
        text = _decode(raw)
        if isinstance(text, tuple):
            yield f"{path}:{number}:{text[1]}", text[2]
            continue
        try:
            yield f"{path}:{number}", _JSON.decode(text)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}:{error.colno}", DataError(_not_json(error, text))
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", DataError(_not_json(error, text))


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, with the line each begins on; or JSON Lines under this name, which is common."""
    text = _decode(_bytes(path))
    if isinstance(text, tuple):
        yield f"{path}:{text[0]}:{text[1]}", text[2]
        return
    at = _blank(text, 0)
    if text[at : at + 1] == "{" and (_is_json(text[at:].split("\n", 1)[0]) or not _is_json(text)):
        yield from _jsonl(path)
        return
    if text[at : at + 1] != "[":
        if at < len(text):
            yield f"{path}:1", DataError("a .json file must hold a list of objects, or one object a line")
        return
    line, counted = 1, 0
    try:
        at = _blank(text, at + 1)
        more = text[at : at + 1] != "]"
        while more:
            line, counted = line + text.count("\n", counted, at), at
            row, at = _JSON.raw_decode(text, at)
            yield f"{path}:{line}", row
            at = _blank(text, at)
            more = text[at : at + 1] == ","
            at = _blank(text, at + 1) if more else at
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the list", text, at + 1)
    except json.JSONDecodeError as error:
        yield f"{path}:{error.lineno}:{error.colno}", DataError(_not_json(error, text))
    except (ValueError, RecursionError) as error:
        yield f"{path}:{line}", DataError(_not_json(error, text))


def _csv(path: Path) -> Iterator[Row]:
    text = _decode(_bytes(path))
    if isinstance(text, tuple):
        yield f"{path}:{text[0]}:{text[1]}", text[2]
        return
    limit = csv.field_size_limit(len(text) + 1)  # the module's own limit of 128 KiB is made for other files
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if ".tsv" in path.suffixes else ",")
    rows: list[Row] = []
    line, header = 1, None
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header) or not all(header):
                    rows = [(where, DataError("column names in the header must be there, and each once"))]
                    break
            elif len(fields) != len(header):
                wrong = f"{len(fields)} fields where the header names {len(header)}"
                rows.append((where, DataError(f'{wrong}: put "quotes" around fields with a comma or line break')))
            else:
                rows.append((where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        rows.append((f"{path}:{line}", DataError(f"not valid CSV ({error})")))
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _parquet(path: Path) -> Iterator[Row]:
    """Parquet has no lines: the number in a message is that of the row, from 1."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = [batch.to_pylist() for batch in pyarrow.parquet.ParquetFile(path).iter_batches()]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a parquet file that can be read ({what})") from None
    yield from ((f"{path}:{number}", row) for number, row in enumerate(chain.from_iterable(batches), 1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r:.40} stands twice in an object")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value: write null, or a number")


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _is_json(text: str) -> bool:
    try:
        _JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _not_json(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    page = ": this looks like a web page, not like data" if text.lstrip()[:1] == "<" else ""
    return f"not valid JSON ({what}){page}"


def _blank(text: str, at: int) -> int:
    """The first position from `at` on that is no white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at
