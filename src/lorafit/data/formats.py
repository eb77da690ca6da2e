"""Files become rows: JSON Lines, JSON, CSV and Parquet, each row with the line on which it begins.

They are read here and not through `datasets`, which forgets the line, turns `NaN` and missing columns into nulls, and
guesses types; nor by Python's `csv`, which takes a stray quote for text and swallows the rows up to the next one.
Whatever a file holds, a row is yielded or an error is said.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorafit.data.messages import short
from lorafit.data.strict_json import complaint, decode, decode_at, is_json
from lorafit.errors import DataError

Row = tuple[str, Any]
"""Where it stands (`train.jsonl:17`), and what stands there: a mapping if all is well, or the DataError it is."""

# A file of a few bytes can be made to fill the memory. Text packs to a tenth, seldom to a hundredth of its size.
UNPACKS_TO = 200
"""A packed file may hold so many times its size, if the memory allows it,"""
UNPACKS_ANYWAY = 64 * 2**20
"""and so many bytes in any case."""

BOM = "\ufeff"
# Files under a wrong name, by how they begin: (what it is, what to do).
_SIGNS = {
    b"\x1f\x8b": "compressed with gzip: end its name in .gz",
    b"PAR1": "a Parquet file: end its name in .parquet",
    b"PK\3\4": "a zip archive or an Excel sheet: unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"SQLite format": "a database: write its rows to a .jsonl file",
    b"%PDF": "a PDF, not data: take its text out",
    b"version https://git-lfs": "a pointer of Git LFS, not the data: run git lfs pull",
    b"<": "a web page or XML, not data: look at it in an editor, and download the data again",
}


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """DataError if the first bytes of `path` are those of another kind of file than its name says."""
    for sign, what in _SIGNS.items():
        if head.lstrip().startswith(sign):
            raise DataError(f"{path}:1: this is {what}")


# --- bytes and text ---------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    """What is in a file, unpacked, without a byte order mark."""
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = _unpacked(raw, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_first_line(error)}): is it whole?") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:2]:
        raise DataError(f"{path}:1: this is UTF-16 or UTF-32: save the file as UTF-8")
    raw = raw.removeprefix(BOM.encode())
    _refuse_other_kinds(path, raw[:64])
    return raw


def _unpacked(raw: bytes, path: Path) -> bytes:
    if raw and not raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: not compressed with gzip: take .gz off its name")
    most = _most(path)
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        unpacked = file.read(most + 1)
    _check_size(path, len(unpacked), most)
    return unpacked


def _most(path: Path) -> int:
    """How many bytes may be in a packed file."""
    return min(max(UNPACKS_TO * path.stat().st_size, UNPACKS_ANYWAY), memory() // 4)


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise DataError(
            f"{path}: unpacks to more than {most:,} bytes, which is {UNPACKS_TO} times its size or a quarter of the "
            "memory: if that is right, split it, and unpack it to .jsonl files"
        )


def memory() -> int:
    """The bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _decoded(raw: bytes) -> str | tuple[int, int, DataError]:
    """UTF-8 text; or line, column and what is wrong there."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = DataError(f"byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8")
        return *_place(raw[: error.start].decode("utf-8")), wrong
    if "\0" in text:
        return *_place(text[: text.index("\0")]), DataError("a byte 0, which no text has: save the file as UTF-8")
    return text


def _place(before: str) -> tuple[int, int]:
    """Line and column, from 1, of what follows `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


# --- JSON Lines, JSON -------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Row]:
    raw = _bytes(path)
    if raw.lstrip()[:1] == b"[" and isinstance(text := _decoded(raw), str) and is_json(text):
        raise DataError(f"{path}:1: this is a list, not one object a line: end its name in .json")
    yield from _lines(raw, path)


def _lines(raw: bytes, path: Path) -> Iterator[Row]:
    if _is_spread(raw):
        raise DataError(f"{path}:1: an object is spread over several lines: write each row on one line")
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        text = _decoded(line)
        if isinstance(text, tuple):
            yield f"{path}:{number}:{text[1]}", text[2]
            continue
        try:
            yield f"{path}:{number}", decode(text)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}:{error.colno}", DataError(complaint(error))
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", DataError(complaint(error))


def _is_spread(raw: bytes) -> bool:
    """Whether the file begins with an object that is whole, but not on its first line."""
    raw = raw.lstrip()
    first = _decoded(raw[: raw.find(b"\n") + 1])
    if isinstance(first, tuple) or not first.startswith("{") or is_json(first):
        return False
    text = raw.decode("utf-8", errors="replace")
    try:
        return "\n" in text[: decode_at(text, 0)[1]]
    except (ValueError, RecursionError):
        return False


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, with the line each begins on; or JSON Lines under this name, which is common."""
    raw = _bytes(path)
    text = _decoded(raw)
    if isinstance(text, tuple):
        yield f"{path}:{text[0]}:{text[1]}", text[2]
        return
    at = _blank(text, 0)
    if text[at : at + 1] == "{" and not ("\n" in text[at:].rstrip() and is_json(text)):
        yield from _lines(raw, path)
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
            row, at = decode_at(text, at)
            yield f"{path}:{line}", row
            at = _blank(text, at)
            more = text[at : at + 1] == ","
            at = _blank(text, at + 1) if more else at
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, at)
        if (end := _blank(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data after the list", text, end)
    except json.JSONDecodeError as error:
        yield f"{path}:{error.lineno}:{error.colno}", DataError(complaint(error))
    except (ValueError, RecursionError) as error:
        yield f"{path}:{line}", DataError(complaint(error))


def _blank(text: str, at: int) -> int:
    """The first position from `at` on that is no white space."""
    match = _BLANK.match(text, at)
    return match.end() if match else at


_BLANK = re.compile(r"[ \n\r\t]*")


# --- CSV --------------------------------------------------------------------------------------------

_QUOTED = r'"([^"]*+(?:""[^"]*+)*+)"'
_FIELD = {mark: re.compile(rf'(?:{_QUOTED}|([^"\r\n{mark}]*+))({mark}|\r?\n|\Z)') for mark in ",\t"}


def _csv(path: Path) -> Iterator[Row]:
    text = _decoded(_bytes(path))
    if isinstance(text, tuple):
        yield f"{path}:{text[0]}:{text[1]}", text[2]
        return
    if text.lstrip()[:1] in ("{", "["):
        raise DataError(f"{path}:1: this is JSON, not CSV: end the file's name in .jsonl or .json")
    mark = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    line, counted = 1, 0
    header: list[str] = []
    for at, fields in _records(text, mark):
        line, counted = line + text.count("\n", counted, at), at
        if isinstance(fields, DataError):
            yield f"{path}:{line}:{_place(text[:at])[1]}", fields
        elif fields == [""]:
            continue
        elif not header:
            if wrong := _bad_header(fields, mark):
                yield f"{path}:{line}", DataError(wrong)
                return
            header = fields
        elif wrong := _bad_fields(fields, header):
            yield f"{path}:{line}", DataError(wrong)
        else:
            yield f"{path}:{line}", dict(zip(header, fields, strict=True))


def _records(text: str, mark: str) -> Iterator[tuple[int, list[str] | DataError]]:
    """Where each record begins and its fields; where one is broken, and no more after it."""
    at = 0
    while at < len(text):
        if text[at] == BOM:
            yield at, DataError("a byte order mark inside the file (were files joined?): remove it")
            return
        start, end = at, mark
        fields: list[str] = []
        while end == mark:
            match = _FIELD[mark].match(text, at)
            if match is None:
                yield _broken_field(text, at)
                return
            quoted, plain, end = match.groups()
            fields.append(plain if quoted is None else quoted.replace('""', '"'))
            at = match.end()
        yield start, fields


def _broken_field(text: str, at: int) -> tuple[int, DataError]:
    """Where the field that begins at `at` is broken, and how."""
    if text[at] == '"':
        closed = re.compile(_QUOTED).match(text, at)
        what = "text follows on the closing quote of this field" if closed else "this quoted field does not end"
    else:
        at = min(place for sign in '"\r' if (place := text.find(sign, at)) >= 0)
        if text[at] == "\r":
            return at, DataError("not valid CSV (a carriage return alone): save it with line ends of Unix or Windows")
        what = "a quote inside a field that is not quoted"
    return at, DataError(f'not valid CSV ({what}): put the field in "quotes" and write a quote inside it as ""')


def _bad_header(names: list[str], mark: str) -> str:
    other = next((sign for sign in ";\t,|" if sign != mark and sign in names[0]), "")
    if len(names) == 1 and other:
        return f"the header is separated by {other!r}: save the file with {mark!r} between columns"
    if len(set(names)) < len(names) or not all(names):
        return "column names in the header must be there, and each once: rename or remove columns"
    return ""


def _bad_fields(fields: list[str], header: list[str]) -> str:
    if fields == header:
        return "the header stands here again (were files joined?): remove this line"
    if len(fields) != len(header):
        wrong = f"{len(fields)} fields where the header names {len(header)}"
        return f'{wrong}: put "quotes" around fields with a comma or line break, and give each column a field'
    return ""


# --- Parquet ----------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    """Parquet has no lines: the number in a message is that of the row, from 1."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with path.open("rb") as opened:
            head = opened.read(64)
        if not head.startswith(b"PAR1"):
            _refuse_other_kinds(path, head)
            raise DataError(f"{path}: not a Parquet file: name it for what it is, or save it as Parquet")
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise DataError(f"{path}: the column {short(twice)} stands twice: keep one of the two")
            rows = _unpacked_rows(file, path)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not a Parquet file that can be read ({_first_line(error)}): is it whole? write it again"
        ) from None
    yield from ((f"{path}:{number}", without_nulls(row)) for number, row in enumerate(rows, 1))


def without_nulls(row: Any) -> Any:
    """`row` without the keys that are null inside its columns: in a table every object has the keys of all."""
    return {name: _present(value) for name, value in row.items()} if isinstance(row, dict) else row


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _unpacked_rows(file: Any, path: Path) -> list[Any]:
    most, about = _most(path), file.metadata
    _check_size(path, sum(about.row_group(k).total_byte_size for k in range(about.num_row_groups)), most)
    size, rows = 0, []
    for batch in file.iter_batches(batch_size=64, use_threads=False):  # few: a long text may be stored once for all
        columns = [column.dictionary_decode() if hasattr(column, "indices") else column for column in batch.columns]
        batch = type(batch).from_arrays(columns, batch.schema.names)
        size += batch.nbytes + 64 * batch.num_rows  # a row costs memory, even an empty one
        _check_size(path, size, most)
        try:
            rows += batch.to_pylist()
        except ValueError:  # find out which rows it is
            rows += [_row(batch.slice(at, 1)) for at in range(batch.num_rows)]
    if len(rows) != about.num_rows:
        raise ValueError(f"{len(rows)} rows where it promises {about.num_rows}")
    return rows


def _row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return DataError(f"text that is not UTF-8 (byte 0x{error.object[error.start]:02x}): write it as UTF-8")
    except ValueError as error:
        return DataError(f"a value that cannot be read ({_first_line(error)}): write it as text")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


_TEXT: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
READERS = {**_TEXT, **{f"{end}.gz": reader for end, reader in _TEXT.items()}, ".parquet": _parquet}
"""What reads a file, by how its name ends."""
