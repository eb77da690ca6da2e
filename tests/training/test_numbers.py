"""What is not finite is neither trained on nor written; what teaches nothing changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, save_lora, train
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import NumericError
from lorafit.training.loop import begin, take_step

Tiny = Callable[..., nn.Module]
STEPS = 6


def adapted(tiny: Tiny, **config: Any) -> nn.Module:
    model = tiny("llama")
    torch.manual_seed(3)
    add_lora(model, LoraConfig(**{"r": 4, "dropout": 0.1, **config}))
    return model


def first_trained(model: nn.Module) -> nn.Parameter:
    return next(p for p in model.parameters() if p.requires_grad)


# Each makes one thing of the run not finite.
POISONS: dict[str, Callable[[Any, float], Any]] = {
    "a base weight": lambda run, value: run.model.model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0].fill_(value),
    "a trained weight": lambda run, value: first_trained(run.model).data[0, 0].fill_(value),
    "an activation": lambda run, value: run.model.model.norm.register_forward_hook(lambda m, i, out: out * value),
    "a gradient": lambda run, value: first_trained(run.model).register_hook(lambda gradient: gradient * value),
    "a moment": lambda run, value: [state["exp_avg"].fill_(value) for state in run.optimizer.state.values()],
    "a second moment": lambda run, value: [state["exp_avg_sq"].fill_(value) for state in run.optimizer.state.values()],
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("at", [1, 3])
def test_poisoned_at_any_step_the_run_stops_and_nothing_of_it_is_on_disk(
    at: int, poison: str, value: float, tiny: Tiny, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(run: Any, **options: Any) -> Any:
        if run.step == at:
            POISONS[poison](run, value)
        return take_step(run, **options)

    monkeypatch.setattr("lorafit.training.loop.take_step", poisoned)
    model = adapted(tiny)
    records: list[Any] = []
    config = TrainConfig(lr=1e-3, steps=STEPS, save_every=0, keep_checkpoints=9, max_bad_steps=2)
    with pytest.raises(NumericError):
        train(model, Batches(examples(8), 4), config, checkpoints=tmp_path, on_step=records.append)
    assert len(records) <= at + 2
    files = list(tmp_path.rglob("*.safetensors"))
    assert at <= len(files) <= at + 1  # with max_bad_steps=2 the first step that is not taken does not end the run
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        with pytest.raises(NumericError, match="nothing was written"):
            save_lora(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_one_bad_step_is_left_out_named_and_counted(tiny: Tiny, examples: Any) -> None:
    model, seen = adapted(tiny), [0]

    def once(gradient: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return gradient * math.nan if seen[0] == 3 else gradient

    first_trained(model).register_hook(once)
    notes: list[str] = []
    config = TrainConfig(lr=1e-3, steps=STEPS, max_bad_steps=2)
    batches = Batches(examples(8), 4)
    result = train(model, batches, config, on_note=notes.append)
    assert result.skipped == [2]
    assert result.history[2]["loss"] is None
    assert all(record["loss"] is not None for record in result.history if record["step"] != 2)
    assert len(notes) == 1
    assert all(row.source in notes[0] for row in batches.rows(2))
    assert len(result.epoch_losses) == 3
    assert all(math.isfinite(loss) for loss in result.epoch_losses)


def test_a_bad_step_moves_nothing(tiny: Tiny, examples: Any) -> None:
    run = begin(adapted(tiny), Batches(examples(8), 4), TrainConfig(steps=STEPS))
    run.pending = take_step(run)
    run.complete()
    before = run.state()[0]
    hook = first_trained(run.model).register_hook(lambda gradient: gradient * math.inf)
    run.pending = take_step(run)
    hook.remove()
    after = run.state()[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_bad_steps_stop_the_run_only_in_a_row(tiny: Tiny, examples: Any) -> None:
    model, seen = adapted(tiny), [0]

    def every_other(gradient: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return gradient * math.nan if seen[0] % 2 else gradient

    first_trained(model).register_hook(every_other)
    result = train(model, Batches(examples(8), 4), TrainConfig(lr=1e-3, steps=STEPS, max_bad_steps=2))
    assert result.skipped == [0, 2, 4]


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny)
    silent = [Example([3, 4, 5], [IGNORE, 4, 5], "row")]
    results = iter([2.0, math.nan, 1.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.training.loop.evaluate", lambda *given, **options: next(results))
        config = TrainConfig(steps=3, eval_every=1, lr=1e-3)
        result = train(model, Batches(examples(8), 4), config, evaluation=Batches(silent))
    assert [record["eval_loss"] for record in result.history] == [2.0, None, 1.5]
    assert result.best_step == 2


def test_where_nothing_was_learned_it_is_said(tiny: Tiny, examples: Any) -> None:
    silent = [Example([3, 4, 5], [IGNORE] * 3, f"row {k}") for k in range(4)]
    notes: list[str] = []
    result = train(adapted(tiny), Batches(silent, 2), TrainConfig(epochs=2), on_note=notes.append)
    assert result.empty == [0, 1, 2, 3]
    assert notes == ["nothing was learned: s·B·A is still zero in every layer, so the model answers as before"]
    notes.clear()
    train(adapted(tiny), Batches(examples(8), 4), TrainConfig(steps=2), on_note=notes.append)
    assert notes == []
