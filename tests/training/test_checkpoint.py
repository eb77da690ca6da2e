"""Exact resume: stopped anywhere, damaged, or under other settings, a run ends in the same bits or is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.config import as_dict
from lorafit.data.chat import IGNORE
from lorafit.errors import CheckpointError, DiskError, Interrupted, NumericError
from lorafit.training.checkpoint import FREE, RUN, TENSORS, state_folders
from lorafit.training.run import Result

Tiny = Callable[..., nn.Module]
CONFIG = TrainConfig(lr=1e-2, epochs=2, eval_every=2, save_every=0, keep_checkpoints=2, seed=3)
# What a run can be made of: each has to go on exactly.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}, {}),
    "dropout": ("llama", {"dropout": 0.3}, {}, {}),
    "accumulated": ("gpt2", {"dropout": 0.1}, {"batch_size": 2, "accumulate": 3}, {"schedule": "linear"}),
    "padded": ("llama", {}, {"packing": False}, {"schedule": "constant", "weight_decay": 0.1}),
    "small packs": ("qwen2", {"dropout": 0.1}, {"max_tokens_per_pack": 50}, {"warmup": 2}),
    "dora": ("llama", {"variant": "dora", "dropout": 0.2}, {}, {"max_grad_norm": None}),
    "a kept start": ("llama", {"init": "pissa", "variant": "dora"}, {}, {}),
    "in full": ("llama", {"train_modules": ("norm", "lm_head")}, {}, {"keep_best": False}),
    "experts": ("mixtral", {}, {}, {}),
    "rates": ("llama", {"train_modules": ("norm",)}, {}, {"lora_plus_ratio": 4.0, "lr_modules": 1e-3}),
    "lora-fa": ("llama", {"dropout": 0.1}, {}, {"rule": "lora-fa", "neftune": 5.0}),
    "riemannian": ("llama", {"variant": "dora"}, {"max_tokens_per_pack": 50}, {"rule": "riemannian", "neftune": 5.0}),
    "patience": ("llama", {}, {}, {"lr": 0.5, "patience": 1, "epochs": 4}),
}
Again = Callable[..., tuple[Result, dict[str, torch.Tensor]]]


@pytest.fixture
def again(tiny: Tiny, examples: Any) -> Again:
    """Runs training from the beginning of a process, as it were: model, adapter and batches made anew."""

    def run(
        kind: str = "plain", config: TrainConfig = CONFIG, **options: Any
    ) -> tuple[Result, dict[str, torch.Tensor]]:
        family, lora, cut, training = KINDS[kind]
        model = tiny(family)
        torch.manual_seed(5)
        add_lora(model, LoraConfig(**{"r": 4, **lora}))
        batches = Batches(examples(14), **{"batch_size": 4, **cut}, seed=config.seed)
        config = TrainConfig(**{**as_dict(config), **training})
        held_out = Batches(examples(5, seed=8), 2, shuffle=False)
        result = train(model, batches, config, evaluation=held_out, **options)
        return result, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    return run


def after(polls: int) -> Callable[[], str | None]:
    """Asks to stop at the poll number `polls`."""
    left: Iterator[int] = iter(range(polls))
    return lambda: None if next(left, None) is not None else "SIGTEST"


def same(one: tuple[Result, dict[str, torch.Tensor]], other: tuple[Result, dict[str, torch.Tensor]]) -> bool:
    """Equal bits, and the same records but for what the clock says."""
    timeless = [
        [{k: v for k, v in record.items() if k not in ("tokens_per_second", "memory_mb")} for record in run[0].history]
        for run in (one, other)
    ]
    return (
        timeless[0] == timeless[1]
        and one[0].best_step == other[0].best_step
        and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_point_and_resumed_it_ends_in_the_same_bits(kind: str, again: Again, tmp_path: Path) -> None:
    """One run that is stopped at its first poll, then at the second one after that, at the third one …"""
    whole = again(kind)
    polls, pieces = 0, None
    while pieces is None:
        polls += 1
        with suppress(Interrupted):
            pieces = again(kind, resume=tmp_path, stop=after(polls))
    assert polls > 4
    assert same(whole, pieces)
    assert same(whole, again(kind, resume=tmp_path))  # what is finished stays as it is


def test_the_state_is_the_one_after_the_last_whole_step(again: Again, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=rf"^stopped by SIGTEST after 1 of 8 steps; saved in {tmp_path}$"):
        again(checkpoints=tmp_path, stop=after(1))
    with pytest.raises(Interrupted, match=r"after 2 of 8 steps"):
        again(resume=tmp_path, stop=after(2))  # in the evaluation after step 2
    assert [path.name for path in state_folders(tmp_path)] == ["step-00000001", "step-00000002"]
    assert json.loads((tmp_path / "step-00000002" / RUN).read_text())["pending"]["step"] == 1


def test_it_goes_on_from_the_newest(again: Again, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(7))
    assert len(states := state_folders(tmp_path)) == 2
    notes: list[str] = []
    again(resume=tmp_path, on_note=notes.append)
    assert notes[0] == f"going on after step {int(states[-1].name[5:])} of 8, from {states[-1]}"


def test_nothing_is_left_of_a_step_that_was_cut_off(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4))
    with pytest.raises(Interrupted):
        train(model, Batches(examples(4), 1, 4), CONFIG, stop=after(2))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_last_few_are_kept(again: Again, tmp_path: Path) -> None:
    again(checkpoints=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007", "step-00000008"]


def test_without_a_folder_nothing_is_written_and_a_stop_says_so(again: Again, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="nothing was saved"):
        again(stop=after(3))
    assert not list(tmp_path.iterdir())


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "one bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [TENSORS, RUN, "manifest.json"])
def test_a_damaged_state_is_passed_over_with_one_line(name: str, damage: str, again: Again, tmp_path: Path) -> None:
    whole = again()
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(14))
    newest = state_folders(tmp_path)[-1]
    DAMAGE[damage](newest / name)
    notes: list[str] = []
    assert same(whole, again(resume=tmp_path, on_note=notes.append))
    assert f"{newest} is damaged" in notes[0]
    assert "\n" not in notes[0]
    assert f"from {tmp_path / 'step'}" in notes[1]


def test_where_every_state_is_damaged_it_begins_again(again: Again, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(14))
    for folder in state_folders(tmp_path):
        shutil.rmtree(folder)
        folder.mkdir()
    assert same(again(), again(resume=tmp_path))


def test_an_unfinished_run_is_not_begun_anew_by_accident(again: Again, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    with pytest.raises(CheckpointError, match="holds an unfinished run"):
        again(checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 2e-2}, "lr was 0.01 and is 0.02"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"epochs": 3.0, "betas": (0.8, 0.99)}, "epochs was 2 and is 3.0, betas was .0.9, 0.999. and is .0.8, 0.99."),
        ({"schedule": "linear"}, "schedule was 'cosine' and is 'linear'"),
        ({"eval_every": 3}, "eval_every was 2 and is 3"),
    ],
)
def test_changed_settings_are_refused_by_name(
    changes: dict[str, Any], named: str, again: Again, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    with pytest.raises(CheckpointError, match=named):
        again(config=TrainConfig(**{**as_dict(CONFIG), **changes}), resume=tmp_path)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("dropout", r"dropout was 0.0 and is 0.3"),
        ("padded", r"packed was True and is False"),
        ("accumulated", r"batch_size was 4 and is 2"),
        ("small packs", r"max_tokens_per_pack was None and is 50"),
        ("dora", r"variant was 'lora' and is 'dora'"),
    ],
)
def test_another_adapter_or_other_batches_are_refused_by_name(
    kind: str, named: str, again: Again, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    with pytest.raises(CheckpointError, match=named):
        again(kind, resume=tmp_path)


@pytest.mark.parametrize("which", ["ids", "labels"])
def test_other_rows_are_refused(which: str, again: Again, tiny: Tiny, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    rows = examples(14)
    getattr(rows[3], which)[-1] = 7 if which == "ids" else IGNORE
    model = tiny("llama")
    torch.manual_seed(5)
    add_lora(model, LoraConfig(r=4))
    held_out = Batches(examples(5, seed=8), 2, shuffle=False)
    with pytest.raises(CheckpointError, match=r"rows was '14 rows, \w+' and is '14 rows, \w+'"):
        train(model, Batches(rows, 4, seed=3), CONFIG, evaluation=held_out, resume=tmp_path)


def test_another_base_model_is_refused(again: Again, tiny: Tiny, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.1)
    torch.manual_seed(5)
    add_lora(model, LoraConfig(r=4))
    held_out = Batches(examples(5, seed=8), 2, shuffle=False)
    with pytest.raises(CheckpointError, match=r"begun on another base model \(model\.layers\.0.* has other values"):
        train(model, Batches(examples(14), 4, seed=3), CONFIG, evaluation=held_out, resume=tmp_path)


def test_what_changes_no_result_may_change(again: Again, tmp_path: Path) -> None:
    whole = again()
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    other = {"save_every": 10.0, "keep_checkpoints": 1, "max_bad_steps": 9, "checkpointing": True}
    assert {*other, "shard"} == set(FREE)  # which needs several processes: test_sharding.py
    assert same(whole, again(config=TrainConfig(**{**as_dict(CONFIG), **other}), resume=tmp_path))


def test_another_machine_is_said_and_goes_on(again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        again(checkpoints=tmp_path, stop=after(5))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    notes: list[str] = []
    again(resume=tmp_path, on_note=notes.append)
    assert "was written with processor " in notes[0]
    assert "here OTHER: the run goes on, equal to rounding" in notes[0]


def test_room_on_the_disk_is_looked_for_before_the_first_step(
    again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("lorafit.files.shutil.disk_usage", lambda path: free)
    records: list[Any] = []
    with pytest.raises(DiskError, match="MiB are needed and 0 MiB are free"):
        again(checkpoints=tmp_path / "run", on_step=records.append)
    assert not records


def test_nothing_that_is_not_finite_is_written(tiny: Tiny, examples: Any, tmp_path: Path) -> None:
    """A learning rate that throws the weights to infinity in one step."""
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4))
    config = TrainConfig(lr=3e38, steps=4, warmup=0, schedule="constant", weight_decay=1.0, save_every=0)
    with pytest.raises(NumericError, match="NaN or infinity in"):
        train(model, Batches(examples(8), 4), config, checkpoints=tmp_path)
    assert not state_folders(tmp_path)
