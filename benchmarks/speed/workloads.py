"""What is trained in the benchmark: rows of token ids as a pure function of a name, and the model's shape.

Every peer is given the same rows in the same order. The ids are noise, which costs as much as text: no kernel looks at
what a token says. Only lengths and labels matter, and these follow what instruction data looks like.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafit.data.chat import IGNORE, Example


@dataclass(frozen=True)
class Setup:
    """The adapter and the optimizer of every peer: all linear layers but the head, constant rate, no weight decay."""

    r: int = 16
    alpha: float = 32.0
    lr: float = 1e-4
    clip: float = 1.0
    variant: str = "lora"

    @property
    def scale(self) -> float:
        return self.alpha / self.r


Lengths = Callable[[random.Random], tuple[int, int]]


@dataclass(frozen=True)
class Workload:
    """Rows per step, and how long a prompt and an answer are: a cost. Without `lengths` real text: a way to a loss."""

    name: str
    batch: int
    lengths: Lengths | None
    about: str
    setup: Setup = Setup()


def _short(draw: random.Random) -> tuple[int, int]:
    return draw.randint(30, 140), draw.randint(10, 116)


def _lognormal(draw: random.Random) -> tuple[int, int]:
    """Medians 60 and 60, a long tail, and the whole row at most 448 tokens, of which one is an answer's."""
    prompt, answer = (max(1, round(draw.lognormvariate(math.log(60), 0.8))) for _ in range(2))
    prompt = min(prompt, 447)
    return prompt, min(answer, 448 - prompt)


def _full(draw: random.Random) -> tuple[int, int]:
    return 0, 256


def _retrieval(draw: random.Random) -> tuple[int, int]:
    return draw.randint(600, 1000), draw.randint(10, 80)


WORKLOADS = {
    work.name: work
    for work in (
        Workload("W1", 4, _short, "4 rows, prompts of 30 to 140 tokens, answers of 10 to 116"),
        Workload("W2", 8, _lognormal, "8 rows, log-normal lengths, medians 60 + 60, at most 448"),
        Workload("W3", 4, _full, "4 rows of 256 tokens, all of them supervised"),
        Workload("W4", 2, _retrieval, "2 rows, prompts of 600 to 1000 tokens, answers of 10 to 80"),
        Workload("W5", 8, None, "SmolLM2-135M-Instruct on real rows, 8 a step, to a validation loss", Setup(lr=5e-4)),
    )
}


def rows_of(work: Workload, count: int, vocab: int, shrink: int = 1) -> list[Example]:
    """The first `count` rows; more of them begin with the same. `shrink` divides lengths, for checks on tiny models."""
    assert work.lengths is not None
    draw = random.Random(f"lorafit speed {work.name}")
    rows = []
    for number in range(count):
        prompt, answer = (math.ceil(n / shrink) for n in work.lengths(draw))
        ids = [draw.randrange(vocab) for _ in range(prompt + answer)]
        rows.append(Example(ids, [IGNORE] * prompt + ids[prompt:], f"{work.name} row {number + 1}"))
    return rows


def supervised(rows: Sequence[Example]) -> int:
    """Tokens that carry loss: nothing predicts a row's first token."""
    return sum(label != IGNORE for row in rows for label in row.labels[1:])


def real(rows: Sequence[Example]) -> int:
    """Tokens that are no padding."""
    return sum(len(row.ids) for row in rows)


def make_model(layers: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """Qwen1.5-0.5B's shape with random weights, the same for the same arguments."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**(shape | changes)))
    return model.to(dtype).train()


def tiny_model() -> nn.Module:
    """The same, so narrow that a step takes milliseconds."""
    return make_model(
        2, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=4, vocab_size=512
    )


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def initial(model: nn.Module, setup: Setup, b_std: float = 0.0) -> Factors:
    """The A and B that every peer starts from. With B = 0 A has no gradient: comparing gradients needs `b_std`."""
    generator = torch.Generator().manual_seed(1)
    found: Factors = {}
    for name, layer in targets(model).items():
        A = (torch.rand(setup.r, layer.in_features, generator=generator) * 2 - 1) / math.sqrt(layer.in_features)
        found[name] = (A, torch.randn(layer.out_features, setup.r, generator=generator) * b_std)
    return found
