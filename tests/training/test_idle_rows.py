"""Rows without loss are left out of the last block, and nothing else changes."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import LoraConfig, add_lora
from lorafit.data.chat import IGNORE, Example
from lorafit.training.attention import packs_exactly
from lorafit.training.blocks import checkpointed, find_blocks, replaced
from lorafit.training.idle_rows import WORTH, find_parts, idle_rows_skipped

Tiny = Callable[..., nn.Module]
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "cohere", "bloom", "falcon", "mamba", "rwkv"]
ENDINGS = ["mlp", "self_attn.q_proj", "self_attn.o_proj"]


def adapted(tiny: Tiny, family: str = "llama") -> nn.Module:
    model = tiny(family).double()
    torch.manual_seed(3)
    add_lora(model, LoraConfig(r=3, init="gaussian_both"))
    return model


def rows(share: float) -> list[Example]:
    """Three rows whose last `share` carries loss."""
    made = []
    for number, length in enumerate((12, 20, 7)):
        ids = [(7 * k + number) % 90 + 3 for k in range(length)]
        idle = length - max(1, round(share * length))
        made.append(Example(ids=ids, labels=[IGNORE] * idle + ids[idle:], source=f"row {number}"))
    return made


def names(model: nn.Module, parts: list[nn.Module]) -> list[str]:
    prefix = next(name for name, module in model.named_modules() if module is find_blocks(model)[-1])
    return [name.removeprefix(f"{prefix}.") for name, module in model.named_modules() if module in parts]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_every_gradient_are_the_same(
    family: str, share: float, checkpointing: bool, tiny: Tiny, one_pass: Any
) -> None:
    model = adapted(tiny, family)
    loss, gradients = one_pass(model, rows(share), nullcontext())
    with checkpointed(model) if checkpointing else nullcontext():
        found = one_pass(model, rows(share), idle_rows_skipped(model, packs_exactly(model)))
    assert found[0] == pytest.approx(loss, rel=1e-12)
    for ours, whole in zip(found[1], gradients, strict=True):
        assert (ours - whole).norm() <= 1e-11 * whole.norm() + 1e-15


@pytest.mark.parametrize(("share", "left_out"), [(0.3, True), (1.0, False)])
def test_the_last_block_sees_the_rows_that_carry_loss(share: float, left_out: bool, tiny: Tiny, one_pass: Any) -> None:
    model = adapted(tiny)
    seen: list[int] = []
    block = find_blocks(model)[-1]
    watched = [block.mlp.down_proj, block.self_attn.q_proj.base_layer, block.self_attn.k_proj]
    handles = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
               for m in watched]  # fmt: skip
    one_pass(model, rows(share), idle_rows_skipped(model, packed=True))
    for handle in handles:
        handle.remove()
    needed = sum(max(1, round(share * n)) - (share == 1) for n in (12, 20, 7))
    assert (needed <= WORTH * 39) == left_out
    assert sorted(seen[-3:]) == sorted([39, needed, needed] if left_out else [39, 39, 39])


def test_what_may_be_left_out_is_found_in_the_structure(tiny: Tiny) -> None:
    model = adapted(tiny)
    assert names(model, find_parts(model, packed=True)) == sorted(ENDINGS, reverse=True)


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_a_feed_forward_layer_that_looks_at_its_neighbours_is_left_alone(weight: float, tiny: Tiny) -> None:
    """However little it takes from them."""
    model = adapted(tiny)
    mlp = find_blocks(model)[-1].mlp

    def mixing(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: forward(x + weight * x.roll(1, dims=1))

    with replaced([mlp], mixing):
        assert mlp not in find_parts(model, packed=True)


def test_what_the_rows_feed_into_later_on_is_seen(tiny: Tiny) -> None:
    """Something behind the blocks that looks at all rows: then none may be left out."""
    model = adapted(tiny)

    def averaging(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: forward(x + x.mean(dim=1, keepdim=True))

    with replaced([model.model.norm], averaging):
        assert find_parts(model, packed=True) == []


def test_the_model_is_as_before(tiny: Tiny) -> None:
    model = adapted(tiny)
    with pytest.raises(ZeroDivisionError), idle_rows_skipped(model, packed=True):
        assert 1 / ("forward" not in vars(find_blocks(model)[-1].mlp))
    assert not any("forward" in vars(module) for module in model.modules())
