"""How far apart two models are that should be the same: an adapter and its merge.

`probe` lets a model answer a few prompts and keeps the logits of every token it said; probing a second model
over the same rows, and `compare`, say how much the logits moved and how often the likeliest token is still the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model.generate import Conversation, next_ids, prompt_ids
from lorafit.training.modes import evaluating

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three things that are red.",
    "Explain in a few words why the sky is blue.",
)


@dataclass(frozen=True)
class Probe:
    """Rows (prompt and greedy answer), where each answer begins, and the logits (n, V) that made it."""

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """What `compare` found. Printed, it is one line."""

    largest: float
    scale: float
    agreeing: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.2g} (largest logit {self.scale:.3g}), "
            f"same greedy token at {self.agreeing} of {self.tokens} positions"
        )


def probe(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Conversation] = PROMPTS,
    *,
    max_new_tokens: int = 24,
    like: Probe | None = None,
) -> Probe:
    """What `model` answers to `prompts`, and the logits behind it; or its logits over the rows of `like`."""
    if like is None:
        starts = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        answers = [[ids[0] for ids in next_ids(model, [start], max_new_tokens=max_new_tokens)] for start in starts]
        rows = tuple(tuple(s + [i for i in a if i is not None]) for s, a in zip(starts, answers, strict=True))
        begins = tuple(map(len, starts))
    else:
        rows, begins = like.rows, like.starts
    device = next(model.parameters()).device
    logits = []
    with evaluating(model), torch.no_grad():
        for row, begin in zip(rows, begins, strict=True):
            output = model(input_ids=torch.tensor([row], device=device), use_cache=False)
            logits.append(output.logits[0, begin - 1 :].float().cpu())
    return Probe(rows, begins, torch.cat(logits))


def compare(a: Probe, b: Probe) -> Difference:
    """How `b` differs from `a`, two probes over the same rows."""
    return Difference(
        largest=(a.logits - b.logits).abs().max().item(),
        scale=a.logits.abs().max().item(),
        agreeing=int((a.logits.argmax(-1) == b.logits.argmax(-1)).sum()),
        tokens=len(a.logits),
    )
