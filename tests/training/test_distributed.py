"""Several processes are one run: the same loss and adapter as one process, one error for all, one who writes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.data.batches import collate, deal
from lorafit.data.chat import Example
from lorafit.errors import DataError, LorafitError, OutOfMemory
from lorafit.training import checkpoint, loop
from lorafit.training.backoff import PassLimit
from lorafit.training.checkpoint import state_folders
from lorafit.training.distributed import exchange, main_first, started, together
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


SIZES = [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]


@cache
def by_processes(size: int) -> list[dict[str, Any]]:
    found = run(size, all_cases)
    assert all(isinstance(each, dict) for each in found), found
    return found


@cache
def by_one(name: str) -> dict[str, Any]:
    return case("packed", torch.float32) if name == "fp32" else case(name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_several_processes_are_one_run(name: str, size: int) -> None:
    one = by_one(name)
    for several in (found[name] for found in by_processes(size)):
        assert several["tokens"] == one["tokens"]
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert several["evaluations"] == pytest.approx(one["evaluations"], rel=1e-12)
        assert several["best"] == one["best"]
        for tensor, values in one["adapter"].items():
            assert abs(several["adapter"][tensor] - values).max() < 1e-9, tensor


@pytest.mark.parametrize("size", SIZES)
def test_in_fp32_the_loss_is_the_same_to_rounding(size: int) -> None:
    for found in by_processes(size):
        assert found["fp32"]["losses"] == pytest.approx(by_one("fp32")["losses"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
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


# --- one run, one end ---------------------------------------------------------------------------------


def said(action: Callable[[], Any]) -> str:
    """The error of `action`, as text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def agreements() -> dict[str, Any]:
    with started(CPU) as here:

        def fail(where: Any, rank: int, error: Exception) -> None:
            with where:
                if here.rank == rank:
                    raise error

        total = torch.tensor(1.0 + here.rank, dtype=torch.float64)
        with together(here, total):
            pass
        return {
            "sum": total.item(),
            "exchanged": exchange({"rank": here.rank}),
            "refused by 1": said(lambda: fail(together(here), 1, DataError("row 3 is empty"))),
            "broken in 1": said(lambda: fail(together(here), 1, KeyError("x"))),
            "refused by 0": said(lambda: fail(main_first(here), 0, OutOfMemory("row 4 is long"))),
            "still there": exchange(here.rank),
        }


def test_what_fails_on_one_process_fails_on_all() -> None:
    for rank, found in enumerate(run(3, agreements)):
        assert found["sum"] == 6
        assert found["exchanged"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["refused by 1"] == "DataError: process 1: row 3 is empty"
        assert found["broken in 1"] == ("KeyError: 'x'" if rank == 1 else "ProcessError: process 1: KeyError: 'x'")
        assert found["refused by 0"] == "OutOfMemory: row 4 is long"
        assert found["still there"] == [0, 1, 2]


def trained(
    folder: Path | None = None, steps: int = 6, rows: int = 16, width: int = 32, **wiring: Any
) -> dict[str, Any]:
    """A run with dropout, so that its random numbers count too; its adapter, records and notes."""
    model = build("llama", hidden_size=width).double()
    torch.manual_seed(5)
    add_lora(model, replace(LORA, dropout=wiring.pop("dropout", 0.2)))
    notes: list[str] = []
    config = replace(TRAIN, steps=steps, save_every=0)
    batches = Batches(uneven(rows), 4)
    result = train(model, batches, config, on_note=notes.append, **{"resume": folder, **wiring})
    return {
        "losses": [record["loss"] for record in result.history],
        "notes": notes,
        "skipped": result.skipped,
        "adapter": [p.detach().numpy().copy() for p in model.parameters() if p.requires_grad],
    }


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all((a == b).all() for a, b in zip(one["adapter"], other["adapter"], strict=True))


def stopped_then_resumed(folder: Path) -> dict[str, Any]:
    """Process 1 alone is asked to stop in step 3; then all go on. Beside it the run that was not stopped."""
    with started(CPU) as here:
        asked = iter(range(1000))

        def stop() -> str | None:
            return "SIGTERM" if here.rank == 1 and next(asked) == 3 else None

        whole = trained()
        ended = said(lambda: trained(folder, stop=stop))
        states = exchange([path.name for path in state_folders(folder)])
        return {"whole": whole, "ended": ended, "states": states, "resumed": trained(folder)}


def test_a_stop_of_one_stops_all_and_the_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    for found in run(2, stopped_then_resumed, tmp_path / "states"):
        kept = f"saved in {tmp_path / 'states'}"
        assert found["ended"] == f"Interrupted: stopped by SIGTERM after 3 of 6 steps; {kept}"
        assert found["states"][0][-1] == "step-00000003"
        assert same_bits(found["whole"], found["resumed"])
        assert found["whole"]["losses"] == found["resumed"]["losses"]


def begun(folder: Path) -> str:
    with started(CPU):
        asked = iter(range(1000))
        return said(lambda: trained(folder, dropout=0.0, stop=lambda: "SIGTERM" if next(asked) == 4 else None))


def resumed(folder: Path) -> dict[str, Any]:
    with started(CPU):
        return trained(folder, dropout=0.0)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_on_another_number_of_processes_a_run_goes_on_to_rounding(before: int, after: int, tmp_path: Path) -> None:
    whole = trained(dropout=0.0)
    assert all("after 4 of 6" in ended for ended in run(before, begun, tmp_path))
    first, *others = run(after, resumed, tmp_path) if after > 1 else [trained(tmp_path, dropout=0.0)]
    assert any(f"processes {before}, here {after}: the run goes on, equal to rounding" in n for n in first["notes"])
    for found in (first, *others):
        assert same_bits(first, found)
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-12)
        for a, b in zip(whole["adapter"], found["adapter"], strict=True):
            assert abs(a - b).max() < 1e-9


def killed(folder: Path) -> Any:
    """Process 1 is killed in step 3, as by the system."""
    with started(CPU) as here:
        asked = iter(range(1000))

        def stop() -> str | None:
            if here.rank == 1 and next(asked) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return None

        return said(lambda: trained(folder, stop=stop))


def test_a_killed_process_ends_the_others_who_save_what_there_is(tmp_path: Path) -> None:
    began = time.monotonic()
    first, second, third = run(3, killed, tmp_path)
    assert time.monotonic() - began < 60
    assert second is None
    for found in (first, third):
        assert found.startswith("ProcessError: another process of this run is gone, or does not answer: ")
        assert found.endswith(f" after 3 of 6 steps; saved in {tmp_path}")
    assert state_folders(tmp_path)[-1].name == "step-00000003"


def troubles() -> dict[str, Any]:
    """What happens to one process only, and what comes of it."""
    with started(CPU) as here:

        @contextmanager
        def changed(name: str, value: Any, where: Any = loop) -> Iterator[None]:
            before = getattr(where, name)
            try:
                if here.rank == 1:
                    setattr(where, name, value)
                yield
            finally:
                setattr(where, name, before)

        fits = PassLimit.fits

        @contextmanager
        def small(limit: PassLimit, batch: Any) -> Iterator[None]:
            with fits(limit, batch):
                if batch.input_ids.numel() > 60 and len(batch.lengths) > 1:
                    raise MemoryError
                yield

        def poisoned(model: Any, batch: Any, head: Any) -> torch.Tensor:
            return true_loss(model, batch, head) * (torch.nan if "row 3" in batch.sources else 1)

        from lorafit.training import run as run_module

        true_loss = run_module.summed_loss
        found: dict[str, Any] = {
            "rows": said(lambda: trained(rows=16 + here.rank)),
            "steps": said(lambda: trained(steps=6 + here.rank)),
            "base": said(lambda: trained(width=32 + 32 * here.rank)),
        }
        true_share = checkpoint.share

        def badly_shared(run: Any) -> None:
            true_share(run)
            _, parameter = next(run.trained())
            parameter.data.flatten()[0] += 1e-9

        with changed("share", badly_shared, checkpoint):
            found["adapter"] = said(trained)
        with changed("fits", small, PassLimit):
            found["small"] = trained(dropout=0.0)
        run_module.summed_loss = poisoned
        found["poisoned"] = trained(steps=4)
        return found


def test_trouble_of_one_process_is_everybodys() -> None:
    one = trained(dropout=0.0)
    first, second = run(2, troubles)
    for found in (first, second):
        assert found["rows"].startswith("UsageError: process 1 differs from process 0 in rows: start all of them")
        assert "process 1 differs from process 0 in steps" in found["steps"]
        assert "process 1 differs from process 0 in base model" in found["base"]
        assert found["adapter"].startswith("UsageError: process 1 differs from process 0 in adapter")
        assert any("out of memory with" in note for note in found["small"]["notes"])
        assert found["small"]["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert len(found["poisoned"]["skipped"]) == 1
    assert first["small"]["notes"] == second["small"]["notes"]
    assert same_bits(first["small"], second["small"])
    assert same_bits(first["poisoned"], second["poisoned"])


def test_processes_that_nobody_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LorafitError, match="one of 2 processes, which do not know each other"):
        trained()
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(LorafitError, match="must be numbers, as torchrun sets them"):
        trained()
