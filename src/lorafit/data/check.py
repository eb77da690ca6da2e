"""All rows are looked at, and all that is wrong with them is said at once, with file and line.

Nothing heavy is imported here: a file can be checked without a model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafit.data.forms import FORMS, Sample, common_form, sample_of
from lorafit.data.messages import answers, said
from lorafit.data.rows import find_rows
from lorafit.errors import DataError, listing

MAX_ERRORS = 20
"""Reading stops after so many bad rows and names them all."""

Data = str | Path | Iterable[Mapping[str, Any]]
Progress = Callable[[int, int], None]
T = TypeVar("T")


def each_row(data: Data, use: Callable[[Sample, str], T], progress: Progress | None) -> list[tuple[str, T]]:
    """What `use` makes of each row, with the place where the row stands; or one DataError with all that is wrong."""
    rows = list(find_rows(data))
    name = name_of(data)
    if not rows:
        raise DataError(f"{name}: there are no rows in it")
    form = common_form(row for _, row in rows)
    made: list[tuple[str, T]] = []
    errors: list[str] = []
    for done, (source, row) in enumerate(rows, 1):
        if progress:
            progress(done, len(rows))
        try:
            if isinstance(row, DataError):
                raise row
            made.append((source, use(sample_of(row, form), source)))
        except (DataError, RecursionError) as error:
            errors.append(f"{source}: {'nested too deeply' if isinstance(error, RecursionError) else error}")
            if len(errors) == MAX_ERRORS:
                errors.append(f"{name}: stopped after {MAX_ERRORS} errors")
                break
    if errors:
        raise DataError("\n".join(errors))
    return made


def name_of(data: Data) -> str:
    return str(data) if isinstance(data, str | Path) else "data"


@dataclass(frozen=True)
class Summary:
    """What a file holds, as far as that can be told without a tokenizer; `str` of it is for people."""

    name: str
    rows: int
    form: str
    columns: dict[str, int]
    """How many rows have each column."""
    turns: dict[str, int]
    """How many messages each role has."""
    characters: int
    longest: tuple[int, str]
    """The characters of the longest row, and where it stands."""
    unanswered: tuple[str, ...]
    """Where rows stand that have no answer, or no text: they would be dropped."""

    def __str__(self) -> str:
        required, optional = FORMS[self.form]
        known = [name for name in (self.form, *required, *optional) if name in self.columns]
        unused = [name for name in self.columns if name not in known]
        counts = [name if (n := self.columns[name]) == self.rows else f"{name} (in {n:,} rows)" for name in known]
        lines = [
            f"{self.name}: {self.rows:,} rows, nothing wrong with them",
            f"columns: {', '.join(counts)}" + (f"; not used: {listing(unused)}" if unused else ""),
            "messages: " + ", ".join(f"{count:,} {role}" for role, count in self.turns.items()) if self.turns else "",
            f"characters: {self.characters:,}, {self.longest[0]:,} of them in the longest row ({self.longest[1]})",
        ]
        if self.unanswered:
            where = listing(source.rpartition(":")[2] for source in self.unanswered)
            lines.append(f"without an answer, to be dropped: {len(self.unanswered):,} rows (lines {where})")
        return "\n".join(filter(None, lines))


def check_rows(data: Data, *, progress: Progress | None = None) -> Summary:
    """Check rows as `read_examples` does, but for what only a tokenizer or a chat template can refuse."""
    rows = each_row(data, lambda sample, source: sample, progress)
    samples = [sample for _, sample in rows]
    sizes = [(sum(map(len, _words(sample))), source) for source, sample in rows]
    return Summary(
        name=name_of(data),
        rows=len(rows),
        form=samples[0].form,
        columns=dict(Counter(column for sample in samples for column in sample.columns)),
        turns=dict(Counter(message["role"] for sample in samples for message in sample.messages)),
        characters=sum(size for size, _ in sizes),
        longest=max(sizes, key=lambda pair: pair[0]),
        unanswered=tuple(source for source, sample in rows if not _teaches(sample)),
    )


def _words(sample: Sample) -> list[str]:
    """All that a sample says."""
    return [sample.text or "", *(words for message in sample.messages for _, words in said(message))]


def _teaches(sample: Sample) -> bool:
    """Whether there is anything in a sample to learn."""
    if sample.text is not None:
        return bool(sample.text)
    return any(said(sample.messages[k]) for k in answers(sample.messages, sample.since))
