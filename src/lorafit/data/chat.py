"""A conversation becomes token ids and labels: what the assistant wrote carries loss, everything else does not.

A chat template does not say which part of its text the assistant wrote, but it can be asked. For the assistant's
message k, `prompt = render(messages[:k], generation prompt)` is what the model is given and `full =
render(messages[:k+1])` is what should stand there when it has answered; the difference is what it must write.

* If every prompt and every full is the beginning of the whole conversation's text, the conversation is one row.
* If not (templates that drop the thinking of earlier turns, say), it becomes one row per assistant turn, each as
  the model sees it when it writes that turn.
* If the prompt is not the beginning of full (its generation prompt opens a thought that the finished turn does
  not show), loss starts where the two part, provided that all earlier messages come before that point. Otherwise
  the template is refused.

The pieces are tokenised one by one, as at inference, where the prompt is tokenised without its answer. A row ends
with the token that ends the answer: what a template writes after it, the model is never asked to write.

Messages are data. A control token (`<|im_end|>`) inside them is broken up before it is rendered, so that it is
encoded as the characters it is made of: the only control tokens of a row are those that its template wrote.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import product
from typing import Any, Literal

from lorafit.data.control import ESCAPED, Control, any_of, map_strings
from lorafit.data.messages import BREAK, Message, answers, call_of, checked, checked_tools, function_of, said, short
from lorafit.data.prices import Exhausted
from lorafit.data.sandbox import LONGEST, compiled
from lorafit.errors import DataError, UsageError

IGNORE = -100
"""The label of a position that carries no loss."""

DATE = datetime(2026, 1, 1)
"""What a template sees as today (`strftime_now`): the same rows give the same ids on every day."""

PLAIN = (
    "{% if bos_token is defined and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message.role.capitalize() + ':\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""The template that `chat_template="plain"` stands for."""

LossOn = Literal["assistant", "last", "all"]
_PROBE = "lorafit-probe"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and labels: `labels[i]` is `ids[i]` where position i carries loss, else `IGNORE`."""

    ids: list[int]
    labels: list[int]
    source: str = ""


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    loss_on: LossOn = "assistant",
    tools: Sequence[Any] | None = None,
    template: str | None = None,
    source: str = "",
) -> list[Example]:
    """The rows of one conversation; none if no assistant message in it says anything.

    `template` is a file with a Jinja chat template, or "plain"; without it the tokenizer's own is used.
    """
    chat = ChatTemplate(tokenizer, template, with_tools=bool(tools))
    return chat.encode(messages, loss_on=loss_on, tools=tools, source=source)


def encode_text(text: str, tokenizer: Any, source: str = "") -> Example:
    """Plain text: loss on every token, BOS where the tokenizer writes one, and EOS at the end."""
    ids = _beginning(text, tokenizer) + _end(tokenizer)
    return Example(ids, list(ids), source)


def encode_continuation(prompt: str, completion: str, tokenizer: Any, loss_on: str, source: str = "") -> Example:
    """A prompt as it stands, without a template, and loss on its completion and EOS."""
    start = _beginning(prompt, tokenizer)
    answer = _Continue(tokenizer)(completion, prompt) + _end(tokenizer)
    return Example(start + answer, (start if loss_on == "all" else [IGNORE] * len(start)) + answer, source)


def _beginning(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text that goes on: with the tokenizer's BOS, once, and without an EOS."""
    ids = _encode(tokenizer, text)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text brought its own
        ids = ids[1:]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def template_text(tokenizer: Any, template: str | None = None, with_tools: bool = False) -> tuple[str, str]:
    """(what to call it, Jinja text) of the template that `template` stands for: a file, "plain", or the tokenizer's."""
    if template == "plain":
        if tokenizer.eos_token is None:
            raise UsageError("chat_template 'plain' ends answers with the EOS token, and this tokenizer has none")
        return "the chat template 'plain'", PLAIN
    if template is not None:
        try:
            with open(template, encoding="utf-8") as file:
                return f"the chat template {template}", file.read(LONGEST + 1)  # one too many is refused below
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"chat_template {template!r} is neither 'plain' nor a file that can be read: {error}"
            ) from None
    if not tokenizer.chat_template:
        raise UsageError(
            "the tokenizer has no chat template: give chat_template a file with one, or 'plain' for a simple one"
        )
    name = f"the chat template of {os.path.basename(tokenizer.name_or_path) or 'this tokenizer'}"
    try:
        return name, tokenizer.get_chat_template(tools=[{}] if with_tools else None)
    except ValueError as error:  # several templates, and none of them the default
        raise UsageError(f"{name} cannot be told: {_first_line(error)}") from None


class ChatTemplate:
    """A tokenizer's chat template, compiled once, with what has been found out about it by asking it."""

    def __init__(self, tokenizer: Any, template: str | None = None, *, with_tools: bool = False) -> None:
        self.tokenizer = tokenizer
        self.name, self.text = template_text(tokenizer, template, with_tools)
        try:
            self._template = compiled(self.text, DATE)
        except Exception as error:
            raise UsageError(f"{self.name} is not a Jinja template: {_first_line(error)}") from None
        self._ids = _Continue(tokenizer)
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._added = tuple(token for token in added if not token.isspace())
        self._control = Control(tokenizer, self.text, self._template.names, self._ids)
        self._ask()

    def _ask(self) -> None:
        """Find out how the template wants its messages, and what it writes at the end of an answer."""
        self._parts, self._json_arguments = False, False
        self._no_content: tuple[str | None, ...] = ()  # what stands for content where there is none, if anything does
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        call = {"role": "assistant", "tool_calls": [call_of({"name": "f", "arguments": {"a": _PROBE}}, "probe")]}

        def shown(*messages: Message, prompt: bool = False) -> str:
            try:
                return self.render([self._view(message) for message in messages], prompt=prompt)
            except Exhausted:  # it would be no better with another question
                raise
            except DataError:
                return ""

        # Templates of vision models show text only where it comes as a list of parts.
        for self._parts in (False, True, False):
            if _PROBE in shown(user, answer):
                break
        # Some need content even beside tool calls, some want the arguments as text.
        for self._no_content, self._json_arguments in (*product(((), (None,), ("",)), (False, True)), ((), False)):
            if _PROBE in shown(user, call):
                break
        # What follows an answer: its end token, and perhaps text that gives way when the conversation goes on.
        end = shown(user, answer).rpartition(_PROBE)[2]
        cut = _common(end, shown(user, answer, prompt=True).rpartition(_PROBE)[2])
        tokens = list(any_of(self._added).finditer(end))
        cut = next((token.start() for token in tokens if token.start() < cut < token.end()), cut)
        self._end_text = end[cut:] if tokens and tokens[0].end() <= cut else ""
        self._ends_turns = bool(tokens)

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The template's text for `messages`; with `prompt`, up to where the assistant begins to write."""
        try:
            text: str = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exhausted as error:
            raise Exhausted(f"{self.name} {error}: use another chat_template") from None
        except Exception as error:
            raise DataError(f"{self.name} does not take this conversation: {_first_line(error)}") from None
        return text.replace(ESCAPED, BREAK)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids that a model is to continue: exactly how the row of this conversation begins."""
        views, given = self._apart([self._view(message) for message in checked(messages)], self._tools(tools))
        return self._ids(self.render(views, given, prompt=True))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        loss_on: LossOn = "assistant",
        tools: Sequence[Any] | None = None,
        since: int = 1,
        source: str = "",
    ) -> list[Example]:
        """The rows of one conversation; none if no assistant message in it says anything.

        Assistant messages before number `since` are context. A greeting (number 0) always is: no model is asked for it.
        """
        asked = checked(messages)
        turns = [k for k in answers(asked, since) if said(asked[k])]
        turns = turns if loss_on == "assistant" else turns[-1:]
        if not turns:
            return []
        views, given = self._apart([self._view(message) for message in asked], self._tools(tools))
        prompts = [self.render(views[:k], given, prompt=True) for k in turns]
        fulls = [self.render(views[: k + 1], given) for k in turns]
        whole = fulls[-1]
        stops = [self._stop(full) for full in fulls]
        if all(map(whole.startswith, prompts)) and all(
            self._closed(full, stop) and whole.startswith(full.removesuffix(self._end_text))
            for full, stop in zip(fulls[:-1], stops, strict=False)
        ):
            starts = [len(prompt) for prompt in prompts]
            rows = [(whole, list(zip(starts, stops, strict=True)))]
        else:
            starts = [
                self._start(views, given, k, prompt, full)
                for k, prompt, full in zip(turns, prompts, fulls, strict=True)
            ]
            rows = [(full, [(start, stop)]) for full, start, stop in zip(fulls, starts, stops, strict=True)]
        for k, full, start in zip(turns, fulls, starts, strict=True):
            self._check_shown(asked[k], k, full[start:], "writes no such thing in an assistant's turn")
        for k, message in enumerate(asked[: turns[-1]]):
            if message["role"] != "assistant":
                self._check_shown(message, k, whole, "leaves it out")
        for tool in tools or ():
            if not _shows(prompts[0], name := function_of(tool)["name"]):
                raise DataError(f"{self.name} does not show the row's tools ({short(name)}): use another chat_template")
        return [self._example(text, spans, loss_on, source) for text, spans in rows]

    def _start(self, views: Sequence[Message], tools: Sequence[Any] | None, k: int, prompt: str, full: str) -> int:
        """Where loss starts in `full`: behind the prompt, or where the two part."""
        if full.startswith(prompt):
            return len(prompt)
        # An answer that happens to begin like the generation prompt must not be taken for it: ask with another one.
        other = self.render([*views[:k], self._view({"role": "assistant", "content": _PROBE})], tools)
        start = min(_common(prompt, full), _common(prompt, other))
        before = self.render(views[:k], tools).removesuffix(self._end_text)
        if not full[:start].startswith(before):
            raise DataError(
                f"{self.name} shows what comes before message {k + 1} in one way when it asks for that message and in "
                "another when it has it, so no prompt leads to it: change the row, or use another chat_template"
            )
        return start

    def _stop(self, full: str) -> int:
        """Where the last turn of `full` ends: behind its end token, if it has one."""
        return len(full.removesuffix(self._end_text).rstrip())

    def _closed(self, text: str, stop: int) -> bool:
        return self._ends_turns and text.endswith(self._added, 0, stop)

    def _example(self, text: str, spans: Sequence[tuple[int, int]], loss_on: LossOn, source: str) -> Example:
        """Tokenise `text` piece by piece up to the end of the last span; the spans carry loss."""
        ids: list[int] = []
        labels: list[int] = []
        at = 0
        for start, stop in spans:
            context, answer = self._ids(text[at:start], text[:at]), self._ids(text[start:stop], text[:start])
            if not self._closed(text, stop):  # the template does not end its turns: the model must all the same
                answer += _end(self.tokenizer)
            ids += context + answer
            labels += (context if loss_on == "all" else [IGNORE] * len(context)) + answer
            at = stop
        return Example(ids, labels, source)

    def _view(self, message: Message) -> Message:
        """`message` in the words this template understands, its control tokens broken up."""
        role = message["role"]
        view: Message = map_strings(message, lambda text: self._control.broken(text, role))
        view["role"] = role
        if role == "developer" and "developer" not in self.text:
            view["role"] = "system"
        if "content" not in view and self._no_content:
            view["content"] = self._no_content[0]
        elif "content" in view and self._parts:
            view["content"] = [{"type": "text", "text": view["content"]}]
        if "reasoning_content" in view:
            view["thinking"] = view["reasoning_content"]  # the word of gpt-oss
        if self._json_arguments:
            for call in view.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return view

    def _tools(self, tools: Sequence[Any] | None) -> list[Any] | None:
        """The tools as the template sees them, their control tokens broken up too."""
        if not tools:
            return None
        return [map_strings(tool, lambda text: self._control.broken(text, "tool")) for tool in checked_tools(tools)]

    def _apart(self, views: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
        """`views` and `tools`, with ends broken off that would become control tokens where the template puts them."""
        parted: tuple[list[Message], list[Any] | None] = (
            map_strings(views, self._control.apart),
            map_strings(tools, self._control.apart),
        )
        if parted == (views, tools):
            return views, tools
        joined = self._control.found(self.render(views, tools))
        return (views, tools) if joined == self._control.found(self.render(*parted)) else parted

    def _check_shown(self, message: Message, k: int, text: str, complaint: str) -> None:
        """Refuse a template that silently drops what a message says: the model would learn to do without it."""
        for what, words in said(message):
            if not _shows(text, words):
                raise DataError(
                    f"message {k + 1} ({message['role']}) has {what}, but {self.name} {complaint}: "
                    "take it out of the data, or use another chat_template"
                )


class _Continue:
    """Encodes a piece of text that follows another one.

    Tokenizers in the manner of sentencepiece put a space in front of whatever they are given, which is right at the
    start of a text only. Such a piece is encoded behind what it follows, and that is taken off again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.encode = partial(_encode, tokenizer, add_special_tokens=False)
        self.adds_space = self.encode("\na") != self.encode("\n") + self.encode("a")
        self.added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    def __call__(self, text: str, before: str = "") -> list[int]:
        ids: list[int] = []
        for piece in text.split(BREAK):
            if piece:
                ids += self._piece(piece, before)
                before = piece
        return ids

    def _piece(self, piece: str, before: str) -> list[int]:
        if before and self.adds_space:
            lead = next((token for token in self.added if before.endswith(token)), "\n")
            skip, both = self.encode(lead), self.encode(lead + piece)
            if both[: len(skip)] == skip:
                return both[len(skip) :]
        return self.encode(piece)


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        return list(tokenizer.encode(text, **options))
    except (TypeError, UnicodeEncodeError):
        raise DataError("the text holds half a character (a lone surrogate such as \\ud83d): remove it") from None


def _shows(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, as they are or, as some templates write tools and what they answer, in JSON."""
    text, words = text.replace(BREAK, ""), words.replace(BREAK, "")
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning of `a` and `b`."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
