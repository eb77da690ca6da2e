"""What a message may be: a role from a closed set, text, and what comes with it; anything else is one clear line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorafit.errors import DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHT = ("<think>", "</think>")
"""The two tags that templates look for inside an answer."""

# Marks where a control token inside a message is broken up: a code point that Unicode keeps for such internal use.
BREAK = "\ufdd0"

Message = dict[str, Any]


def checked(messages: Any) -> list[Message]:
    """Messages with known roles and keys, content as one string, tool arguments as objects; or one clear line."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages must be a list with at least one message, not {short(messages)}")
    return [_checked(message, f"message {k}") for k, message in enumerate(messages, 1)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object with role and content, not {short(message)}")
    if "role" not in message:
        raise DataError(f"{where} has no 'role'{nearest('role', names(message))}")
    role = message["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{where} has the role {short(role)}{hint}: roles are {', '.join(ROLES)}")
    known: Message = {"role": role}
    if (content := message.get("content")) is not None:
        known["content"] = _text_of(content, where)
    thought = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), None)
    if thought is not None:
        known["reasoning_content"] = _string(thought, f"{where}: its reasoning")
    if message.get("tool_calls"):
        if role != "assistant" or not isinstance(message["tool_calls"], Sequence):
            raise DataError(f"{where}: tool_calls must be a list, in an assistant message")
        known["tool_calls"] = [call_of(call, where) for call in message["tool_calls"]]
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            known[key] = _string(message[key], f"{where}: {key}")
    if "content" not in known and not (role == "assistant" and {"tool_calls", "reasoning_content"} & known.keys()):
        hint = "" if "content" in message else nearest("content", names(message.keys() - {"role"}))
        raise DataError(f"{where} ({role}) has no 'content'{hint}")
    return known


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content.replace(BREAK, "")
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be a string or a list of text parts, not {short(content)}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(f"{where}: content has a part that is not text ({short(kind)}): remove it")
    return _text_of("".join(part["text"] for part in content), where)


def call_of(call: Any, where: str) -> Message:
    """A tool call as OpenAI writes it, its arguments as an object."""
    function = function_of(call) if isinstance(call, Mapping) else {}
    if not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call must be an object with function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes JSON in a string, templates want the object
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of the call of {short(function['name'])} must be a JSON object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def function_of(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool or a call is about: OpenAI wraps it in an object, others do not."""
    function = value.get("function", value)
    return function if isinstance(function, Mapping) else {}


def said(message: Message) -> list[tuple[str, str]]:
    """(what it is, the words) of all that a message says and a template must show."""
    thought, _, answer = message.get("content", "").rpartition(THOUGHT[1])
    said = [
        ("reasoning", message.get("reasoning_content", "")),
        ("reasoning", thought.replace(THOUGHT[0], "")),
        ("content", answer),
        *(("a tool call", call["function"]["name"]) for call in message.get("tool_calls", ())),
    ]
    return [(what, words.strip()) for what, words in said if words.strip()]


def names(keys: Iterable[Any]) -> list[str]:
    """Keys or columns for an error message: nothing in them can break the line."""
    return [repr(str(key))[1:-1] for key in keys]


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {short(value)}")
    return value


def short(value: Any) -> str:
    """`value` for an error message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
