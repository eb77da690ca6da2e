"""One error family: each error is one line that says what, where and how to fix it, and has one exit code.

Everything lorafit refuses on purpose is a `LorafitError`; the command line prints its sentence and exits with
its code. Anything else that escapes is a bug, and `--debug` shows where.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LorafitError(Exception):
    """Base of every refusal. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(LorafitError, ValueError):
    """A setting or an argument that makes no sense: a wrong name, a wrong value, two that contradict."""

    exit_code = 2


class DataError(LorafitError, ValueError):
    """A file, row or conversation that cannot become a training example."""

    exit_code = 3


class ModelError(LorafitError, ValueError):
    """A base model or tokenizer that cannot be found, opened or used as asked."""

    exit_code = 4


class AdapterError(LorafitError, ValueError):
    """An adapter file that does not fit the model, or is not what it says."""

    exit_code = 5


class CheckpointError(LorafitError, ValueError):
    """A checkpoint that cannot be resumed from."""

    exit_code = 6


class NumericError(LorafitError, ArithmeticError):
    """NaN or infinity where a number is needed."""

    exit_code = 7


class DiskError(LorafitError, OSError):
    """A folder or file that cannot be written."""

    exit_code = 8


class BusyError(LorafitError, RuntimeError):
    """Another run holds this folder."""

    exit_code = 9


class OutOfMemory(LorafitError, MemoryError):
    """A single row that does not fit into the memory there is."""

    exit_code = 10


class HubError(LorafitError, ConnectionError):
    """The hub does not take what it is given."""

    exit_code = 11


class HubBusy(HubError):
    """The hub cannot take it now: the same command goes on later (EX_TEMPFAIL, so that a scheduler requeues)."""

    exit_code = 75


class ProcessError(LorafitError, RuntimeError):
    """Another process of the same run is gone, or failed in a way that is no refusal; the run can be resumed."""

    exit_code = 12


class Interrupted(LorafitError):
    """Stopped by a signal after saving; the run can be resumed (EX_TEMPFAIL, so that a scheduler requeues)."""

    exit_code = 75


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """A UsageError raised inside begins with `name`, the layer it is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def listing(items: Iterable[str], limit: int = 6) -> str:
    """`a, b, c and 4 more`: every offender counted, the first few named."""
    names = list(items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
