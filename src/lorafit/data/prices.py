"""What a chat template may do in one rendering: a budget of steps, and what each piece of work costs.

A step is an item of a list that is looked at, or `CHARACTERS` of a text, or a piece of the program. Work is paid for
before it is done, by what it reads and what it could make, so time and memory are bounded both. There is no clock in
it: the same template is refused for the same conversation everywhere, or nowhere.
"""

import math
import re
from collections.abc import ItemsView, KeysView, Sequence, ValuesView
from itertools import permutations
from typing import Any

from lorafit.errors import DataError

# Allowed are so many steps, so many for each that reading the input takes, and so many for each pair of messages: there
# are templates that look back through the messages from every one of them. Those in TRL take 30 % of it at most.
STEPS, PER_STEP, PER_PAIR = 500_000, 64, 16
CALL, LOOKUP, CHARACTERS = 6, 4, 16
BITS = 4096  # of a whole number

FREE_FILTERS = {"count", "d", "default", "first", "last", "length"}
FREE_TESTS = {
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"),
    *("sequence", "string", "true", "undefined"),
}
LAZY = {"items", "map", "reject", "rejectattr", "select", "selectattr"}  # they hand on the items they are given
PIECES = LAZY | {"groupby", "list", "max", "min", "sort", "splitlines", "title", "unique", "wordcount"}  # of a text
PRODUCTS = {  # they take or make as much as the product of what they are given
    *("batch", "center", "expandtabs", "indent", "join", "ljust", "lstrip", "rfind", "rindex", "rjust", "rpartition"),
    *("rsplit", "rstrip", "slice", "strip", "trim", "zfill"),
}
NUMBERS = {"divisibleby", "even", "odd", "round"}  # for them a text would be a format, or to be repeated
WIDE = re.compile(r"[%)][-#0 +]*\d*\.?(\d{4}|\*)")  # a % format of 1,000 characters or more, or of a computed number
CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class Exhausted(DataError):
    """A template that does more than rendering its conversation takes."""


class Budget:
    """What is `left` of the steps that are `allowed` to the rendering that is going on."""

    def __init__(self) -> None:
        self.allowed = self.left = 2**62  # while the template is compiled, nothing is called

    def start(self, messages: Sequence[Any], *others: Any) -> None:
        """A new rendering, of `messages` and `others`."""
        self.allowed = self.left = 2**62
        self.read(messages, *others)
        self.allowed = self.left = STEPS + PER_STEP * (self.allowed - self.left) + PER_PAIR * len(messages) ** 2

    def spend(self, steps: int) -> None:
        self.left -= max(steps, 1)  # a template that found a way to call this would gain nothing
        if self.left < 0:
            raise Exhausted(f"does more than the {self.allowed:,} steps that this conversation may take")

    def copy(self, value: Any) -> None:
        """Going through `value`, but not through what its items hold."""
        if isinstance(value, int) and value.bit_length() > BITS:
            raise Exhausted(f"computes with whole numbers of more than {BITS:,} bits")
        self.spend(1 if isinstance(value, int) else characters(value) if isinstance(value, str) else extent(value))

    def read(self, *values: Any) -> None:
        """Going through `values` to the last character in them: comparing, hashing or writing them."""
        pending = list(values)
        while pending:
            value = pending.pop()
            self.copy(value)
            if isinstance(value, CONTAINERS):
                pending += value
                pending += value.values() if isinstance(value, dict) else ()

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """A binary operator."""
        self.copy(left)
        self.copy(right)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and isinstance(left, str):
            self.call("format", left, right)
        elif operator == "*" and not numbers:
            text = isinstance(left, str) or isinstance(right, str)
            self.spend(extent(left) * extent(right) // (CHARACTERS if text else 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.copy(1 << min(left.bit_length() * max(right, 0), BITS))

    def call(self, name: str, subject: Any, *others: Any) -> None:
        """The filter, test or method `name` of `subject`."""
        self.spend(CALL)
        (self.copy if name in LAZY else self.read)(subject)
        before = self.left
        self.read(*others)
        if name in PIECES:
            self.spend(sum(len(value) for value in (subject, *others) if isinstance(value, str)))
        if name in PRODUCTS:
            self.spend(math.prod(map(extent, (subject, *others))) // CHARACTERS)
        if name in NUMBERS:
            if not isinstance(subject, int | float):
                raise TypeError(f"{name} is for numbers")
            self.spend(sum(map(extent, others)))
        if name == "sum":
            self.spend(extent(subject) ** 2 // CHARACTERS)
        if name in ("split", "rsplit"):
            separator = next((other for other in others if isinstance(other, str) and other), None)
            self.spend(subject.count(separator) if separator else len(subject))
        if name == "replace":
            made = (str(subject).count(old) * len(new) for old, new in permutations(map(str, others), 2))
            self.spend(max(made, default=0) // CHARACTERS)
        if name == "format":
            if WIDE.search(str(subject)):
                raise Exhausted("writes something in 1,000 columns or more")
            self.spend(str(subject).count("%") * (before - self.left + 1000 // CHARACTERS))

    def field(self, value: Any, spec: str) -> None:
        """One field of `str.format`."""
        self.read(value, spec)
        self.spend(sum(int(width[:20]) for width in re.findall(r"\d+", spec)) // CHARACTERS)


def extent(value: Any) -> int:
    """How many characters or items there are in `value`; a whole number, which may be a width, counts as itself."""
    if isinstance(value, int):
        return max(1, abs(value))
    return max(1, len(value)) if isinstance(value, (str, range, *CONTAINERS)) else 1


def characters(text: str) -> int:
    """The steps for a text."""
    return 1 + len(text) // CHARACTERS
