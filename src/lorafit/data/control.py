"""Messages are data: what stands in them is encoded as the characters it is made of, and never as a control token.

`BREAK` is put where text has to come apart; the pieces between are encoded one by one, so nothing joins across it.

* A control token inside a string is broken up. If the tokenizer normalises its text, so that a look-alike would
  become one, the string is broken up into its characters.
* The end of a string is broken off if it would become a control token with what the template writes beside it. That
  shows when the conversation is rendered with such ends broken off, and without: if both have the same control tokens,
  as nearly always, the text stays as it is.
"""

import re
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

from lorafit.data.messages import BREAK, ROLES, THOUGHT

ESCAPED = repr(BREAK)[1:-1]
"""What a template makes of a break when it writes a list or dictionary as Python does, or as JSON in ASCII."""


class Control:
    """The control tokens of a tokenizer under a template with the text `template` that speaks of `names`."""

    def __init__(self, tokenizer: Any, template: str, names: Set[str], encode: Callable[[str], list[int]]) -> None:
        added = tokenizer.added_tokens_decoder
        # An assistant may write tokens that are not special (<tool_call>) or open a thought; others may not.
        special = {token.content for token in added.values() if token.special}
        written = {token.content for token in added.values() if token.content in template}
        others = special | written
        self._of = {role: special - {*THOUGHT} if role == "assistant" else others for role in ROLES}
        self._patterns = {role: any_of([*tokens, ESCAPED]) for role, tokens in self._of.items()}
        self._any = any_of(others)
        self._tokens = "\0".join(("", *sorted(t for t in others if not t.isspace()), ""))
        self._longest = max(map(len, others), default=0)
        self._names = {*names, *ROLES}
        self._encode = encode
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        normalised = [i for i, token in added.items() if token.normalized and len(token.content) > 1]
        self._normalised = {i: added[i].content for i in normalised} if normalizer else {}

    def broken(self, text: str, role: str) -> str:
        """`text`, said by `role`, with a break inside every control token."""
        text = text.replace(BREAK, "")
        while (broken := self._patterns[role].sub(lambda match: match[0][0] + BREAK + match[0][1:], text)) != text:
            text = broken
        if self._normalised and any(self._normalised.get(i) in self._of[role] for i in self._encode(text)):
            text = BREAK.join(text)
        return text

    def apart(self, text: str) -> str:
        """`text` with a break at each end that could be a part of a control token."""
        if not text or text in self._names:  # what the template speaks of is for it to know
            return text
        shortest = [*range(1, min(self._longest, len(text) + 1))]
        inside = text in self._tokens
        first = inside or any(f"{text[:k]}\0" in self._tokens for k in shortest)
        last = inside or any(f"\0{text[-k:]}" in self._tokens for k in shortest)
        return BREAK * first + text + BREAK * last

    def found(self, text: str) -> list[str]:
        """The control tokens in a rendered text."""
        return self._any.findall(text)


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest where several fit; a token of one character cannot be broken up."""
    longest_first = sorted({t for t in tokens if len(t) > 1 and not t.isspace()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of JSON-like `value` with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value
