"""Several processes are one run: the same loss and adapter as one process, one error for all, one who writes."""

import os
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.data.batches import collate, deal
from lorafit.data.chat import Example
from lorafit.training.distributed import started
from lorafit.world import World
from tests.conftest import build, uneven
from tests.processes import run

CPU = torch.device("cpu")
LORA = LoraConfig(r=4)
TRAIN = TrainConfig(lr=5e-3, epochs=2, keep_best=False)

# A name -> the family, what is adapted, how it is trained, and how its 13 rows make batches.
CASES: dict[str, tuple[str, LoraConfig, TrainConfig, dict[str, Any]]] = {
    "packed": ("llama", LORA, TRAIN, {"batch_size": 4}),
    "padded": ("llama", LORA, TRAIN, {"batch_size": 4, "packing": False}),
    "accumulated": ("llama", LORA, TRAIN, {"batch_size": 2, "accumulate": 3}),
    "cut": ("llama", LORA, TRAIN, {"batch_size": 6, "max_tokens_per_pack": 50}),
    "a row a step": ("llama", LORA, replace(TRAIN, epochs=0.5), {"batch_size": 1}),
    "held-out": ("llama", LORA, replace(TRAIN, eval_every=2, keep_best=True, patience=2), {"batch_size": 5}),
    "dora": ("qwen2", replace(LORA, variant="dora", train_modules=("norm",)), TRAIN, {"batch_size": 5}),
    "pissa": ("llama", replace(LORA, init="pissa"), replace(TRAIN, lora_plus_ratio=4), {"batch_size": 5}),
    "tokens": ("llama", replace(LORA, train_tokens=(5, 7, 11)), TRAIN, {"batch_size": 5}),
    "riemannian": ("llama", LORA, replace(TRAIN, rule="riemannian", lr=1e-3), {"batch_size": 5}),
    "experts": ("mixtral", LORA, TRAIN, {"batch_size": 5}),
}


def case(name: str, dtype: torch.dtype = torch.float64, **wiring: Any) -> dict[str, Any]:
    """Train one of CASES; what came out of it. Each process draws another start: process 0's is taken."""
    family, lora, config, cut = CASES[name]
    model = build(family, **({"experts_implementation": "eager"} if family == "mixtral" else {})).to(dtype)
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    add_lora(model, lora)
    result = train(
        model,
        Batches(uneven(13), **cut),
        config,
        evaluation=Batches(uneven(7, seed=2), 3, shuffle=False) if name == "held-out" else None,
        **wiring,
    )
    return {
        "losses": [record["loss"] for record in result.history],
        "tokens": [record["tokens"] for record in result.history],
        "evaluations": list(result.evaluations.values()),
        "best": result.best_step,
        "adapter": {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad},
    }


def all_cases() -> dict[str, Any]:
    with started(CPU):
        found: dict[str, Any] = {name: case(name) for name in CASES}
        return found | {"fp32": case("packed", torch.float32)}


@cache
def by_processes(size: int) -> list[dict[str, Any]]:
    found = run(size, all_cases)
    assert all(isinstance(each, dict) for each in found), found
    return found


@cache
def by_one(name: str) -> dict[str, Any]:
    return case("packed", torch.float32) if name == "fp32" else case(name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_several_processes_are_one_run(name: str, size: int) -> None:
    one = by_one(name)
    for several in (found[name] for found in by_processes(size)):
        assert several["tokens"] == one["tokens"]
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert several["evaluations"] == pytest.approx(one["evaluations"], rel=1e-12)
        assert several["best"] == one["best"]
        for tensor, values in one["adapter"].items():
            assert abs(several["adapter"][tensor] - values).max() < 1e-9, tensor


@pytest.mark.parametrize("size", [2, 4])
def test_in_fp32_the_loss_is_the_same_to_rounding(size: int) -> None:
    for found in by_processes(size):
        assert found["fp32"]["losses"] == pytest.approx(by_one("fp32")["losses"], rel=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_end_with_the_same_bits(size: int) -> None:
    first, *others = by_processes(size)
    for other in others:
        for name in first:
            for tensor, values in first[name]["adapter"].items():
                assert (other[name]["adapter"][tensor] == values).all(), (name, tensor)


# --- dealing ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    size=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    most=st.none() | st.integers(1, 60),
    epoch=st.integers(0, 3),
)
def test_each_row_is_dealt_once_an_epoch(
    rows: list[int], size: int, batch_size: int, accumulate: int, most: int | None, epoch: int
) -> None:
    made = [Example([5] * length, [5] * length, f"row {i}") for i, length in enumerate(rows)]
    batches = Batches(made, batch_size, accumulate, max_tokens_per_pack=most)
    seen: list[str] = []
    for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
        windows = [batches.window(step, world=World(rank, size)) for rank in range(size)]
        dealt = [source for window in windows for batch in window for source in batch.sources]
        assert sorted(dealt) == sorted(row.source for row in batches.rows(step))  # the same step as one process's
        assert sum(batch.targets.numel() for window in windows for batch in window) == batches.tokens(step)
        seen += dealt
    assert sorted(seen) == sorted(row.source for row in made)


@given(lengths=st.lists(st.integers(1, 100), max_size=40), size=st.integers(1, 9))
def test_shares_differ_by_no_more_than_the_longest_row(lengths: list[int], size: int) -> None:
    shares = deal([Example([5] * length, [5] * length, "row") for length in lengths], size)
    held = [sum(len(row.ids) for row in share) for share in shares]
    assert max(held) - min(held) <= max(lengths, default=0)


def test_tokens_are_the_supervised_ones() -> None:
    batches = Batches(uneven(9), 4)
    for step in range(3):
        assert batches.tokens(step) == collate(batches.rows(step), packed=True).targets.numel()
