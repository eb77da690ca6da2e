"""An init whose B·A does not start at 0: the layer keeps the start and learns the difference to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit import VARIANTS, LoraConfig, LoraLinear, add_lora, load_lora, merge_lora, save_lora
from lorafit.adapter.peft_config import CONFIG
from lorafit.adapter.peft_format import WEIGHTS
from lorafit.errors import AdapterError, UsageError
from lorafit.files import MANIFEST
from lorafit.lora.inits import INITS, init
from lorafit.lora.inject import adapter_state
from lorafit.lora.layers import subtrahend

Tiny = Callable[..., Any]
KINDS = {"Linear": nn.Linear, "Conv1D": lambda in_, out: Conv1D(out, in_)}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"rslora": True},
    "DoRA": {"variant": "dora"},
    "patterns": {"rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp.*": 6}, "alpha_pattern": {"v_proj": 3}},
    "patterns, rsLoRA": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}, "rslora": True},
    "an embedding too": {"targets": ("embed_tokens", "q_proj")},
    "a module in full too": {"train_modules": ("norm",)},
}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "alpha": 8, "init": "pissa"} | changes))


def moved(layer: nn.Module, by: float) -> nn.Module:
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by * torch.randn_like(parameter))
    return layer


def difference(layer: LoraLinear) -> Tensor:
    """s·(B·A − B0·A0), by its definition."""
    A, B = layer.factors
    A0, B0 = layer.get_buffer("lora_A0"), layer.get_buffer("lora_B0")
    return layer.scale * (B @ A - B0 @ A0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_and_its_gradients_are_those_of_the_difference(kind: str) -> None:
    layer = moved(LoraLinear(KINDS[kind](9, 7).double(), r=3, init="pissa"), 0.3)
    assert isinstance(layer, LoraLinear)
    torch.testing.assert_close(layer.delta(), difference(layer))
    x = torch.randn(5, 9, dtype=torch.float64)
    plain = layer.base_layer(x) + x @ difference(layer).T
    torch.testing.assert_close(layer(x), plain)
    got = torch.autograd.grad(layer(x).square().sum(), layer.factors)
    torch.testing.assert_close(got, torch.autograd.grad(plain.square().sum(), layer.factors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_small_update_survives_bf16(kind: str, size: float) -> None:
    """Within 1 % of float64's, where B·A − B0·A0 in bf16 would keep less than half."""
    base = KINDS[kind](256, 256)
    layer = moved(LoraLinear(base, r=16, init="pissa"), size)
    assert isinstance(layer, LoraLinear)
    exact = difference(layer.double())
    nn.init.zeros_(base.weight)  # so that what comes out is the update alone
    nn.init.zeros_(base.bias)
    x = torch.randn(64, 256).bfloat16()
    layer.float()
    base.bfloat16()
    expected = x.double() @ exact.T
    assert (layer(x).double() - expected).norm() < 0.01 * expected.norm()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scales=st.tuples(*[st.integers(-12, 3)] * 2))
def test_a_difference_gives_back_what_was_taken_away(seed: int, scales: tuple[int, int]) -> None:
    """In bf16, too: with few digits the rare case comes up that a − (a − d) is a tie and rounds to another number."""
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = ((torch.randn(100_000) * 2.0**scale).to(dtype) for scale in scales)
        assert torch.equal(a - subtrahend(a, a - b), a - b)


@pytest.mark.parametrize("case", SETTINGS)
def test_the_file_trains_on_with_the_rank_that_was_trained(
    case: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    plan = add_lora(model, config(**SETTINGS[case]))
    trained = logits(shaken(model), token_ids())
    save_lora(model, tmp_path / "first")
    again = tiny("llama")
    loaded = load_lora(again, tmp_path / "first")
    assert [(t.name, t.r) for t in loaded.targets] == [(t.name, t.r) for t in plan.targets]
    assert [t.alpha for t in loaded.targets] == pytest.approx([t.alpha for t in plan.targets], rel=1e-15)
    assert (loaded.trainable, loaded.config.init) == (plan.trainable, "pissa")
    shapes = {name: tensor.shape for name, tensor in adapter_state(again).items()}
    assert shapes == {name: tensor.shape for name, tensor in adapter_state(model).items()}
    assert torch.equal(logits(again, token_ids()), trained)
    save_lora(again, tmp_path / "second")
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()


def test_a_file_without_the_mark_is_the_same_function_at_twice_the_rank(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    add_lora(model, config())
    save_lora(shaken(model), tmp_path)
    file = tmp_path / WEIGHTS
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lorafit"])["init"] == "pissa"
    save_file(load_file(file), file, metadata={"format": "pt"})
    (tmp_path / MANIFEST).unlink()
    again = tiny("gpt2")
    assert {target.r for target in load_lora(again, tmp_path).targets} == {8}
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


def test_a_mark_on_an_odd_rank_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=3))
    save_lora(model, tmp_path)
    file = tmp_path / WEIGHTS
    with safe_open(file, "pt") as opened:
        note = json.loads(opened.metadata()["lorafit"]) | {"init": ["pissa"]}
    save_file(load_file(file), file, metadata={"format": "pt", "lorafit": json.dumps(note)})
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(AdapterError, match=r"an odd rank has none: model\.layers\.0\.self_attn\.q_proj, "):
        load_lora(tiny("llama"), tmp_path)


def test_experts_keep_no_start_whatever_a_file_says(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("mixtral")
    add_lora(model, LoraConfig(r=2))
    save_lora(model, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text()) | {"init_lora_weights": "pissa"}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(AdapterError, match=r"a start that is kept, in what keeps none: model\.layers\.0\.mlp\."):
        load_lora(tiny("mixtral"), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_once_only(variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, config(variant=variant))
    save_lora(shaken(model), tmp_path)
    again = tiny("llama")
    load_lora(again, tmp_path)
    trained = logits(again, token_ids())
    merge_lora(again)
    torch.testing.assert_close(logits(again, token_ids()), trained, rtol=0, atol=1e-5 * trained.abs().max().item())
    with pytest.raises(AdapterError, match="already merged"):
        load_lora(again, tmp_path, force_base=True)


def test_an_init_that_moves_has_to_say_so() -> None:
    @init("moves")
    def moves(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        return torch.ones(r, W.shape[1]), torch.ones(W.shape[0], r)

    try:
        with pytest.raises(UsageError, match=r"B·A ≠ 0: register it as @init\('moves', \"kept\"\)"):
            LoraLinear(nn.Linear(3, 3), init="moves")
        init("moves", "kept")(moves)
        layer, x = LoraLinear(nn.Linear(3, 3), init="moves"), torch.randn(2, 3)
        assert torch.equal(layer(x), layer.base_layer(x))
        assert not layer.moved()
        moved(layer, 0.1)
        assert layer.moved()
    finally:
        del INITS["moves"]
