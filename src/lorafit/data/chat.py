"""A row becomes messages becomes (ids, labels). (Being written; this is the contract.)"""

from dataclasses import dataclass

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    ids: list[int]
    labels: list[int]
    source: str
