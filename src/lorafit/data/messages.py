"""What a message may be: a role from a closed set, text, and what comes with it; anything else is one clear line."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from lorafit.data import strict_json
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
    _check_keys(tuple(names(key for key, value in message.items() if value is not None)), where)
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
        hint = "" if "content" in message else nearest("content", names(key for key in message if key != "role"))
        raise DataError(f"{where} ({role}) has no 'content'{hint}")
    return known


def _check_keys(keys: tuple[str, ...], where: str) -> None:
    """Refuse what would be lost because its key is not the one that is read."""
    if wrong := _lost(keys):
        raise DataError(f"{where} has an unknown key '{wrong[0]}' (did you mean '{wrong[1]}'?): rename or remove it")


@lru_cache(maxsize=1024)  # nearly all messages have the same keys
def _lost(keys: tuple[str, ...]) -> tuple[str, str] | None:
    if "function_call" in keys:  # as OpenAI wrote it in its first year
        return "function_call", "tool_calls"
    for key in ("tool_calls", "reasoning_content"):
        near = get_close_matches(key, [other for other in keys if other != "tool_call_id"], n=1, cutoff=0.85)
        if near and key not in keys:
            return near[0], key
    return None


def answers(messages: Sequence[Message], since: int = 1) -> list[int]:
    """The numbers of the assistant's messages from `since` on, without a greeting (0), which no model is asked for."""
    found = [k for k, message in enumerate(messages) if k >= max(since, 1) and message["role"] == "assistant"]
    if not found:
        raise DataError("no assistant message answers anything: a row needs one after a user's")
    return found


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        check_whole(content, f"{where}: its content")
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
    wrong = f"{where}: the arguments of the call of {short(function['name'])} must be a JSON object"
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes JSON in a string, templates want the object
        arguments = from_json(arguments, wrong)
    if not isinstance(arguments, Mapping):
        raise DataError(wrong)
    check_whole([function["name"], arguments], f"{where}: its tool call")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def function_of(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool or a call is about: OpenAI wraps it in an object, others do not."""
    function = value.get("function", value)
    return function if isinstance(function, Mapping) else {}


def checked_tools(tools: Sequence[Any]) -> list[Any]:
    """Tools that have a name, as functions in OpenAI's way or bare."""
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(function_of(tool).get("name"), str):
            raise DataError(f"a tool must be an object with function.name, not {short(tool)}")
    check_whole(tools, "column 'tools'")
    return list(tools)


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


def check_whole(value: Any, what: str) -> None:
    """Refuse a text in `value` that cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r}, character {error.start + 1}"
            raise DataError(f"{what} holds half a character (a lone surrogate: {half}): remove it") from None
    elif isinstance(value, Mapping):
        check_whole([*value.keys(), *value.values()], what)
    elif isinstance(value, list | tuple):
        for item in value:
            check_whole(item, what)


def plain(value: Any) -> Any:
    """`value` with the arrays in it, as pandas has them, as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(text: str, what: str) -> Any:
    """The value that `text` is JSON of."""
    try:
        return strict_json.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {strict_json.complaint(error)}") from None


def names(keys: Iterable[Any]) -> list[str]:
    """Keys or columns for an error message: nothing in them can break the line, or make it long."""
    return [_printable(str(key)) for key in keys]


def _printable(name: str) -> str:
    name = name if len(name) <= 60 else f"{name[:57]}..."
    return name if name.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in name)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {short(value)}")
    check_whole(value, what)
    return value


def short(value: Any) -> str:
    """`value` for an error message: on one line, and not long."""
    try:
        text = repr(value)
    except Exception:  # of an object of whatever class, or an int of more digits than Python will write
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."
