"""Which names a pattern means, and how many names are said in one line. PEFT's rules, and no module is touched."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from lorafit.config import Names
from lorafit.errors import UsageError, listing, nearest


def matches(pattern: Names, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for all of `name`; a list holds names or endings."""
    if isinstance(pattern, str):
        return _expression(pattern).fullmatch(name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def as_names(pattern: Names) -> Names:
    """'q_proj' and 'q_proj,v_proj' mean name endings; only what cannot be a name is a regular expression."""
    if isinstance(pattern, str) and re.fullmatch(r"[\w.]+(,[\w.]+)*", pattern):
        return tuple(pattern.split(","))
    return pattern


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is no regular expression: {error}") from None


def resolve(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value for `name`: of all keys that match the most specific (longest) wins, in any order."""
    keys = [name] if name in pattern else [key for key in pattern if key_matches(key, name)]
    return pattern[max(keys, key=len)] if keys else default


def key_matches(key: str, name: str) -> bool:
    return key == name or _expression(rf"(.*\.)?({key})$").match(name) is not None


def no_match(what: str, patterns: Iterable[str], names: Iterable[str]) -> str:
    names = list(names)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    known = [*endings, *names, "all-linear"] if what == "target" else [*endings, *names]
    patterns = list(patterns)
    wrong = listing([*(f"'{pattern}'{nearest(pattern, known)}" for pattern in patterns[:6]), *patterns[6:]])
    return f"{what} {wrong} matches no layer of the model; its layers end in {listing(endings, 12)}"


def block_number(name: str) -> int | None:
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return None if number is None else int(number)


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """`layers.0.q, layers.1.q` -> [("layers.{0..1}.q", 2)]: names that differ in numbers, in one line."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        groups[".".join("#" if p.isdigit() else p for p in parts)].append(tuple(int(p) for p in parts if p.isdigit()))
    lines = []
    for shape, numbers in groups.items():
        text = shape
        for column in zip(*numbers, strict=True):
            text = text.replace("#", _span(sorted(set(column))), 1)
        lines.append((text, len(numbers)))
    return lines


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
