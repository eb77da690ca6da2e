"""Checkpointing: the same run in less memory, and a model that is as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.training.blocks import checkpointed, find_blocks

Tiny = Callable[..., nn.Module]
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral", "bloom", "mamba", "opt"]


def made(tiny: Tiny, family: str, dtype: torch.dtype = torch.float64, **lora: Any) -> nn.Module:
    model = tiny(family, attention_dropout=0.2).to(dtype) if lora.get("dropout") else tiny(family).to(dtype)
    torch.manual_seed(3)
    add_lora(model, LoraConfig(**{"r": 4, "init": "gaussian_both", **lora}))
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_is_the_same_with_checkpointing(
    family: str, dropout: float, tiny: Tiny, examples: Any, without_experts: Any
) -> None:
    # torch has no grouped product in float64, which Mixtral's experts ask for.
    dtype, tolerance = (torch.float32, 1e-6) if family == "mixtral" else (torch.float64, 1e-12)
    results = []
    for checkpointing in (False, True):
        model = made(tiny, family, dtype, dropout=dropout, **(without_experts(family) if dropout else {}))
        config = TrainConfig(lr=1e-3, steps=3, checkpointing=checkpointing)
        history = train(model, Batches(examples(12), 4), config).history
        results.append(([r["loss"] for r in history], {n: p for n, p in model.named_parameters() if p.requires_grad}))
    assert results[1][0] == pytest.approx(results[0][0], rel=tolerance)
    for name, weight in results[0][1].items():
        assert (weight - results[1][1][name]).norm() <= tolerance * weight.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_those_of_the_configuration(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    assert len(find_blocks(model)) == model.config.num_hidden_layers
    assert len({type(block) for block in find_blocks(model)}) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tenth_of_the_memory_is_kept(family: str, tiny: Tiny, examples: Any, kept_bytes: Any) -> None:
    sizes = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    model = tiny(family, **sizes)
    add_lora(model, LoraConfig(r=4))
    rows = examples(8)
    plain = kept_bytes(model.train(), rows)
    with checkpointed(model):
        assert kept_bytes(model, rows) < 0.15 * plain


def test_the_model_is_as_before(tiny: Tiny) -> None:
    model = tiny("llama")
    own = nn.Identity().forward
    model.model.layers[1].forward = own
    before = [dict(vars(module)) for module in model.modules()]
    with checkpointed(model):
        assert all(vars(block)["forward"] not in (None, own) for block in model.model.layers)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_what_the_user_checkpoints_is_not_checkpointed_twice(tiny: Tiny) -> None:
    model = tiny("llama")
    model.activation_checkpointing_enable({"use_reentrant": False})
    with checkpointed(model):
        assert not any("forward" in vars(block) for block in find_blocks(model))


def test_a_model_without_blocks_is_told(tiny: Tiny) -> None:
    notes: list[str] = []
    with checkpointed(nn.Linear(2, 2), notes.append):
        pass
    assert notes == ["Linear has no list of blocks: it is trained without checkpointing"]
