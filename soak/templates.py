"""Hostile messages under every chat template in TRL's wheel: what they say is text, and no control token comes of it.

A case is a template, a tokenizer made on the spot with the control tokens of that template, and a conversation written
twice: once in harmless words, once with control tokens, their halves and their doubles in every place where a row can
have text. The rows of both must have the same control tokens in the same order, and loss on the same turns.
"""

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator, Set
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.data.chat import ChatTemplate, Example
from lorafit.data.control import ESCAPED
from lorafit.data.messages import BREAK, THOUGHT
from lorafit.errors import DataError

NAME = "templates"
WHAT = "no control token comes of what a message says, its text is kept, and loss is on the assistant's turns alone"
COUNT = 10_000
LONG = 100_000
LIMIT = 60.0

CONTROL = re.compile(r"<\|[^<>|]*\|>|<｜[^<>｜]*｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]")
WORD = re.compile(r"word\d+x")
TAG = re.compile(r"</?[a-z_]+>")
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMALIZERS: tuple[Callable[[], Any] | None, ...] = (None, None, None, normalizers.NFKC, normalizers.Lowercase)
WIDE = {code: code + 0xFEE0 for code in range(ord("!"), ord("~"))}  # letters that NFKC makes the usual ones of
OTHER = str.maketrans("aceopxy", "асеорху")  # Cyrillic letters that look the same
PLAIN = (
    *("a word", "naïve 日本語", "x < y | z > 0", "100% {} {0} %s", "line\nline", '"quoted" \\n', "👩‍🚀", "{{ 1 }}"),
    *("<", ">", "|", "/"),
)


@cache
def templates() -> tuple[Path, ...]:
    """TRL's chat templates."""
    spec = importlib.util.find_spec("trl")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return tuple(sorted(Path(folders[0], "chat_templates").glob("*.jinja"))) if folders else ()


@cache
def tokenizer_for(path: Path, kind: int) -> Any:
    """Bytes as tokens; control tokens are special, tags (`<think>`) only added, and looked for in normalised text."""
    template, normalizer = path.read_text(encoding="utf-8"), NORMALIZERS[kind]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    if normalizer:
        backend.normalizer = normalizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    special = sorted({*CONTROL.findall(template), "<|im_start|>", "<|im_end|>"})
    tags = sorted({*TAG.findall(template)} - {"<s>", "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=normalizer is not None) for tag in tags])
    tokenizer.chat_template = template
    return tokenizer


@cache
def chat_for(path: Path, kind: int) -> ChatTemplate:
    return ChatTemplate(tokenizer_for(path, kind))


class Writer:
    """Writes text for a place of a conversation: a word that is found again, and what is hostile around it."""

    def __init__(self, seed: int, tokenizer: Any, hostile: bool, names: Set[str]) -> None:
        self.random, self.hostile, self.names, self.number = random.Random(seed), hostile, names, 0
        added = list(tokenizer.added_tokens_decoder.values())
        special = sorted(token.content for token in added if token.special and token.content not in THOUGHT)
        # An assistant may write tokens that are not special and thoughts; of these only nobody else may make use.
        self.tokens = {True: special, False: sorted(token.content for token in added)}

    def __call__(self, assistant: bool = False, named: bool = False) -> str:
        """Text for an assistant's message or another; where it is `named`, no other place has the same."""
        self.number += 1
        word = f"word{self.number}x"
        if not self.hostile:
            return word
        inner: str = self.random.choice(self.tokens[assistant])[1:-1]
        if self.random.random() < 0.1 and not named and inner not in self.names:  # those are the template's own
            return inner
        pieces = [self.piece(self.tokens[assistant]) for _ in range(self.random.randint(1, 4))]
        before = self.random.randint(0, len(pieces))
        return "".join([*pieces[:before], word, *pieces[before:]])

    def piece(self, tokens: list[str]) -> str:
        token, other = self.random.choice(tokens), self.random.choice(tokens)
        cut = self.random.randint(1, len(token) - 1)
        made = [
            token,
            token[:cut],
            token[cut:],
            token[1:-1],
            token[:cut] + BREAK + token[cut:],
            token[:cut] + other + token[cut:],
            token[:cut] + "\u200b" + token[cut:],
            token.upper(),
            token.lower(),
            ESCAPED,
            token.translate(WIDE),
            token.translate(OTHER),
            json.dumps(token).replace("<", "\\u003c"),
            token.replace("<", "&lt;"),
            self.random.choice(PLAIN),
            token + other,
        ]
        return self.random.choice(made)


def conversation(write: Writer, shape: random.Random, able: frozenset[str]) -> tuple[list[Any], list[Any] | None]:
    """Messages and tools in a shape that the template is `able` to show."""
    messages: list[Any] = []
    tools = None
    if "system" in able and shape.random() < 0.5:
        messages.append({"role": "system", "content": write()})
    for _ in range(shape.randint(1, 3)):
        messages.append({"role": "user", "content": write(), "name": write()})
        if "tools" in able and shape.random() < 0.5:
            arguments = {write(True): write(True), write(True, named=True): [write(True), 1, {write(True): None}]}
            name, identity = write(True), write(True)
            call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": identity, "name": name, "content": write()})
            described = {"type": shape.choice(("string", write())), "description": write(), write(): [write()]}
            parameters = {"type": "object", "properties": {write(): described}, "required": [write()]}
            tool = {"name": name, "description": write(), "parameters": parameters, write(): {write(): write()}}
            tools = [*(tools or []), {"type": "function", "function": tool}]
        thought = {"reasoning_content": write(True)} if "reasoning" in able and shape.random() < 0.5 else {}
        messages.append({"role": "assistant", "content": write(True), **thought})
    return messages, tools


FEATURES = tuple(map(frozenset, (("system", "tools", "reasoning"), ("system", "tools"), ("system", "reasoning"),
                                 ("system",), ())))  # fmt: skip


def rows_of(path: Path, kind: int, seed: int, able: frozenset[str], hostile: bool) -> tuple[list[Example], list[Any]]:
    """The rows of a conversation, and its messages and tools."""
    write = Writer(seed, tokenizer_for(path, kind), hostile, chat_for(path, kind)._template.names)
    messages, tools = conversation(write, random.Random(seed), able)
    return chat_for(path, kind).encode(messages, tools=tools), [messages, tools]


def run(case: int, folder: Path) -> str | None:
    draw = random.Random(case)
    path, kind = templates()[case % len(templates())], draw.randrange(len(NORMALIZERS))
    for able in FEATURES:
        try:
            harmless, _ = rows_of(path, kind, case, able, False)
            break
        except DataError:
            continue
    else:
        return f"case {case}: {path.stem} takes no conversation at all"
    try:
        hostile, said = rows_of(path, kind, case, able, True)
    except DataError as error:
        # A message that speaks of both tags of a thought may be taken for one.
        own = "\n" not in str(error) and "has reasoning" in str(error)
        return None if own else f"case {case}: {path.stem} ({', '.join(sorted(able))}) is refused: {error}"
    wrong = difference(tokenizer_for(path, kind), harmless, hostile, said)
    return wrong and f"case {case}: under {path.stem} ({', '.join(sorted(able))}, tokenizer {kind}) {wrong}"


def difference(tokenizer: Any, harmless: list[Example], hostile: list[Example], said: Any) -> str | None:
    """What is wrong with the `hostile` rows, in which `said` stands, beside the `harmless` ones."""
    if len(harmless) != len(hostile):
        return f"{len(hostile)} rows came of {len(harmless)}"
    texts = [*strings(said)]
    kept = {word for text in texts for word in WORD.findall(text)}
    for expected, row in zip(harmless, hostile, strict=True):
        if (found := control(row, tokenizer)) != (right := control(expected, tokenizer)):
            at = next((i for i, pair in enumerate(zip(found, right, strict=False)) if len({*pair}) > 1), len(right))
            return f"the control tokens are {found} in place of {right}: see number {at + 1}"
        if (learned := words(row, tokenizer, kept)) != (meant := words(expected, tokenizer, kept)):
            return f"loss is on {learned} in place of {meant}"
    shown = {word for row in harmless for run in words(row, tokenizer, kept) for word in run}
    whole = "".join(tokenizer.decode(row.ids) for row in hostile)
    for text in texts:
        if not shown.isdisjoint(WORD.findall(text)) and not any(form in whole for form in forms(text, tokenizer)):
            return f"{text!r} is not in the row: {whole!r}"
    return None


def control(row: Example, tokenizer: Any) -> list[str]:
    added = tokenizer.added_tokens_decoder
    return [added[i].content for i in row.ids if i in added]


def words(row: Example, tokenizer: Any, kept: set[str]) -> list[list[str]]:
    """The words in each run of the row, those without loss and those with it in turn: a template may sort them."""
    runs = groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] >= 0)
    return [sorted(kept.intersection(WORD.findall(tokenizer.decode([i for i, _ in run])))) for _, run in runs]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.replace(BREAK, "")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def forms(text: str, tokenizer: Any) -> Iterator[str]:
    """How a template may write `text`: as it is, as JSON, as Python does, once or twice."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    quoted = repr(text)[1:-1], repr(text + "'")[1:-2], repr(text + "\"'")[1:-4], text.replace("\\", r"\\")
    for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], *quoted):
        for again in (form, json.dumps(form, ensure_ascii=False)[1:-1]):
            yield normalizer.normalize_str(again) if normalizer else again
