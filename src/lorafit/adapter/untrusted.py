"""What every reader of a stranger's file needs: a file that is one, JSON without traps, and words safe to print."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.errors import AdapterError

DEEPEST = 20
"""Levels of JSON; PEFT's own files have three."""


def open_file(file: Path) -> BinaryIO:
    """`file` for reading. It has to be a file: a pipe would be waited for, a device read without end."""
    if not os.path.isfile(file):
        raise AdapterError(
            f"{file.parent}: no {file.name} here; give the folder that holds an adapter in PEFT's format"
        )
    with explained(file, "a readable file"):
        return file.open("rb")


@contextmanager
def explained(file: Path, what: str) -> Iterator[None]:
    """Whatever is found wrong inside the block is one line that says that `file` is not `what`."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not {what} ({plain(error)})") from error


def parse(data: bytes) -> Any:
    """JSON; ValueError for what readers do not agree on (a key given twice) and for towers of brackets."""
    value = json.loads(data.decode(), object_pairs_hook=_each_key_once)
    if _deeper(value, DEEPEST):
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return value


def shown(value: Any, limit: int = 80) -> str:
    """`value` as Python writes it: one line, nothing that moves a cursor, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(text: object, limit: int = 400) -> str:
    """The same for a sentence, which has no quotes around it."""
    line = re.sub(r"\s+", " ", str(text)[: limit + 1])
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else f"{line[:limit]}..."


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} stands there twice")
        found[key] = value
    return found


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner if isinstance(item, dict | list))
