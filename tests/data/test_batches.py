"""Batches are a pure function of (seed, step), and cutting them differently changes nothing but memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data.batches import Batches, collate
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import DataError

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def rows(lengths: list[int]) -> list[Example]:
    """Rows of distinct tokens, every other token supervised."""
    made, token = [], 0
    for number, length in enumerate(lengths):
        ids = list(range(token, token + length))
        token += length
        made.append(Example(ids=ids, labels=[i if i % 2 else IGNORE for i in ids], source=f"row {number}"))
    return made


@given(lengths, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_every_row_is_seen_exactly_once_per_epoch(sizes: list[int], size: int, accumulate: int, seed: int) -> None:
    batches = Batches(rows(sizes), size, accumulate, seed=seed)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [source for step in steps for batch in batches.window(step) for source in batch.sources]
        assert sorted(seen) == sorted(f"row {i}" for i in range(len(sizes)))


@given(lengths, st.booleans())
def test_collate_pairs_each_supervised_token_with_the_position_before_it(sizes: list[int], packed: bool) -> None:
    made = rows(sizes)
    batch = collate(made, packed=packed)
    flat = batch.input_ids.flatten()
    # Tokens are consecutive within a row, so the position that predicts t holds t − 1.
    assert torch.equal(flat[batch.predict], batch.targets - 1)
    supervised = sum(label != IGNORE for row in made for label in row.labels[1:])
    assert batch.targets.numel() == supervised
    assert torch.equal(batch.position_ids.flatten()[batch.predict], _position_in_row(made, batch.targets) - 1)


def _position_in_row(made: list[Example], targets: torch.Tensor) -> torch.Tensor:
    where = {token: position for row in made for position, token in enumerate(row.ids)}
    return torch.tensor([where[token] for token in targets.tolist()], dtype=torch.long)


@given(lengths, st.integers(1, 40), st.booleans())
def test_max_tokens_bounds_every_pass_and_keeps_the_rows(sizes: list[int], limit: int, packed: bool) -> None:
    whole = Batches(rows(sizes), 8, 2, packing=packed)
    cut = Batches(rows(sizes), 8, 2, packing=packed, max_tokens_per_pack=limit)
    for step in range(whole.steps_per_epoch):
        passes = cut.window(step)
        assert [s for b in passes for s in b.sources] == [s for b in whole.window(step) for s in b.sources]
        assert all(batch.input_ids.numel() <= limit or len(batch.lengths) == 1 for batch in passes)


def test_a_pass_is_filled_to_its_limit() -> None:
    """Rows of 3, 4, 3 tokens: packed, 7 tokens are the first two; padded, the first two take 8."""
    for packed, limit in ((True, 7), (False, 8)):
        batches = Batches(rows([3, 4, 3]), 8, packing=packed, max_tokens_per_pack=limit, shuffle=False)
        assert [batch.lengths for batch in batches.window(0)] == [(3, 4), (3,)]


@given(lengths)
def test_accumulation_draws_the_same_rows_as_one_large_batch(sizes: list[int]) -> None:
    at_once, accumulated = Batches(rows(sizes), 8, 1, seed=3), Batches(rows(sizes), 1, 8, seed=3)
    assert at_once.steps_per_epoch == accumulated.steps_per_epoch
    for step in range(at_once.steps_per_epoch):
        assert at_once.rows(step) == accumulated.rows(step)
        assert all(len(batch.lengths) == 1 for batch in accumulated.window(step))


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_windows_do_not_depend_on_what_was_asked_before(seed: int) -> None:
    made = rows([3] * 20)
    fresh, used = Batches(made, 4, seed=seed), Batches(made, 4, seed=seed)
    for step in (9, 2, 17):
        used.window(step)
    torch.manual_seed(seed)
    assert torch.equal(fresh.window(7)[0].input_ids, used.window(7)[0].input_ids)


def test_seed_and_epoch_change_the_order() -> None:
    made = rows([2] * 50)
    one, two = Batches(made, 50, seed=1), Batches(made, 50, seed=2)
    assert one.rows(0) != one.rows(1)
    assert one.rows(0) != two.rows(0)
    assert Batches(made, 50, shuffle=False).rows(0) == made


def test_rows_of_uneven_length_are_padded_on_the_right() -> None:
    batch = collate(rows([2, 4]), packed=False)
    assert batch.input_ids.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]
    assert collate(rows([2, 4]), packed=True).position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]


def test_a_model_is_called_with_positions_where_rows_are_packed_and_never_with_a_mask() -> None:
    for packed, names in ((True, {"input_ids", "position_ids"}), (False, {"input_ids"})):
        batch = collate(rows([2, 4]), packed=packed)
        assert {name: tensor.shape for name, tensor in batch.inputs().items()} == dict.fromkeys(
            names, batch.input_ids.shape
        )
        moved = batch.to(torch.device("meta"))
        assert {t.device.type for t in (*moved.inputs().values(), moved.predict, moved.targets)} == {"meta"}
        assert (moved.lengths, moved.sources, moved.packed) == (batch.lengths, batch.sources, packed)


def test_no_examples_is_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        Batches([])
