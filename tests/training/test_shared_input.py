"""Layers that see one tensor are computed together, and give what they give alone."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import VARIANTS, Batches, LoraConfig, TrainConfig, add_lora, lora_disabled, train
from lorafit.lora.layers import LoraLinear
from lorafit.training import shared_input
from lorafit.training.attention import packs_exactly
from lorafit.training.blocks import checkpointed
from lorafit.training.shared_input import find_groups, inputs_shared

Tiny = Callable[..., nn.Module]
GROUPS = {
    "llama": ["q_proj k_proj v_proj", "gate_proj up_proj"],
    "cohere": ["q_proj k_proj v_proj gate_proj up_proj"],  # attention and feed-forward side by side
    "falcon": ["query_key_value dense_h_to_4h"],
    "gpt2": [],
    "mixtral": ["q_proj k_proj v_proj"],
}


def adapted(tiny: Tiny, family: str = "llama", dtype: torch.dtype = torch.float64, **lora: Any) -> nn.Module:
    model = tiny(family).to(dtype)
    torch.manual_seed(3)
    add_lora(model, LoraConfig(**{"r": 3, "init": "gaussian_both", **lora}))
    return model


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call computes."""
    sizes: list[int] = []

    def counted(x: Any, dropped: Any, layers: Any) -> Any:
        sizes.append(len(layers))
        return compute(x, dropped, layers)

    compute = shared_input.low_rank_linear
    monkeypatch.setattr(shared_input, "low_rank_linear", counted)
    return sizes


@pytest.mark.parametrize("family", GROUPS)
def test_groups_are_what_sees_one_tensor(family: str, tiny: Tiny) -> None:
    model = adapted(tiny, family, torch.float32)
    name = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    groups = [" ".join(name[layer] for layer in group) for group in find_groups(model, packs_exactly(model))]
    assert groups == GROUPS[family] * 2  # two blocks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "variant"),
    [*((family, "lora") for family in ("llama", "cohere", "falcon", "gpt2", "gemma2")), ("llama", "dora")],
)
def test_the_loss_and_every_gradient_are_the_same(
    family: str, variant: str, checkpointing: bool, tiny: Tiny, examples: Any, together: list[int], one_pass: Any
) -> None:
    model, rows = adapted(tiny, family, variant=variant).train(), examples(4)
    loss, gradients = one_pass(model, rows, nullcontext())
    with checkpointed(model) if checkpointing else nullcontext():
        found = one_pass(model, rows, inputs_shared(model, packs_exactly(model)))
    assert all(size > 1 for size in together)
    assert (len(together) > 0) == (family not in ("gpt2", "falcon"))  # Falcon has a linear class of its own
    assert found[0] == pytest.approx(loss, rel=1e-12)
    for ours, alone in zip(found[1], gradients, strict=True):
        assert (ours - alone).norm() <= 1e-11 * alone.norm() + 1e-15


def test_each_computes_for_itself_what_is_not_the_groups(tiny: Tiny, together: list[int]) -> None:
    """Another input; the same one with other numbers in it; without gradients; switched off; trained on."""
    model = adapted(tiny)
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv")
    x, other = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    expected = [(layer(x), layer(other)) for layer in (q, k, v)]
    with inputs_shared(model, packed=True):
        together.clear()
        assert torch.allclose(q(x), expected[0][0])
        assert torch.allclose(k(other), expected[1][1])
        assert torch.allclose(v(x), expected[2][0])
        assert together == [3, 3, 3]
        q(x)
        x.add_(1)
        changed = k(x)
        assert not torch.allclose(changed, expected[1][0])
        with torch.no_grad():
            q(other)
        assert k(other).requires_grad
        with lora_disabled(model):
            assert torch.equal(q(x), q.base_layer(x))
        q(x)
        with torch.no_grad():  # a step of the optimizer
            v.lora_B.weight.zero_()
        assert torch.allclose(v(x), v.base_layer(x))
    assert torch.allclose(changed, k(x))


def test_dropout_keeps_layers_apart(tiny: Tiny, examples: Any, together: list[int], one_pass: Any) -> None:
    """Each draws its own; in evaluation there is nothing to draw."""
    model = adapted(tiny, dropout=0.5).train()
    one_pass(model, examples(2), inputs_shared(model, packed=True))
    assert together == []
    one_pass(model.eval(), examples(2), inputs_shared(model, packed=True))
    assert together


def test_other_formulas_and_bases_are_no_members(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mine", type("Mine", (LoraLinear,), {}))
    assert find_groups(adapted(tiny, variant="mine"), packed=True) == []
    model = adapted(tiny)
    model.model.layers[0].self_attn.k_proj.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    layers = [getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv"]
    expected = [layer(x) for layer in layers]
    with inputs_shared(model, packed=True):
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))


def test_nothing_is_held_between_passes_and_the_model_is_as_before(tiny: Tiny, examples: Any, one_pass: Any) -> None:
    model = adapted(tiny)
    with inputs_shared(model, packed=True):
        one_pass(model, examples(2), nullcontext())
        members = [vars(layer)["forward"] for layer in model.modules() if isinstance(layer, LoraLinear)
                   and "forward" in vars(layer)]  # fmt: skip
        groups = {id(cell.cell_contents): cell.cell_contents for member in members for cell in member.__closure__
                  if isinstance(cell.cell_contents, shared_input._Group)}  # fmt: skip
        assert len(groups) == 4
        assert all(group.x is None and not group.ready for group in groups.values())
    assert not any("forward" in vars(module) for module in model.modules())


def test_training_shares_inputs(tiny: Tiny, examples: Any, together: list[int]) -> None:
    model = adapted(tiny, "llama", torch.float32)
    train(model, Batches(examples(8), 4), TrainConfig(steps=2))
    # A step: query, key, value and gate, up of the first block; in the last the query sees fewer rows than the others.
    assert together == [3, 2, 2, 2] * 2
