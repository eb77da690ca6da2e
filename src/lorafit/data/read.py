"""Rows become examples, whatever form they have; all that is wrong with them is said at once, with file and line."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lorafit.data.chat import ChatTemplate, Example, LossOn, encode_continuation, encode_text
from lorafit.data.messages import names, short
from lorafit.data.rows import find_rows
from lorafit.errors import DataError, UsageError, listing, nearest

MAX_ERRORS = 20
"""Reading stops after so many bad rows and names them all."""

# Forms of a row, told apart by their first column; the other columns it must have, and those it may have.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": ((), ("tools",)),
    "conversations": ((), ("system", "tools")),
    "instruction": (("output",), ("input", "system", "history")),
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


def read_examples(
    data: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    loss_on: LossOn = "assistant",
    chat_template: str | None = None,
    allow_dropped: float = 0.05,
    on_note: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The examples of a file, a hub dataset, or a list of rows.

    `data` may end in a split or slice: `name:train[:1%]`, `rows.jsonl:[:100]`. `on_note` is told, a sentence each
    time, which rows were dropped or cut; `progress` is called with (rows done, rows in all).
    """
    if loss_on not in ("assistant", "last", "all"):
        raise UsageError(f"loss_on must be assistant, last or all, not {loss_on!r}")
    rows = list(find_rows(data))
    name = str(data) if isinstance(data, str | Path) else "data"
    if not rows:
        raise DataError(f"{name}: there are no rows in it")
    encode = _Encoder(tokenizer, loss_on, chat_template)
    examples: list[Example] = []
    errors: list[str] = []
    dropped: list[str] = []
    cut = 0
    for done, (source, row) in enumerate(rows, 1):
        if progress:
            progress(done, len(rows))
        try:
            if isinstance(row, DataError):
                raise row
            made = encode(row, source)
        except (DataError, RecursionError) as error:
            errors.append(f"{source}: {'nested too deeply' if isinstance(error, RecursionError) else error}")
            if len(errors) == MAX_ERRORS:
                break
            continue
        # The first token of a row is never predicted, so a label there teaches nothing.
        kept = [example for example in made if any(label >= 0 for label in example.labels[1:max_length])]
        cut += sum(len(example.ids) > max_length for example in kept)
        examples += [Example(e.ids[:max_length], e.labels[:max_length], e.source) for e in kept]
        if not kept:
            dropped.append(source)
    if errors:
        more = [f"{name}: stopped after {MAX_ERRORS} errors"] if len(errors) == MAX_ERRORS else []
        raise DataError("\n".join(errors + more))
    if dropped:
        lost = (
            f"{name}: {len(dropped)} of {len(rows)} rows have no answer, or none within max_length={max_length} "
            f"(lines {listing(source.rpartition(':')[2] for source in dropped)})"
        )
        if len(dropped) > allow_dropped * len(rows) or not examples:
            raise DataError(f"{lost}: raise max_length, or allow_dropped to go on without them")
        if on_note:
            on_note(f"dropped: {lost}")
    if cut and on_note:
        on_note(f"cut: {name}: {cut} of {len(examples)} examples end at max_length={max_length} tokens")
    return examples


class _Encoder:
    """Turns rows of one form, that of the first row, into examples."""

    def __init__(self, tokenizer: Any, loss_on: LossOn, chat_template: str | None) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.has_template = bool(chat_template or tokenizer.chat_template)
        self.chat = cache(lambda with_tools: ChatTemplate(tokenizer, chat_template, with_tools=with_tools))
        self.form = ""

    def __call__(self, row: Any, source: str) -> list[Example]:
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be an object with named columns, not {type(row).__name__}")
        self.form = self.form or form_of(row)
        check_columns(tuple(names(row)), self.form)
        if self.form == "text":
            return [encode_text(_text(row, "text"), self.tokenizer, source)]
        prompt, completion = row.get("prompt"), row.get("completion")
        if self.form == "prompt" and isinstance(prompt, str) and isinstance(completion, str) and not self.has_template:
            return [encode_continuation(prompt, completion, self.tokenizer, self.loss_on, source)] if completion else []
        messages, since = to_messages(row, self.form)
        tools = _json_list(row, "tools") if row.get("tools") else None
        chat = self.chat(bool(tools))
        return chat.encode(messages, loss_on=self.loss_on, tools=tools, since=since, source=source)


def form_of(row: Mapping[str, Any]) -> str:
    """The form of a row, by its columns."""
    for form in FORMS:
        if form in row:
            return form
    hint = next((near for column in row if (near := nearest(str(column), FORMS))), "")
    raise DataError(
        f"columns {listing(names(row)) or 'are missing'} make no known form{hint}: known are messages, "
        "conversations, instruction with output, prompt with completion, and text"
    )


@cache  # nearly all rows of a file have the same columns
def check_columns(columns: tuple[str, ...], form: str) -> None:
    """Refuse a row that lacks a column of `form`, or has one that looks like a misspelling of it."""
    required, optional = FORMS[form]
    others = [column for column in columns if column not in (form, *required, *optional)]
    for column in (form, *required):
        if column not in columns:
            raise DataError(f"no column '{column}'{nearest(column, others)}: the row has {listing(columns)}")
    for column in optional:
        near = difflib.get_close_matches(column, others, n=1, cutoff=0.8)
        if column not in columns and near:
            raise DataError(f"unknown column '{near[0]}' (did you mean '{column}'?): rename or remove it")


def to_messages(row: Mapping[str, Any], form: str) -> tuple[list[Any], int]:
    """The conversation of a row, and the number of the message from which on its answers are to be learned."""
    if form == "instruction":
        question = "\n".join(part for part in (_text(row, "instruction").strip(), _optional(row, "input")) if part)
        if not question:
            raise DataError("columns 'instruction' and 'input' are both empty")
        before = _system(row)
        for pair in _json_list(row, "history") if row.get("history") else ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError("column 'history' must be a list of [question, answer] pairs")
            before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        answer = _text(row, "output").strip()
        return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], 1
    if form == "prompt":
        prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
        return [*prompt, *completion], len(prompt)
    turns = _turns(row, form, None)
    return ([*_system(row), *turns] if form == "conversations" else turns), 1


def _turns(row: Mapping[str, Any], column: str, role: str | None) -> list[Any]:
    """Messages from a column that holds a list of them, or, where `role` says whose it is, one text."""
    if role and isinstance(row[column], str):
        return [{"role": role, "content": row[column]}]
    return [_message(turn, f"message {k}") for k, turn in enumerate(_json_list(row, column), 1)]


def _message(turn: Any, where: str) -> Any:
    """A ShareGPT turn (from, value) as a message; anything else as it is, to be checked later."""
    if not isinstance(turn, Mapping) or "role" in turn or "from" not in turn:
        return turn
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        hint = nearest(speaker, _SPEAKERS) if isinstance(speaker, str) else ""
        raise DataError(f"{where} is from {short(speaker)}{hint}: speakers are {', '.join(_SPEAKERS)}")
    if not isinstance(value, str):
        raise DataError(f"{where} (from {speaker!r}) has no text in 'value'{nearest('value', names(turn))}")
    if speaker == "function_call":
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where} (from 'function_call') must hold a JSON object with name and arguments") from None
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {"role": _SPEAKERS[speaker], "content": value}


def _system(row: Mapping[str, Any]) -> list[Any]:
    text = _optional(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else _text(row, column).strip()


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        what = "null" if value is None else f"{short(value)} ({type(value).__name__})"
        raise DataError(f"column '{column}' must hold text, not {what}")
    return value


def _json_list(row: Mapping[str, Any], column: str) -> list[Any]:
    """A list from a column that holds one, or the JSON text of one (as in CSV files)."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"column '{column}' must hold a list, or the JSON text of one") from None
    if hasattr(value, "tolist"):  # numpy, from pandas
        value = value.tolist()
    if not isinstance(value, list | tuple):
        what = "null" if value is None else type(value).__name__
        raise DataError(f"column '{column}' must hold a list, not {what}")
    return list(value)
