"""LoRA on experts and routers: what PEFT does with `target_parameters`, exactly, in models of several layouts."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit import (
    LoraConfig,
    add_lora,
    count_parameters,
    find_targets,
    load_lora,
    lora_disabled,
    merge_lora,
    save_lora,
    unload_lora,
)
from lorafit.errors import ModelError, UsageError
from lorafit.lora.experts import LoraParameter, LowRankSum, expert_weights
from lorafit.lora.inject import plain_modules, wrappers
from lorafit.lora.layers import LoraLinear
from lorafit.training.rules import RULES

Tiny = Callable[..., Any]
TWO = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": TWO | {"head_dim": 8, "layer_types": ["full_attention"] * 2},  # (experts, in, out), biases, interleaved
    "granitemoe": TWO,
    "llama4_text": TWO | {"head_dim": 8, "intermediate_size_mlp": 48},  # one product for all; a router that is a Linear
    "jetmoe": TWO | {"kv_channels": 8},  # a module for each stack; experts in the attention, too
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip
EXPERTS = ("gate_up_proj", "experts.down_proj", "gate.weight")


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


def assert_same(ours: Tensor, theirs: Tensor, bound: float = 2e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * theirs.abs().max().item())


def in_peft(model: nn.Module, path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*|.*tied.*")
        # PEFT looks for a pattern's layers among modules and weights, and then warns that it is none of the modules.
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
        return peft.PeftModel.from_pretrained(model, str(path), **options).eval()


def made_by_peft(model: nn.Module, shaken: Tiny, path: Path | None = None, **changes: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = shaken(peft.get_peft_model(model, peft.LoraConfig(**settings))).eval()
        if path is not None:
            made.save_pretrained(str(path))
    return made


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_reaches_everything_and_goes_into_peft(
    family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, **MODELS[family])
    before = {name: (p, p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    raw = logits(model, token_ids())
    plan = add_lora(model, LoraConfig(r=3, alpha=8))
    assert not [name for name in plan.unreachable if not name.endswith("bias")]
    assert (plan.trainable, plan.total) == (count_parameters(model).trainable, count_parameters(model).total)
    assert torch.equal(logits(model, token_ids()), raw)
    trained = logits(shaken(model), token_ids())
    assert (trained - raw).abs().max() > 0.01 * raw.abs().max()
    with lora_disabled(model):
        assert torch.equal(logits(model, token_ids()), raw)
    save_lora(model, tmp_path)
    again = tiny(family, **MODELS[family])
    assert load_lora(again, tmp_path).targets == plan.targets
    assert torch.equal(logits(again, token_ids()), trained)
    assert_same(logits(in_peft(tiny(family, **MODELS[family]), tmp_path), token_ids()), trained)
    assert_same(logits(merge_lora(again), token_ids()), trained)
    unload_lora(model)
    for name, parameter in model.named_parameters():
        same, flag, value = before.pop(name)
        assert (id(parameter), parameter.requires_grad) == (id(same), flag)
        assert torch.equal(parameter, value)
    assert not before
    assert torch.equal(logits(model, token_ids()), raw)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_linear_is_pefts(family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    theirs = made_by_peft(tiny(family, **MODELS[family]), shaken, tmp_path / "theirs")
    ours = tiny(family, **MODELS[family])
    plan = add_lora(ours, LoraConfig(r=3, alpha=8))
    assert (plan.trainable, plan.total) == theirs.get_nb_trainable_parameters()
    save_lora(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    shapes = [{key: tensor.shape for key, tensor in file.items()} for file in files]
    assert shapes[0] == shapes[1]
    said = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for field in ("target_modules", "target_parameters"):
        assert sorted(said[0][field]) == sorted(said[1][field])
    unload_lora(ours)
    assert load_lora(ours, tmp_path / "theirs").targets == plan.targets
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "some stacks, plain ranks": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "a router": ("qwen3_moe", {"target_parameters": ["mlp.gate.weight"]}),
    "patterns": ("mixtral", {
        "target_parameters": ["experts.gate_up_proj", "mlp.gate.weight"], "target_modules": ["q_proj"],
        "rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"layers.1.mlp.gate.weight": 5}}),
    "rsLoRA": ("mixtral", {"target_parameters": ["down_proj"], "use_rslora": True}),
    "turned": ("gpt_oss", {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "a layer by its weight": ("mixtral", {"target_parameters": ["q_proj.weight", "down_proj"],
                                          "rank_pattern": {"q_proj.weight": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pefts_target_parameters_mean_the_same_here(
    case: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    family, changes = CASES[case]
    theirs = made_by_peft(
        tiny(family, **MODELS[family]), shaken, tmp_path / "theirs", **({"target_modules": []} | changes)
    )
    ours = tiny(family, **MODELS[family])
    load_lora(ours, tmp_path / "theirs")
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    save_lora(ours, tmp_path / "ours")
    back = in_peft(tiny(family, **MODELS[family]), tmp_path / "ours")
    assert_same(logits(back, token_ids()), logits(ours, token_ids()))


@pytest.mark.parametrize(("family", "kind"), [
    ("mixtral", "eager"), ("mixtral", "grouped_mm"), ("mixtral", "batched_mm"), ("gpt_oss", "eager"),
    ("gpt_oss", "grouped_mm"), ("gpt_oss", "batched_mm"), ("llama4_text", ""), ("jetmoe", ""),
])  # fmt: skip
def test_gradients_are_pefts(
    family: str, kind: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    """In float64 where there is a product of that type; the tokens of one pass leave some experts out."""
    dtype, bound = (torch.float32, 1e-5) if kind == "grouped_mm" else (torch.float64, 1e-11)
    found: list[dict[str, Tensor | None]] = []
    answers, tokens = [], token_ids(1, 3)
    path = tmp_path / "adapter"
    for who in ("ours", "theirs"):
        model = tiny(family, **MODELS[family]).to(dtype)
        if kind:
            model.set_experts_implementation(kind)
        if who == "ours":
            add_lora(model, LoraConfig(r=3, alpha=8))
            save_lora(shaken(model), path)
        else:
            model = in_peft(model, path, is_trainable=True)
        result = model(tokens, labels=tokens)
        result.loss.backward()
        answers.append(result.logits.detach())
        found.append({
            name.removeprefix("base_model.model.").replace(".default", ""): p.grad
            for name, p in model.named_parameters() if p.requires_grad
        })  # fmt: skip
    assert_same(*answers, 1e-12 if dtype == torch.float64 else 1e-6)
    assert found[0].keys() == found[1].keys()
    assert any("experts" in name or "linear" in name for name in found[0])
    for name, gradient in found[0].items():
        other = found[1][name]
        assert gradient is not None
        assert other is not None
        assert (gradient - other).norm() <= bound * (other.norm() + 1e-3), name


def test_only_what_is_met_is_multiplied(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, token_ids: Tiny) -> None:
    """No family here has the sum made, in any of the ways in which transformers runs experts."""

    def refuse(self: LowRankSum) -> Tensor:
        raise AssertionError("the sum was made")

    monkeypatch.setattr(LowRankSum, "dense", refuse)
    for family, changes in MODELS.items():
        if family == "deepseek_v3":
            continue  # its router asks for fp32
        for kind in ("eager", "grouped_mm", "batched_mm"):
            model = tiny(family, **changes)
            add_lora(model, LoraConfig(r=3, alpha=8))
            if hasattr(model, "set_experts_implementation") and family not in ("llama4_text", "jetmoe"):
                model.set_experts_implementation(kind)
            model(token_ids(), labels=token_ids()).loss.backward()


def sums(*shape: int, r: int = 3) -> tuple[LowRankSum, Tensor]:
    """One in float64 with factors that want gradients, and the same as a plain tensor."""
    *batch, rows, columns = shape
    L, R = (torch.randn(*batch, *s, dtype=torch.float64, requires_grad=True) for s in ((rows, r), (r, columns)))
    W = torch.randn(*shape, dtype=torch.float64)
    return LowRankSum(W, L, R, 0.5), W + 0.5 * L @ R


x, stack = torch.randn(7, 6, dtype=torch.float64), torch.randn(4, 7, 6, dtype=torch.float64)
USES: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "linear": ((5, 6), lambda w: F.linear(x, w)),
    "linear with a bias": ((5, 6), lambda w: F.linear(x, w, torch.ones(5, dtype=torch.float64))),
    "from the left": ((6, 5), lambda w: x @ w),
    "from the right": ((5, 7), lambda w: w @ x),
    "a vector": ((5, 6), lambda w: w @ x[0]),
    "a vector and a stack": ((4, 5, 6), lambda w: w @ x[0]),
    "transposed": ((5, 6), lambda w: x @ w.T),
    "t": ((5, 6), lambda w: torch.mm(x, w.t())),
    "batches": ((4, 6, 5), lambda w: torch.bmm(stack, w)),
    "one expert": ((4, 5, 6), lambda w: F.linear(x, w[2])),
    "one expert by a tensor": ((4, 5, 6), lambda w: F.linear(x, w[torch.tensor(2)])),
    "some experts": ((4, 5, 6), lambda w: torch.bmm(w[torch.tensor([3, 0])], x.T.expand(2, 6, 7))),
    "a mask of experts": ((4, 5, 6), lambda w: w[torch.tensor([True, False, True, False])]),
    "a slice": ((4, 5, 6), lambda w: stack[1:3] @ w[1:3].mT),
    "part of one": ((4, 5, 6), lambda w: F.linear(x, w[1, :2])),
    "other axes": ((4, 5, 6), lambda w: w.transpose(0, 1)),
    "einsum": ((4, 5, 6), lambda w: torch.einsum("eti,eoi->eto", stack, w)),
    "a list": ((4, 5, 6), lambda w: torch.cat([w, w], dim=1)),
    "another type": ((5, 6), lambda w: F.linear(x.float(), w.float())),
    "all of them": ((4, 5, 6), lambda w: torch.stack([e.sum() for e in w])),
}


@pytest.mark.parametrize("use", USES)
def test_a_sum_is_the_sum_whatever_is_done_with_it(use: str) -> None:
    shape, function = USES[use]
    ours, plain = sums(*shape)
    got, expected = function(ours), function(plain)
    torch.testing.assert_close(got, expected)
    assert type(got) in (Tensor, torch.Tensor) or isinstance(got, LowRankSum)
    gradients = [torch.autograd.grad(y.square().sum(), (ours.L, ours.R)) for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert (ours.shape, ours.dtype, ours.dim(), ours.size(0)) == (plain.shape, plain.dtype, plain.dim(), plain.size(0))


def test_what_autograd_would_not_see_is_refused() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x @ w.mT

    with pytest.raises(ModelError, match="autograd does not look"):
        Product.apply(x, sums(5, 6)[0])
    with torch.no_grad():
        torch.testing.assert_close(x @ sums(5, 6)[0].mT, (x @ sums(5, 6)[1].mT), rtol=1e9, atol=1e9)


def test_the_layout_is_pefts(tiny: Tiny) -> None:
    """ΔW of each expert by loops, in both ways of keeping a stack."""
    for family, shape in (("mixtral", (4, 96, 32)), ("gpt_oss", (4, 32, 96))):
        model = tiny(family, **MODELS[family])
        add_lora(model, LoraConfig(r=2, alpha=6, targets=(), parameters=("gate_up_proj",), init="gaussian_both"))
        layer = model.model.layers[0].mlp.experts
        A, B, W = layer.lora_A.weight, layer.lora_B.weight, layer.base_layer.gate_up_proj
        assert (A.shape, B.shape, W.shape) == ((8, 32), (96, 8), shape)
        merged = merge_lora(model).model.layers[0].mlp.experts.gate_up_proj
        for e, o in ((0, 0), (1, 41), (3, 95)):
            update = 3 * sum(B[o, k * 4 + e] * A[e * 2 + k] for k in range(2))
            was, now = (W[e, o], merged[e, o]) if family == "mixtral" else (W[e, :, o], merged[e, :, o])
            torch.testing.assert_close(now - was, update, rtol=1e-3, atol=1e-6)
            assert update.abs().max() > 1e-4


def test_which_weights_are_experts() -> None:
    class Stack(nn.Module):
        def __init__(self, *shapes: tuple[int, ...]) -> None:
            super().__init__()
            for number, shape in enumerate(shapes):
                self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(shape)))

    model = nn.ModuleDict({
        "moe": nn.ModuleDict({"experts": Stack((4, 12, 8), (4, 8, 6), (4, 6)), "router": Stack((4, 8), (8, 4))}),
        "convolved": nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, groups=4), "other": nn.Linear(8, 3)}),
        "heads": nn.ModuleDict({"turn": Stack((2, 5, 5))}),
    })  # fmt: skip
    assert expert_weights(plain_modules(model)) == {"moe.experts.w0": 2, "moe.experts.w1": 1, "moe.router.w0": 1}


def test_selection(tiny: Tiny) -> None:
    def names(**settings: Any) -> set[str]:
        plan = find_targets(tiny("mixtral"), LoraConfig(r=2, **settings))
        return {target.name.removeprefix("model.layers.") for target in plan.targets}

    one = {"1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "1.mlp.gate.weight"}
    assert {name for name in names(layers=(1,)) if "mlp" in name} == one
    assert not [name for name in names(exclude=("experts", "gate")) if "mlp" in name]
    assert not [name for name in names(exclude=("experts.down_proj",)) if "down" in name]
    both = {"0.self_attn.q_proj", "0.mlp.gate.weight"}
    assert names(targets=("q_proj",), parameters=("gate.weight",), layers=(0,)) == both
    assert not [name for name in names(targets=("q_proj",)) if "mlp" in name]
    config = LoraConfig(r=2, alpha=4, targets=("q_proj",), parameters=EXPERTS, rank_pattern={"down_proj": 5})
    ranks = {t.name.split(".")[-1]: (t.r, t.alpha) for t in find_targets(tiny("mixtral"), config).targets}
    assert ranks == {"q_proj": (2, 4), "gate_up_proj": (2, 4), "down_proj": (5, 4), "weight": (2, 4)}
    with pytest.raises(UsageError, match=r"parameter 'down_projj' .did you mean 'down_proj'"):
        names(parameters=("down_projj",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dropout": 0.1}, "dropout 0.1"), ({"variant": "dora"}, "variant 'dora'"), ({"init": "pissa"}, "init 'pissa'")],
)
def test_what_experts_cannot_have_is_refused_in_one_line(settings: dict[str, Any], said: str, tiny: Tiny) -> None:
    model = tiny("mixtral")
    with pytest.raises(UsageError, match=f"^{said} cannot be had .*: leave it out, or exclude experts,gate$"):
        add_lora(model, LoraConfig(r=2, **settings))
    add_lora(model, LoraConfig(r=2, exclude=("experts", "gate"), **settings))


def test_wrappers_in_each_other(tiny: Tiny) -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    add_lora(model, LoraConfig(r=2))
    found = {name: layer.parameter for name, layer in wrappers(model) if isinstance(layer, LoraParameter)}
    at = "model.layers.0.mlp"
    assert found == {f"{at}.gate": "weight", f"{at}.experts": "down_proj", f"{at}.experts.base_layer": "gate_up_proj"}
    outer = model.get_submodule(f"{at}.experts")
    assert outer.num_experts == 4
    assert torch.equal(outer.gate_up_proj, outer.holder.gate_up_proj)
    assert not [name for name in plain_modules(model) if "base_layer" in name or "lora" in name]


def test_a_failure_inside_leaves_the_module_as_it_was(tiny: Tiny) -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    add_lora(model, LoraConfig(r=2))
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(TypeError):
        experts(None, None)
    assert type(experts.holder.gate_up_proj) is type(experts.holder.down_proj) is nn.Parameter


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_about_each_expert(rule: str, tiny: Tiny) -> None:
    """What it makes of a stack's gradients is what it makes of the gradients of its experts as layers of their own."""
    model = tiny("mixtral", num_hidden_layers=1)
    add_lora(model, LoraConfig(r=2, init="gaussian_both"))
    stack = model.model.layers[0].mlp.experts
    for factor in stack.factors:
        factor.grad = torch.randn_like(factor)
    A, B = stack.matrices(*stack.factors)
    gradients = stack.matrices(*(factor.grad.clone() for factor in stack.factors))
    RULES[rule](stack)
    after = stack.matrices(*(factor.grad for factor in stack.factors))
    for e in range(4):
        alone = LoraLinear(nn.Linear(48, 32), r=2, alpha=stack.alpha)
        values, given = (A[e], B[e]), [gradient[e] for gradient in gradients]
        for factor, value, gradient in zip(alone.factors, values, given, strict=True):
            factor.data.copy_(value)
            factor.grad = gradient.clone()
        RULES[rule](alone)
        for factor, found in zip(alone.factors, after, strict=True):
            torch.testing.assert_close(factor.grad, found[e], rtol=1e-4, atol=1e-4)
