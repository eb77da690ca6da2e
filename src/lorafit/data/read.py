"""Rows become examples: what `check.each_row` hands over is tokenised, and what does not fit is cut or dropped."""

from collections.abc import Callable
from functools import cache
from typing import Any

from lorafit.data.chat import ChatTemplate, Example, LossOn, encode_continuation, encode_text
from lorafit.data.check import Data, Progress, each_row, name_of
from lorafit.data.forms import Sample
from lorafit.errors import DataError, UsageError, listing


def read_examples(
    data: Data,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    loss_on: LossOn = "assistant",
    chat_template: str | None = None,
    allow_dropped: float = 0.05,
    on_note: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> list[Example]:
    """The examples of a file, a hub dataset, or a list of rows.

    `data` may end in a split or slice: `name:train[:1%]`, `rows.jsonl:[:100]`. `on_note` is told, a sentence each
    time, which rows were dropped or cut; `progress` is called with (rows done, rows in all).
    """
    if loss_on not in ("assistant", "last", "all"):
        raise UsageError(f"loss_on must be assistant, last or all, not {loss_on!r}")
    rows = each_row(data, _Encoder(tokenizer, loss_on, chat_template), progress)
    examples: list[Example] = []
    dropped: list[str] = []
    cut = 0
    for source, made in rows:
        # The first token of a row is never predicted, so a label there teaches nothing.
        kept = [example for example in made if any(label >= 0 for label in example.labels[1:max_length])]
        cut += sum(len(example.ids) > max_length for example in kept)
        examples += [Example(e.ids[:max_length], e.labels[:max_length], e.source) for e in kept]
        if not kept:
            dropped.append(source)
    name = name_of(data)
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
    """Turns samples into examples."""

    def __init__(self, tokenizer: Any, loss_on: LossOn, chat_template: str | None) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.has_template = bool(chat_template or tokenizer.chat_template)
        self.chat = cache(lambda with_tools: ChatTemplate(tokenizer, chat_template, with_tools=with_tools))

    def __call__(self, sample: Sample, source: str) -> list[Example]:
        if sample.text is not None:
            return [encode_text(sample.text, self.tokenizer, source)]
        if sample.pair and not self.has_template:
            prompt, completion = sample.pair
            return [encode_continuation(prompt, completion, self.tokenizer, self.loss_on, source)] if completion else []
        chat = self.chat(bool(sample.tools))
        messages, tools = sample.messages, sample.tools
        return chat.encode(messages, loss_on=self.loss_on, tools=tools, since=sample.since, source=source)
