"""Trackers are told what stands in log.jsonl, and never end a run."""

import json
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorafit.app import trackers
from lorafit.app.cli import main
from lorafit.app.trackers import TRACKERS, check_trackers, following, tracker
from lorafit.errors import UsageError

SETTINGS = {"model": "/home/me/models/tiny", "data": "/home/me/rows.jsonl", "lr": 0.001, "out": "/home/me/run"}
PUBLIC = {"model": "tiny", "data": "rows.jsonl", "lr": 0.001}
RECORDS: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0, "loss": 2.0, "lr": 0.1},
    {"step": 1, "epoch": 0, "loss": None, "lr": 0.2, "eval_loss": 1.5},
]
TOLD = [
    (0, {"train/epoch": 0, "train/loss": 2.0, "train/lr": 0.1}),
    (1, {"train/epoch": 0, "train/lr": 0.2, "eval/loss": 1.5}),
]


class StandIn:
    """What each package is asked for, as a module; `heard` is what it was told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.heard: dict[int, dict[str, float]] = {}
        self.text = ""
        self.ended = 0

    def init(self, **options: Any) -> "StandIn":
        self.begun = options
        return self

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.heard[step] = dict(numbers)

    def finish(self) -> None:
        self.ended += 1

    def summary_writer(self, folder: str, purge_step: int | None) -> Any:
        self.begun = {"folder": folder, "purge_step": purge_step}
        return SimpleNamespace(
            add_text=lambda name, text: setattr(self, "text", text),
            add_scalar=lambda name, value, step: self.heard.setdefault(step, {}).update({name: value}),
            close=self.finish,
        )


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    """All three are installed."""
    stands = {name: StandIn() for name in ("tensorboard", "wandb", "trackio")}
    for name, stand in stands.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(init=stand.init, log=stand.log, finish=stand.finish)
        monkeypatch.setitem(sys.modules, name, module)
    board = ModuleType("torch.utils.tensorboard")
    board.__dict__["SummaryWriter"] = stands["tensorboard"].summary_writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return stands


def told(names: list[str], folder: Path, done: int = 0) -> list[str]:
    notes: list[str] = []
    with following(names, folder, SETTINGS, done, notes.append) as follow:
        for record in RECORDS:
            follow(record)
    return notes


def test_each_is_told_every_step_and_the_settings(packages: dict[str, StandIn], tmp_path: Path) -> None:
    assert told(list(TRACKERS), tmp_path) == []
    for stand in packages.values():
        assert list(stand.heard.items()) == TOLD
        assert stand.ended == 1
    assert packages["wandb"].begun["config"] == packages["trackio"].begun["config"] == PUBLIC
    assert packages["wandb"].begun["project"] == packages["trackio"].begun["project"] == "lorafit"
    assert packages["tensorboard"].begun == {"folder": str(tmp_path / "tensorboard"), "purge_step": None}
    assert "    model: tiny" in packages["tensorboard"].text
    assert "/home/me" not in str([stand.begun for stand in packages.values()]) + packages["tensorboard"].text


def test_a_resumed_run_goes_on_under_its_id(packages: dict[str, StandIn], tmp_path: Path) -> None:
    began = []
    for done in (0, 1, 0):
        told(["wandb", "tensorboard"], tmp_path, done)
        began.append((packages["wandb"].begun["id"], packages["tensorboard"].begun["purge_step"]))
    (first, _), (second, purge), (anew, _) = began
    assert first == second != anew
    assert purge == 1
    assert packages["wandb"].begun["resume"] == "allow"


def test_the_projects_name_may_come_from_the_environment(
    packages: dict[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    told(["wandb"], tmp_path)
    assert packages["wandb"].begun["project"] == "mine"


def test_a_tracker_that_fails_is_left_out(packages: dict[str, StandIn], tmp_path: Path) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no route\nto host")

    packages["wandb"].log = fail  # type: ignore[method-assign]
    packages["trackio"].finish = fail  # type: ignore[method-assign]
    sys.modules["trackio"].__dict__["finish"] = fail
    assert told(["wandb", "trackio"], tmp_path) == [
        "wandb is not told any more (no route); log.jsonl goes on",
        "trackio did not end well: no route",
    ]
    assert list(packages["trackio"].heard.items()) == TOLD
    assert packages["wandb"].ended == 1


def test_one_that_does_not_start_stops_the_run_before_it_begins(
    packages: dict[str, StandIn], tmp_path: Path
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("no API key")

    sys.modules["wandb"].__dict__["init"] = refuse
    with pytest.raises(UsageError, match=r"--track wandb: it does not start: no API key"):
        told(["trackio", "wandb"], tmp_path)
    assert packages["trackio"].ended == 1


def test_training_that_breaks_off_ends_them(packages: dict[str, StandIn], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), following(["wandb"], tmp_path, SETTINGS, 0, print):
        raise KeyboardInterrupt
    assert packages["wandb"].ended == 1


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    assert told([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("packages")
def test_a_tracker_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(trackers, "TRACKERS", {**TRACKERS})
    tracker("json")(lambda run: (lambda *what: heard.append(what), lambda: heard.append(run.settings)))
    check_trackers(["json"])  # a package of that name is installed
    told(["json"], tmp_path)
    assert heard == [*TOLD, PUBLIC]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--track wandbb", "--track knows no 'wandbb' (did you mean 'wandb'?): there are tensorboard, wandb, trackio"),
        ("--track trackio", "--track trackio needs the package trackio: pip install trackio"),
    ],
)
def test_what_cannot_be_followed_is_said_before_anything_is_loaded(
    words: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(f"train --model M --data D --out {tmp_path / 'run'} {words}".split()) == 2
    assert capsys.readouterr().err == f"lorafit: {line}\n"
    assert not (tmp_path / "run").exists()


def test_the_log_is_written_beside(packages: dict[str, StandIn], tmp_path: Path) -> None:
    """From the command line, where what is told and what is logged are the same records."""
    from rich.console import Console

    from lorafit.app import runs

    log = tmp_path / "log.jsonl"
    console = Console(quiet=True)
    with (
        following(["wandb"], tmp_path, SETTINGS, 0, print) as tell,
        runs.progress(console, 2, log, tell=tell) as show,
    ):
        for record in RECORDS:
            show({"grad_norm": 1.0, "tokens_per_second": 1.0, "memory_mb": 1.0, **record})
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in logged] == list(packages["wandb"].heard)
    assert [record["lr"] for record in logged] == [n["train/lr"] for n in packages["wandb"].heard.values()]
