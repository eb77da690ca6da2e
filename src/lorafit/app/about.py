"""What `train` notes of a run for its report and its model card, beside the log: all small, none of it a guess.

The data in numbers, how much each layer was changed, and a few answers from before and after.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit import __version__
from lorafit.adapter.spectrum import updates
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import LorafitError
from lorafit.lora.inject import Plan, lora_disabled
from lorafit.model.generate import next_ids, stop_tokens

LONGEST_PROMPT = 512
BINS = 24


@dataclass(frozen=True)
class Sample:
    """A question of the data, its answer there, and what the model says without the adapter and with it."""

    source: str
    prompt: str
    answer: str
    before: str
    after: str


def about(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    *,
    settings: Mapping[str, Any],
    count: int,
    tokens: int,
) -> dict[str, Any]:
    """All of it, as JSON. `count` rows, held out if there are any, are answered with at most `tokens` tokens; that the
    model cannot answer them does not end the run."""
    facts: dict[str, Any] = {
        "lorafit": __version__,
        "local": [name for name, value in settings.items() if isinstance(value, str) and _is_path(value)],
        "torch": torch.__version__,
        "model": {"class": type(model).__name__, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")},
        "plan": {"text": str(plan), "trainable": plan.trainable, "total": plan.total},
        "data": statistics(rows, held_out),
        "layers": [asdict(update) for update in updates(model)],
    }
    try:
        facts["samples"] = [asdict(s) for s in samples(model, tokenizer, held_out or rows, count, tokens)]
    except LorafitError as error:
        facts["samples"], facts["no_samples"] = [], str(error)
    return facts


def statistics(rows: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Counts, and how long rows and their supervised parts are: `counts[i]` rows of at most `edges[i]` tokens."""
    lengths = [len(row.ids) for row in rows]
    carry = [sum(label != IGNORE for label in row.labels) for row in rows]
    edges = [-(-max(lengths) * (i + 1) // BINS) for i in range(BINS)]

    def counts(values: Sequence[int]) -> list[int]:
        bins = [next(i for i, edge in enumerate(edges) if value <= edge) for value in values]
        return [bins.count(i) for i in range(BINS)]

    return {
        "rows": len(rows),
        "held_out": len(held_out),
        "tokens": sum(lengths),
        "supervised": sum(carry),
        "lengths": {"edges": edges, "rows": counts(lengths), "supervised": counts(carry)},
    }


def samples(model: nn.Module, tokenizer: Any, rows: Sequence[Example], count: int, tokens: int) -> list[Sample]:
    """The first `count` rows that end in an answer to a prompt, and up to `tokens` tokens of each model's answer."""
    asked = [(row, *parts) for row in rows if (parts := split(row)) and len(parts[0]) <= LONGEST_PROMPT][:count]
    if not asked or not tokens:
        return []
    prompts = [prompt for _, prompt, _ in asked]
    # What ends an answer in training ends it here, whatever the tokenizer's own end token is.
    ends = {answer[-1] for _, _, answer in asked} & tokenizer.added_tokens_decoder.keys()
    stop = stop_tokens(model, tokenizer)[0] | ends
    said = []
    for context in (lora_disabled(model), nullcontext()):
        with context:
            said.append([text(tokenizer, ids) for ids in continued(model, prompts, tokens, stop)])
    return [
        Sample(row.source, tokenizer.decode(prompt), text(tokenizer, answer), before, after)
        for (row, prompt, answer), before, after in zip(asked, *said, strict=True)
    ]


def split(row: Example) -> tuple[list[int], list[int]] | None:
    """The ids of a row before its last answer, and those of that answer; None if nothing stands before it."""
    end = max((i for i, label in enumerate(row.labels) if label != IGNORE), default=-1) + 1
    begin = next((i for i in range(end, 0, -1) if row.labels[i - 1] == IGNORE), 0)
    return (row.ids[:begin], row.ids[begin:end]) if begin else None


def continued(model: nn.Module, prompts: Sequence[list[int]], tokens: int, stop: frozenset[int]) -> list[list[int]]:
    """The likeliest ids behind each prompt; together, where the model can be told what is padding."""
    together = len(prompts) if "past_key_values" in inspect.signature(model.forward).parameters else 1
    answers: list[list[int]] = []
    for start in range(0, len(prompts), together):
        batch: list[list[int]] = [[] for _ in prompts[start : start + together]]
        for step in next_ids(model, prompts[start : start + together], max_new_tokens=tokens, stop=stop):
            for answer, token in zip(batch, step, strict=True):
                answer += [] if token is None else [token]
        answers += batch
    return answers


def text(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer, without the tokens that only end it."""
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded.strip()


def _is_path(value: str) -> bool:
    return bool(value) and Path(value.partition(":")[0]).expanduser().exists()
