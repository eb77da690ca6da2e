"""JSON as the standard has it, without the liberties of Python's reader; what is wrong is said with its remedy.

Python's own reader takes `NaN`, keeps the last of two values that stand under one name, and makes 1e999 infinite.
"""

import json
import math
import re
from itertools import chain
from typing import Any

# What to do about a complaint of Python's decoder, by how the complaint begins.
_REMEDIES = {
    "Expecting property name": "names stand in double quotes, and no comma before a closing brace",
    "Illegal trailing comma": "remove that comma",
    "Expecting ',' delimiter": 'a comma is missing here, or a " in the text before is not written as \\"',
    "Expecting ',' or ']'": "put a comma between two rows and ] behind the last",
    "Expecting ':' delimiter": "put a colon between a name and its value",
    "Expecting value": "here belongs an object, a list, text in double quotes, a number, true, false or null",
    "Unterminated string": 'the text that begins here has no closing ": is the line cut off?',
    "Invalid control character": "inside text write a line break as \\n and a tab as \\t",
    "Invalid \\escape": "write a backslash as \\\\",
    "Invalid \\uXXXX": "behind \\u belong four hexadecimal digits",
    "Extra data": "nothing may stand behind the end",
}
# What else tells what has happened: how the text begins where the decoder gave up.
_SIGNS = (
    (r"\ufeff", "a byte order mark inside the file (were files joined?): remove it"),
    (r"//|/\*|#", "JSON has no comments: remove it"),
    (r"'|None\b|True\b|False\b|nan\b|inf\b", "this is Python's spelling, not JSON: write the row with json.dumps"),
    (r"<[!?/a-zA-Z]", "this looks like a web page, not like data"),
    (r"[}\]]", "a value is missing, or a comma is too many"),
)


def decode(text: str) -> Any:
    """The value that `text` is; ValueError or RecursionError if it is none."""
    return _DECODER.decode(text)


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    return _DECODER.raw_decode(text, at)


def is_json(text: str) -> bool:
    try:
        decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def complaint(error: ValueError | RecursionError) -> str:
    """What was wrong, and the remedy, in a few words."""
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply): take out what is nested so"
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error})"
    signs = (remedy for sign, remedy in _SIGNS if re.compile(sign).match(error.doc, error.pos))
    known = (remedy for begin, remedy in _REMEDIES.items() if error.msg.startswith(begin))
    remedy = next(chain(signs, known), "")
    return f"not valid JSON ({error.msg.removesuffix(' at').rstrip(': ')})" + (f": {remedy}" if remedy else "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r:.40} stands twice in an object: keep one of the two")
    return made


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text:.20} is too large: write it as text")
    return number


def _int(text: str) -> int:
    if len(text) > 1000:
        raise ValueError(f"a number of {len(text)} digits: write it as text")
    return int(text)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value: write null, or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)
