"""The comparison of methods: what is compared, which run comes next, and when it may name a winner."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.methods import report
from benchmarks.methods.__main__ import expected, fits
from benchmarks.methods.methods import BASE, all_methods
from benchmarks.methods.plan import (
    GRID,
    LADDER,
    SEEDS,
    TUNING_SEED,
    Cell,
    count_left,
    is_tuned,
    missing_cells,
    missing_rates,
    tried,
)
from lorafit import INITS, VARIANTS
from lorafit.lora.inits import Init, kaiming


def record(cell: Cell, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    made = cell._asdict() | {
        "tuning_loss": loss, "loss": loss, "steps": 0 if loss is None else 10, "exact": 90, "reported_rows": 100,
        "init_cpu_seconds": 1.0, "train_cpu_seconds": 20.0, "seconds": 30.0, "memory": 2**20, "adapter_bytes": 10**6,
        "settings": {"rows": 10, "epochs": 1, "dtype": "float32"},
        "machine": {"cpu": "c", "threads": 1, "versions": {"torch": "2"}},
    }  # fmt: skip
    return made | more


def played(methods: list[str], loss: Any, tasks: tuple[str, ...] = ("demo",), most: int = 500) -> list[dict[str, Any]]:
    """All runs, in the order in which they are made, where `loss(cell)` is what comes of one."""
    records: list[dict[str, Any]] = []
    while (cell := next(missing_cells(records, tasks, methods), None)) is not None:
        assert len(records) < most
        records.append(record(cell, loss(cell)))
    return records


def test_all_that_is_registered_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    known = all_methods()
    assert next(iter(known)) == BASE
    assert {"pissa", "milora", "olora", "orthogonal", "eva", "lora_ga", "lora_one", "corda", "dora"} <= known.keys()
    assert {"rslora", "lora-fa", "riemannian", "lora-plus", "neftune"} <= known.keys()
    assert set(INITS) - known.keys() == {"kaiming", "gaussian_both"}
    assert set(VARIANTS) <= known.keys()
    monkeypatch.setitem(INITS, "mine", Init("mine", kaiming))
    assert all_methods()["mine"].lora_config().init == "mine"


def test_a_grid_is_extended_on_the_side_of_the_best_rate() -> None:
    assert missing_rates({}) == [GRID[1], GRID[0], GRID[2]]
    assert missing_rates(dict.fromkeys(GRID[:2], 1.0)) == [GRID[2]]
    assert missing_rates(dict(zip(GRID, (2, 1, 2), strict=True))) == []
    assert missing_rates(dict(zip(GRID, (1, 2, 3), strict=True))) == [LADDER[1]]
    assert missing_rates(dict(zip(GRID, (3, 2, 1), strict=True))) == [LADDER[5]]
    assert missing_rates(dict(zip(LADDER[2:], (5, 4, 3, 2, 1), strict=True))) == []  # the ladder ends there
    assert not is_tuned({GRID[1]: 1.0})
    assert not is_tuned(dict(zip(GRID, (1, 2, 3), strict=True)))
    assert is_tuned(dict(zip(GRID, (math.inf, 1, math.inf), strict=True)))


def test_the_order_of_the_runs() -> None:
    """Plain LoRA's grid, everything at the middle rate, the other rates, and seeds in rounds; none twice."""
    best = {"lora": 1e-3, "a": 1e-4, "b": 3e-3}

    def loss(cell: Cell) -> float:
        return abs(math.log(cell.lr / best[cell.method]))

    records = played(["a", "lora", "b"], loss, ("demo", "bioinstruct"))
    cells = [Cell(r["task"], r["method"], r["lr"], r["seed"]) for r in records]
    assert len(set(cells)) == len(cells)
    assert {cell.method for cell in cells[:6]} == {"lora"}
    assert [cell[:3] for cell in cells[6:10]] == [(t, m, GRID[1]) for m in "ab" for t in ("demo", "bioinstruct")]
    final = [cell for cell in cells if cell.seed in SEEDS]
    assert cells[-len(final) :] == final
    assert [cell.seed for cell in final] == sorted(cell.seed for cell in final)
    assert {(cell.method, cell.lr) for cell in final} == set(best.items())
    assert len(final) == 3 * 2 * len(SEEDS)
    assert all(is_tuned(losses) for losses in tried(records).values())
    assert count_left(records, ("demo", "bioinstruct"), ["a", "lora", "b"]) == 0
    assert count_left(records[:-4], ("demo", "bioinstruct"), ["a", "lora", "b"]) == 4
    assert count_left([], ("demo",), ["a"]) == len(GRID) + len(SEEDS)


def test_a_rate_that_blows_up_is_an_outcome() -> None:
    records = played(["lora"], lambda cell: None if cell.lr > 1e-3 else 1 / cell.lr)
    assert {r["lr"] for r in records if r["seed"] in SEEDS} == {1e-3}
    hopeless = played(["lora"], lambda cell: None)
    lines = report.summarise(hopeless)
    assert (lines[0]["loss"], lines[0]["seeds"]) == (None, 0)
    assert "| lora |" in report.table(lines, hopeless)


def test_a_budget_is_kept() -> None:
    cell = Cell("demo", "a", 1e-3, 1)
    records = [record(cell, seconds=10.0), record(cell._replace(method="b"), seconds=50.0)]
    assert expected(cell, records) == 10
    assert expected(cell._replace(method="c"), records) == 30
    assert expected(cell._replace(task="bioinstruct"), records) == 0
    assert fits(cell, records, end=100.0, now=89.0)
    assert not fits(cell, records, end=100.0, now=91.0)
    assert fits(cell, records, end=None, now=1e9)


def test_intervals_hold_what_they_say() -> None:
    """Of 2,000 means of three normal values, and shares of 100 rows, about 95 % lie within."""
    draw = random.Random(1)
    means = [report.mean_interval([draw.gauss(5, 2) for _ in range(3)]) for _ in range(2000)]
    assert 0.935 <= statistics.fmean(i is not None and i.low <= 5 <= i.high for i in means) <= 0.965
    shares = [report.share_interval([sum(draw.random() < 0.9 for _ in range(100))], 100) for _ in range(2000)]
    assert 0.92 <= statistics.fmean(i is not None and i.low <= 0.9 <= i.high for i in shares) <= 0.975
    assert report.mean_interval([1.0]) is None
    assert report.share_interval([], 10) is None
    wide = report.share_interval([50, 90, 100], 100)
    assert wide is not None
    assert wide.low < 0.4  # the seeds differ by more than the rows explain


def noisy(methods: dict[str, float], spread: float) -> list[dict[str, Any]]:
    def loss(cell: Cell) -> float:
        bend = math.log(cell.lr / GRID[1]) ** 2
        return methods[cell.method] + bend + spread * (cell.seed - 2) * (cell.seed != TUNING_SEED)

    return played(list(methods), loss)


def test_a_winner_only_where_intervals_part() -> None:
    lines = report.summarise(noisy({"lora": 1.0, "dora": 0.9, "pissa": 1.1}, 0.01))
    assert {line["method"]: line["verdict"] for line in lines} == {"lora": "", "dora": "better", "pissa": "worse"}
    assert report.winner(lines) == "dora"
    lines = report.summarise(noisy({"lora": 1.0, "dora": 0.9, "pissa": 1.1}, 0.1))
    assert {line["verdict"] for line in lines} == {"", "no difference shown"}
    assert report.winner(lines) is None
    assert report.winner(lines[:1]) is None
    records = noisy({"lora": 1.0, "dora": 0.9}, 0.01)
    some = [r for r in records if (r["method"], r["seed"]) != ("dora", 3)]
    lines = report.summarise(some)
    assert (lines[1]["verdict"], report.winner(lines)) == ("seeds missing", None)
    one = [r for r in records if r["method"] == "lora" or (r["lr"], r["seed"]) == (GRID[1], TUNING_SEED)]
    lines = report.summarise(one)
    assert (lines[1]["verdict"], report.winner(lines)) == ("not tuned", None)
    assert "0.001 of 1, not tuned" in report.table(lines, one)


def test_the_tuning_runs_are_not_reported() -> None:
    records = noisy({"lora": 1.0, "dora": 0.9}, 0.01)
    for r in records:
        if r["seed"] == TUNING_SEED:
            r["loss"] = 100.0
    lines = report.summarise(records)
    assert all(line["loss"].high < 2 and line["seeds"] == len(SEEDS) for line in lines)


def test_the_page_gets_the_part_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = noisy({"lora": 1.0, "dora": 0.9}, 0.01)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "methods.md"
    text = report.write(records, tmp_path, page)
    assert page.read_text().startswith("# Methods\n")
    assert text in page.read_text()
    for begun in ("before\n\n<!-- comparison -->\n\nafter\n", page.read_text()):
        page.write_text(begun)
        monkeypatch.setattr(report, "draw", lambda lines, path: None)
        for _ in range(2):
            report.write(records, tmp_path, page)
            assert page.read_text().count(text) == page.read_text().count("<!-- /comparison -->") == 1
        assert page.read_text().split("<!-- comparison -->")[0] == begun.split("<!-- comparison -->")[0]
        assert page.read_text().split("<!-- /comparison -->")[1].strip() == begun.split("-->")[-1].strip()
    assert (tmp_path / "methods.png").stat().st_size > 1000


def test_only_runs_of_one_kind_stand_in_a_table(tmp_path: Path) -> None:
    one = record(Cell("demo", "lora", 1e-3, 0))
    other = record(Cell("demo", "lora", 1e-3, 1), machine={"cpu": "another"})
    for number, made in enumerate((one, other)):
        (tmp_path / f"{number}.json").write_text(json.dumps(made))
    assert report.read_records(tmp_path, one["machine"], one["settings"]) == [one]
