"""What is gathered for an init that looks at data is what autograd and a plain sum say, and nothing else happens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit import Batches, LoraConfig, add_lora, calibrate
from lorafit.errors import UsageError
from lorafit.lora.inits import INITS, Init
from lorafit.lora.inject import find_targets, wrappers
from lorafit.lora.weights import read_weight
from lorafit.training import calibrate as module
from lorafit.training.calibrate import share_out

Tiny = Callable[..., Any]
Seen = dict[int, Any]
LAYERS = {"llama": ("k_proj", "down_proj", "lm_head"), "gpt2": ("c_attn",), "bloom": ("dense",), "mixtral": ("o_proj",)}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What two inits, 'sees inputs' and 'sees gradient', were given: by the address of the layer's weight."""
    found: Seen = {}

    def look(W: Tensor, r: int, s: float, statistic: Any) -> tuple[Tensor, Tensor]:
        found[W.data_ptr()] = statistic
        return torch.zeros(r, W.shape[1]), torch.zeros(W.shape[0], r)

    for kind in ("inputs", "gradient"):
        monkeypatch.setitem(INITS, f"sees {kind}", Init(f"sees {kind}", look, "zero", kind))  # type: ignore[arg-type]
    return found


def by_hand(model: Any, rows: list[Any], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """All inputs of `layer` (n, in), and the gradient of its weight (out, in), each row alone, by autograd."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, -2)))
    tokens = sum(label >= 0 for row in rows for label in row.labels[1:])
    model.zero_grad()
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        (F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum") / tokens).backward()
    handle.remove()
    gradient = layer.weight.grad
    return torch.cat(inputs), gradient if isinstance(layer, nn.Linear) else gradient.T


@pytest.mark.parametrize("kind", ["inputs", "gradient"])
@pytest.mark.parametrize("family", LAYERS)
def test_the_statistics_are_those_of_each_row_alone(
    family: str, kind: str, seen: Seen, tiny: Tiny, examples: Any
) -> None:
    model, rows = tiny(family).double(), examples(6)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    config = LoraConfig(init=f"sees {kind}", targets=LAYERS[family], r=2, init_rows=6)
    calibrate(model, config, Batches(rows, 4))
    for target in find_targets(model, config).targets:
        layer = model.get_submodule(target.name)
        statistic = seen[read_weight(layer).data_ptr()]
        x, gradient = by_hand(model, rows, layer)
        if kind == "gradient":
            torch.testing.assert_close(statistic, gradient)
        elif target.name == "lm_head":  # which meets supervised positions only
            assert statistic.count == sum(label >= 0 for row in rows for label in row.labels[1:])
        else:
            assert statistic.count == sum(len(row.ids) for row in rows)
            torch.testing.assert_close(statistic.mean, x.mean(dim=0))
            torch.testing.assert_close(statistic.second, x.T @ x / len(x))


@pytest.mark.parametrize("init", ["eva", "lora_ga", "lora_one", "corda"])
def test_the_model_is_left_as_it_was_and_starts_as_it_was(
    init: str, tiny: Tiny, examples: Any, token_ids: Tiny
) -> None:
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p, p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    raw = model(token_ids()).logits
    config = LoraConfig(init=init, r=4, init_rho=1)
    assert calibrate(model, LoraConfig(), Batches(examples(4))) == (LoraConfig(), {})
    found = calibrate(model, config, Batches(examples(9), 4))
    for name, parameter in model.named_parameters():
        same, flag, values = before[name]
        assert parameter is same
        assert (parameter.requires_grad, parameter.grad) == (flag, None)
        assert torch.equal(parameter, values)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found.config == config
    add_lora(model, *found)
    assert torch.equal(model(token_ids()).logits, raw)
    for name, layer in wrappers(model):
        for factor, made in zip(layer.factors, found.starts[name], strict=True):
            assert torch.equal(factor, made)
    with pytest.raises(UsageError, match="already carries an adapter"):
        calibrate(model, config, Batches(examples(4)))


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_in_groups_it_is_the_same(
    init: str, tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    told: list[tuple[int, int]] = []
    config, batches = LoraConfig(init=init, r=2, init_rows=5, init_rho=1), Batches(examples(9), 2)
    whole = calibrate(tiny("llama"), config, batches, on_note=notes.append)
    assert not notes
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * 10_000)  # two of the wider layers
    torch.manual_seed(0)
    parts = calibrate(
        tiny("llama"), config, batches, on_note=notes.append, on_progress=lambda *done: told.append(done)
    )
    assert notes[0].startswith(f"init '{init}': the sums of all layers do not fit into memory: the rows run ")
    times = int(notes[0].split()[-2])
    assert times > 3
    assert told[0] == (2, 5 * times)
    assert told[-1] == (5 * times, 5 * times)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for name, (A, B) in whole.starts.items():
        again = parts.starts[name]
        torch.testing.assert_close(B @ A if B.any() else A, again[1] @ again[0] if B.any() else again[0])


def test_ranks_are_shared_out_and_scales_stay(tiny: Tiny, examples: Any) -> None:
    for rslora in (False, True):
        model = tiny("llama")
        config = LoraConfig(init="eva", r=4, alpha=6, alpha_pattern={"q_proj": 3.0}, init_rho=3, rslora=rslora)
        plan = find_targets(model, config)
        found = calibrate(model, config, Batches(examples(9)))
        shared = add_lora(model, *found)
        assert sum(target.r for target in shared.targets) == sum(target.r for target in plan.targets)
        assert len({target.r for target in shared.targets}) > 2
        assert all(1 <= target.r <= 12 for target in shared.targets)
        root = 0.5 if rslora else 1
        for old, new in zip(plan.targets, shared.targets, strict=True):
            assert math.isclose(new.alpha / new.r**root, old.alpha / old.r**root)
    again = LoraConfig(init="eva", r=4, rank_pattern={"q_proj": 2})
    assert calibrate(tiny("llama"), again, Batches(examples(9))).config == again


def test_share_out_takes_what_counts_most() -> None:
    shares = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.2, 0.15, 0.1]), "c": torch.tensor([0.01, 0.0])}
    assert share_out(shares, 3) == {"a": 1, "b": 1, "c": 1}
    assert share_out(shares, 5) == {"a": 2, "b": 2, "c": 1}
    assert share_out(shares, 6) == {"a": 3, "b": 2, "c": 1}
    assert share_out(shares, 99) == {"a": 3, "b": 3, "c": 2}


def test_what_cannot_be_is_said_of_the_layer(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match=r"^model\.layers\.0\.self_attn\.k_proj: init 'lora_ga' needs 18 directions"):
        calibrate(model, LoraConfig(init="lora_ga", r=9, targets=("k_proj",)), Batches(examples(4)))
    model.extra = nn.Linear(4, 4)
    for init, sentence in (("eva", "no row reaches this layer"), ("lora_one", "no row's loss depends on this layer")):
        with pytest.raises(UsageError, match=rf"^extra: {sentence}"):
            calibrate(model, LoraConfig(init=init, r=2, targets=("extra",)), Batches(examples(4)))
