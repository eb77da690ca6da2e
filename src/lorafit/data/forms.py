"""What a row says, whatever form it has: alpaca, messages, ShareGPT, prompt and completion, or text.

Everything about a row that can be checked without a tokenizer is checked here.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorafit.data.messages import Message, answers, check_whole, checked, checked_tools, from_json, names, short
from lorafit.errors import DataError, listing, nearest

# Forms of a row, told apart by their first column; the other columns it must have, and those it may have.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": ((), ("tools",)),
    "conversations": ((), ("system", "tools")),
    "instruction": (("output",), ("input", "system", "history", "tools")),
    "prompt": (("completion",), ("tools",)),
    "text": ((), ()),
}
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that is right: a conversation whose answers from message `since` on are to be learned, or a text."""

    form: str
    columns: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    since: int = 1
    tools: tuple[Any, ...] = ()
    text: str | None = None
    pair: tuple[str, str] | None = None
    """Prompt and completion, where they are two texts: without a chat template one continues the other."""


def common_form(rows: Iterable[Any]) -> str:
    """The form that most rows have (of as many, the first row's), or an empty string where no row has any."""
    forms = Counter(next(filter(row.__contains__, FORMS), "") for row in rows if isinstance(row, Mapping))
    del forms[""]
    return forms.most_common(1)[0][0] if forms else ""


def sample_of(row: Any, form: str) -> Sample:
    """What `row` says, or DataError: it must have the form that its file has."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with named columns, not {type(row).__name__}")
    columns = tuple(names(row))
    if not form:
        raise _unknown_form(columns)
    _check_columns(columns, form)
    if form == "text":
        return Sample(form, columns, text=_text(row, "text"))
    turns, since = _conversation(row, form)
    messages = checked(turns)
    answers(messages, since)
    for k, message in enumerate(messages, 1):
        if message["role"] == "user" and not message["content"].strip():
            raise DataError(f"message {k} (user) is empty: take the row out, or write what the answer answers")
    prompt, completion = row.get("prompt"), row.get("completion")
    pair = (prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    tools = checked_tools(_optional_list(row, "tools"))
    return Sample(form, columns, tuple(messages), since, tuple(tools), pair=pair if form == "prompt" else None)


# --- columns ----------------------------------------------------------------------------------------


def _unknown_form(columns: tuple[str, ...]) -> DataError:
    hint = next((near for column in columns if (near := nearest(column, FORMS))), "")
    return DataError(
        f"columns {listing(columns) or 'are missing'} make no known form{hint}: known are messages, "
        "conversations, instruction with output, prompt with completion, and text"
    )


@lru_cache(maxsize=1024)  # nearly all rows of a file have the same columns
def _check_columns(columns: tuple[str, ...], form: str) -> None:
    """Refuse a row that lacks a column of `form`, or has one that looks like a misspelling of it."""
    required, optional = FORMS[form]
    others = [column for column in columns if column not in (form, *required, *optional)][:200]
    for column in (form, *required):
        if column not in columns:
            raise DataError(f"no column '{column}'{nearest(column, others)}: the row has {listing(columns) or 'none'}")
    for column in optional:
        near = difflib.get_close_matches(column, others, n=1, cutoff=0.8)
        if column not in columns and near:
            raise DataError(f"unknown column '{near[0]}' (did you mean '{column}'?): rename or remove it")


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        what = "null" if value is None else f"{short(value)} ({type(value).__name__})"
        raise DataError(f"column '{column}' must hold text, not {what}")
    check_whole(value, f"column '{column}'")
    return value


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else _text(row, column).strip()


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    """A list from a column that holds one, or the JSON text of one (as in CSV files)."""
    value = row[column]
    if isinstance(value, str):
        value = from_json(value, f"column '{column}' must hold a list, or the JSON text of one")
    if not isinstance(value, list | tuple):
        what = "null" if value is None else f"{short(value)} ({type(value).__name__})"
        raise DataError(f"column '{column}' must hold a list, not {what}")
    return list(value)


def _optional_list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    return [] if value is None or (isinstance(value, str) and not value.strip()) else _list(row, column)


# --- conversations ----------------------------------------------------------------------------------


def _conversation(row: Mapping[str, Any], form: str) -> tuple[list[Any], int]:
    """The messages of a row, not yet checked, and the number of the one from which on answers are to be learned."""
    if form == "instruction":
        return _alpaca(row), 1
    if form == "prompt":
        prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
        return [*prompt, *completion], len(prompt)
    turns = _turns(row, form, None)
    return ([*_system(row), *turns] if form == "conversations" else turns), 1


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    question = "\n".join(part for part in (_text(row, "instruction").strip(), _optional_text(row, "input")) if part)
    if not question:
        raise DataError("columns 'instruction' and 'input' are both empty: take the row out, or write a question")
    before = _system(row)
    for pair in _optional_list(row, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"column 'history' must be a list of [question, answer] pairs, not of {short(pair)}")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = _text(row, "output").strip()
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Mapping[str, Any]) -> list[Any]:
    text = _optional_text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _turns(row: Mapping[str, Any], column: str, role: str | None) -> list[Any]:
    """Messages from a column that holds a list of them, or, where `role` says whose it is, one text."""
    if role and isinstance(row[column], str):
        if role == "user" and not row[column].strip():
            raise DataError(f"column '{column}' is empty: take the row out, or write a prompt")
        return [{"role": role, "content": _text(row, column)}]
    return [_message(turn, f"message {k}") for k, turn in enumerate(_list(row, column), 1)]


def _message(turn: Any, where: str) -> Any:
    """A ShareGPT turn (from, value) as a message; anything else as it is, to be checked later."""
    if not isinstance(turn, Mapping) or turn.get("role") is not None or turn.get("from") is None:
        return turn
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        hint = nearest(speaker, _SPEAKERS) if isinstance(speaker, str) else ""
        raise DataError(f"{where} is from {short(speaker)}{hint}: speakers are {', '.join(_SPEAKERS)}")
    if not isinstance(value, str):
        raise DataError(f"{where} (from {speaker!r}) has no text in 'value'{nearest('value', names(turn))}")
    if speaker == "function_call":
        calls = from_json(value, f"{where} (from 'function_call') must hold a JSON object with name and arguments")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {"role": _SPEAKERS[speaker], "content": value}
