"""What a run notes: counts, and answers that are the model's own."""

from typing import Any

import pytest
import torch

from lorafit.app import about
from lorafit.data.chat import IGNORE, Example


def row(*labels: int) -> Example:
    return Example(ids=[abs(label) for label in labels], labels=[label if label > 0 else IGNORE for label in labels])


@pytest.mark.parametrize(
    ("example", "parts"),
    [
        (row(-1, -2, 3, 4), ([1, 2], [3, 4])),
        (row(-1, 2, -3, 4, 5, -6), ([1, 2, 3], [4, 5])),  # the last answer of two, and what stands behind it left out
        (row(1, 2, 3), None),  # a text: nothing to answer
        (row(-1, -2), None),
    ],
)
def test_the_last_answer_and_what_stands_before_it(example: Example, parts: Any) -> None:
    assert about.split(example) == parts


def test_every_row_is_counted_once_at_its_length(examples: Any) -> None:
    rows = examples(50)
    counted = about.statistics(rows, rows[:3])
    assert (counted["rows"], counted["held_out"]) == (50, 3)
    assert counted["tokens"] == sum(len(r.ids) for r in rows)
    edges, counts = counted["lengths"]["edges"], counted["lengths"]["rows"]
    for i, edge in enumerate(edges):
        assert sum(counts[: i + 1]) == sum(len(r.ids) <= edge for r in rows)
        assert sum(counted["lengths"]["supervised"][: i + 1]) == sum(
            sum(label != IGNORE for label in r.labels) <= edge for r in rows
        )


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_the_likeliest_ids_one_by_one(family: str, tiny: Any) -> None:
    model = tiny(family)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    for prompt, said in zip(prompts, about.continued(model, prompts, 6, frozenset()), strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert said == ids[len(prompt) :]
