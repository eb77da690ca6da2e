"""Training: one sum divided once, the same whatever the passes; PEFT's losses; best, patience, refusals."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, evaluate, train
from lorafit.data.batches import collate
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import NumericError, UsageError
from lorafit.lora.inject import wrappers
from lorafit.training.loop import begin, count_steps, plan_passes, take_step
from lorafit.training.optim import lr_at

Tiny = Callable[..., nn.Module]
LORA = LoraConfig(r=4, alpha=8)
# The same 8 rows a step, cut into passes in every way there is.
CUTS: dict[str, dict[str, Any]] = {
    "one pack": {"batch_size": 8},
    "8 times 1": {"batch_size": 1, "accumulate": 8},
    "2 times 4": {"batch_size": 4, "accumulate": 2},
    "padded": {"batch_size": 8, "packing": False},
    "padded, 1 row each": {"batch_size": 1, "accumulate": 8, "packing": False},
    "small packs": {"batch_size": 8, "max_tokens_per_pack": 50},
    "small padded": {"batch_size": 8, "max_tokens_per_pack": 90, "packing": False},
}


def adapted(tiny: Tiny, family: str, dtype: torch.dtype, config: LoraConfig = LORA) -> nn.Module:
    model = tiny(family).to(dtype)
    torch.manual_seed(3)
    add_lora(model, config)
    return model


def run(model: nn.Module, rows: list[Example], steps: int, **cut: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = TrainConfig(lr=1e-3, steps=steps, warmup=0.1, max_grad_norm=0.5)
    result = train(model, Batches(rows, seed=5, **cut), config)
    return [r["loss"] for r in result.history], {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def reference(tiny: Tiny, examples: Any) -> Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]:
    """The run of 30 steps with all 8 rows in one pack, made once per family."""
    return cache(lambda family: run(adapted(tiny, family, torch.float64), examples(20), 30, batch_size=8))


@pytest.mark.parametrize("cut", list(CUTS)[1:])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_however_the_rows_are_cut_the_run_is_the_same(
    family: str, cut: str, reference: Any, tiny: Tiny, examples: Any
) -> None:
    losses, weights = reference(family)
    again, others = run(adapted(tiny, family, torch.float64, LORA), examples(20), 30, **CUTS[cut])
    assert again == pytest.approx(losses, rel=1e-12)
    for name, weight in weights.items():
        assert (weight - others[name]).norm() <= 1e-9 * weight.norm()


@pytest.mark.parametrize("cut", CUTS)
def test_one_steps_gradient_in_float64_is_the_same(cut: str, tiny: Tiny, examples: Any) -> None:
    reference = gradients(adapted(tiny, "llama", torch.float64, LORA), examples(8), batch_size=8)
    ours = gradients(adapted(tiny, "llama", torch.float64, LORA), examples(8), **CUTS[cut])
    for name, gradient in reference.items():
        assert (gradient - ours[name]).norm() <= 1e-12 * gradient.norm()


def gradients(model: nn.Module, rows: list[Example], clip: float | None = None, **cut: Any) -> dict[str, torch.Tensor]:
    """The gradient of a window: what one step of gradient descent moves by."""
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = TrainConfig(lr=1.0, warmup=0, schedule="constant", max_grad_norm=clip)
    once = begin(model, Batches(rows, **cut), config)
    once.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    take_step(once)
    return {n: before[n] - p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cut", CUTS)
def test_fp32_losses_agree_to_a_millionth(cut: str, tiny: Tiny, examples: Any) -> None:
    losses, _ = run(adapted(tiny, "qwen2", torch.float32, LORA), examples(20), 5, batch_size=8)
    again, _ = run(adapted(tiny, "qwen2", torch.float32, LORA), examples(20), 5, **CUTS[cut])
    assert again == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_twenty_steps_equal_peft_in_a_plain_loop(family: str, tiny: Tiny, examples: Any) -> None:
    """The same batches, the same initial A: a PEFT model with padded rows, full logits and its own autograd."""
    rows, steps = examples(24), 20
    ours = adapted(tiny, family, torch.float32, LORA)
    theirs = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    reference = peft.get_peft_model(tiny(family), theirs)
    for name, layer in wrappers(ours):
        twin = reference.base_model.model.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(layer.lora_A.weight.data)
    config = TrainConfig(lr=2e-3, steps=steps, schedule="linear", warmup=0.2)
    batches = Batches(rows, 8, seed=2)
    losses = [r["loss"] for r in train(ours, batches, config).history]
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(steps):
        padded = collate(batches.rows(step), packed=False)
        logits = reference(input_ids=padded.input_ids).logits.flatten(0, 1)[padded.predict]
        loss = F.cross_entropy(logits, padded.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, config)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)


def test_the_loss_falls_and_the_base_keeps_its_bytes(tiny: Tiny) -> None:
    model = tiny("llama", initializer_range=0.3)  # large enough a head to tell tokens apart
    before = copy.deepcopy(model.state_dict())
    add_lora(model, LoraConfig(r=8))
    counting = [Example(ids=list(range(i, i + 9)), labels=list(range(i, i + 9)), source="") for i in range(3, 11)]
    result = train(model, Batches(counting, 8), TrainConfig(lr=1e-2, epochs=60))
    assert result.epoch_losses[-1] < 0.5 * result.epoch_losses[0]
    held = {n.replace(".base_layer", ""): p for n, p in model.state_dict().items() if "lora_" not in n}
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())


def test_a_bf16_base_is_trained_with_fp32_adapters_and_optimizer(tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny, "llama", torch.bfloat16, LORA)
    once = begin(model, Batches(examples(8), 8), TrainConfig())
    take_step(once)
    state = [t for s in once.optimizer.state.values() for t in s.values() if t.ndim]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {t.dtype for t in state} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_dropout_is_a_function_of_seed_and_step(tiny: Tiny, examples: Any) -> None:
    config = LoraConfig(r=4, dropout=0.3)
    runs = []
    for disturbance in (1, 2):
        model = adapted(tiny, "llama", torch.float32, config)
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        runs.append(run(model, examples(16), 6, batch_size=8)[1])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    still = run(adapted(tiny, "llama", torch.float32, LORA), examples(16), 6, batch_size=8)[1]
    assert any(not torch.equal(runs[0][name], still[name]) for name in still)


def test_keeps_the_best_and_stops_when_patience_runs_out(tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny, "llama", torch.float32, LORA)
    train_rows, held_out = examples(8), examples(8, seed=9)
    config = TrainConfig(lr=5e-2, epochs=40, eval_every=1, patience=3, schedule="constant")
    evaluation = Batches(held_out, 8, shuffle=False)
    result = train(model, Batches(train_rows, 8), config, evaluation=evaluation)
    assert result.stopped_early
    assert result.best_step == min(result.evaluations, key=lambda step: result.evaluations[step])
    assert len(result.history) == result.best_step + 1 + 3
    assert evaluate(model, evaluation) == pytest.approx(result.evaluations[result.best_step], rel=1e-6)


def test_epoch_losses_are_per_epoch_and_per_token(tiny: Tiny, examples: Any) -> None:
    result = train(adapted(tiny, "llama", torch.float32), Batches(examples(20), 8), TrainConfig(epochs=2, lr=1e-3))
    for epoch, loss in enumerate(result.epoch_losses):
        records = [r for r in result.history if r["epoch"] == epoch]
        assert len(records) == 3
        total = sum(r["loss"] * r["tokens"] for r in records)
        assert loss == pytest.approx(total / sum(r["tokens"] for r in records))


def test_a_step_without_supervised_tokens_changes_nothing(tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny, "llama", torch.float32, LORA)
    silent = [Example(ids=[3, 4, 5], labels=[IGNORE] * 3, source="silent")]
    once = begin(model, Batches(examples(4), 4), TrainConfig())
    take_step(once)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    once.batches = Batches(silent)
    once.pending = take_step(once)
    once.complete()
    assert once.result.empty == [0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_step_and_names_the_rows(poison: float, tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny, "llama", torch.float32, LORA)
    model.model.norm.weight.data[0] = poison
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(NumericError, match="row 0"):
        train(model, Batches(examples(2), 2, shuffle=False), TrainConfig())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(tiny: Tiny, examples: Any) -> None:
    notes: list[str] = []
    train(
        adapted(tiny, "bloom", torch.float32),
        Batches(examples(4), 4),
        TrainConfig(steps=1),
        on_note=notes.append,
    )
    assert len(notes) == 1
    assert "padded" in notes[0]


def test_a_model_without_anything_to_train_is_refused(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    with pytest.raises(UsageError, match="add_lora"):
        train(model, Batches(examples(4), 4), TrainConfig())


def test_steps_follow_from_epochs_unless_given(examples: Any) -> None:
    batches = Batches(examples(20), 4, 2)
    for epochs, expected in ((1, 3), (2.5, 8), (0.1, 1)):
        assert count_steps(TrainConfig(epochs=epochs), batches) == expected
    assert count_steps(TrainConfig(steps=7), batches) == 7


def test_gradient_checkpointing_gives_the_same_run(tiny: Tiny, examples: Any) -> None:
    plain, weights = run(adapted(tiny, "llama", torch.float64), examples(16), 4, batch_size=8)
    model = adapted(tiny, "llama", torch.float64)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again, others = run(model, examples(16), 4, batch_size=8)
    assert again == pytest.approx(plain, rel=1e-12)
    assert all((weights[n] - others[n]).norm() <= 1e-9 * weights[n].norm() for n in weights)


def test_every_cut_is_tried() -> None:
    """A guard for this file: the cuts differ from each other on uneven rows."""
    assert all(a != b for a, b in itertools.combinations(CUTS.values(), 2))


def test_looking_at_a_model_in_training_is_without_dropout_and_leaves_every_mode(tiny: Tiny, examples: Any) -> None:
    """Evaluation, and the two trials before training: in training mode with dropout as in evaluation mode."""
    model = adapted(tiny, "llama", torch.float32, LoraConfig(r=4, alpha=64, dropout=0.9, init="gaussian_both"))
    batches = Batches(examples(8), 8)
    passes, loss = plan_passes(model, batches), evaluate(model, batches)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert plan_passes(model, batches) == passes
    assert passes.packed
    assert passes.head is not None
    assert evaluate(model, batches) == loss
    assert [module.training for module in model.modules()] == modes


def test_dropout_differs_from_seed_to_seed_from_step_to_step_and_from_pass_to_pass(tiny: Tiny, examples: Any) -> None:
    """The same row in every pass: what differs is which of its numbers are dropped."""
    masks = []
    for seed in (1, 2):
        model = adapted(tiny, "llama", torch.float32, LoraConfig(r=4, dropout=0.5, targets=("q_proj",), layers=(0,)))
        layer = model.model.layers[0].self_attn.q_proj
        layer.dropout.register_forward_hook(lambda module, args, dropped: masks.append(dropped == 0))
        train(model, Batches(examples(1) * 2, 1, 2), TrainConfig(steps=3, seed=seed))
    assert len(masks) == 2 * 3 * 2
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_clipped_is_the_gradient_of_the_whole_step(cut: str, tiny: Tiny, examples: Any) -> None:
    free = gradients(adapted(tiny, "llama", torch.float64), examples(8), **CUTS[cut])
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in free.values()))
    clipped = gradients(adapted(tiny, "llama", torch.float64), examples(8), norm / 3, **CUTS[cut])
    for name, gradient in free.items():
        assert (gradient / 3 - clipped[name]).norm() <= 1e-5 * gradient.norm()


def test_after_training_the_model_is_in_evaluation_mode(tiny: Tiny, examples: Any) -> None:
    model = adapted(tiny, "llama", torch.float32, LoraConfig(r=4, dropout=0.5))
    train(model, Batches(examples(4), 4), TrainConfig(steps=1))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("every", "looked_at"), [(2, [1, 3, 4]), (None, [2, 4]), (5, [4])])
def test_the_held_out_rows_are_looked_at_every_so_many_steps_and_at_the_end(
    every: int | None, looked_at: list[int], tiny: Tiny, examples: Any
) -> None:
    batches = Batches(examples(12), 4)  # three steps an epoch
    config = TrainConfig(steps=5, eval_every=every)
    result = train(adapted(tiny, "llama", torch.float32), batches, config, evaluation=Batches(examples(2), 2))
    assert list(result.evaluations) == looked_at


def test_nothing_is_kept_below_the_first_adapted_layer(tiny: Tiny, examples: Any) -> None:
    """No gradient is wanted there, so autograd has nothing to go back through."""
    model = tiny("llama", num_hidden_layers=3)
    add_lora(model, LoraConfig(r=4, layers=(2,)))
    wants: list[bool] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: wants.append(output.requires_grad))
    train(model, Batches(examples(4), 4), TrainConfig(steps=1))
    assert wants[-3:] == [False, False, True]
