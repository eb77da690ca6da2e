"""Planning, adding, switching off, removing, counting; on transformers models and on plain modules."""

import copy
import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lorafit
from lorafit import LoraConfig, LoraLinear, add_lora, find_targets, load_lora, merge_lora, unload_lora
from lorafit.errors import LorafitError, NumericError, UsageError
from lorafit.lora import inject
from lorafit.lora.counts import Counts
from lorafit.lora.inits import INITS, init

Tiny = Callable[..., Any]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


# --- the tutorial's own figures -------------------------------------------------------------------


def tutorial_llama() -> Any:
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=24,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return transformers.AutoModel.from_config(config).eval()


def qwen_half_billion() -> Any:
    config = transformers.AutoConfig.for_model(
        "qwen2",
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=24,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_the_tutorial_model_and_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = tutorial_llama()
    assert lorafit.count_parameters(model).total == 37_848
    add_lora(model, LoraConfig(r=8, alpha=16))
    lorafit.print_trainable_parameters(model)
    line = "trainable params: 16,896 || all params: 54,744 || trainable%: 30.8637\n"
    assert capsys.readouterr().out == line
    peft.get_peft_model(
        tutorial_llama(), peft.LoraConfig(r=8, target_modules="all-linear")
    ).print_trainable_parameters()
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(("r", "trainable", "total"), [(8, 3_784_704, 467_772_416), (16, 7_569_408, 471_557_120)])
def test_the_tutorials_qwen(r: int, trainable: int, total: int) -> None:
    model = qwen_half_billion()
    plan = add_lora(model, LoraConfig(r=r))
    assert lorafit.count_parameters(model) == Counts(trainable, total)
    assert (plan.trainable, plan.total) == (trainable, total)
    assert "model.layers.{0..23}.self_attn.q_proj" in str(plan)
    theirs = peft.get_peft_model(qwen_half_billion(), peft.LoraConfig(r=r, target_modules="all-linear"))
    assert theirs.get_nb_trainable_parameters() == (trainable, total)
    if r == 8:
        assert f"{100 * trainable / total:.4f}" == "0.8091"


def test_four_forward_passes(tiny: Tiny, token_ids: Tiny, family: str, tmp_path: Path) -> None:
    """Raw, adapted, unloaded, reloaded: the first is the third and the second the fourth, bit for bit."""
    model = tiny(family)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    raw = logits(model, token_ids())
    add_lora(model, LoraConfig(r=8, init="gaussian_both"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    adapted = logits(model, token_ids())
    unload_lora(model, tmp_path / "adapter")
    unloaded = logits(model, token_ids())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    load_lora(model, tmp_path / "adapter")
    reloaded = logits(model, token_ids())
    assert torch.equal(raw, unloaded)
    assert torch.equal(adapted, reloaded)
    assert not torch.equal(raw, adapted)
    unload_lora(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_print_model_parameters_names_each(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    add_lora(model)
    lorafit.print_model_parameters(model)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(model.parameters()))
    assert sum(line.endswith("requires_grad=True") for line in lines) == 2 * 14


# --- targets --------------------------------------------------------------------------------------


def names(model: nn.Module, **settings: Any) -> list[str]:
    return [target.name for target in find_targets(model, LoraConfig(**settings)).targets]


def test_target_forms(tiny: Tiny) -> None:
    model = tiny("llama")
    every = names(model)
    assert len(every) == 14
    assert "lm_head" not in every
    q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for form in ("q_proj", ("q_proj",), ["q_proj"], {"q_proj"}, "self_attn.q_proj", r".*\.q_proj", tuple(q)):
        assert names(model, targets=form) == q
    assert names(model, targets="q_proj,up_proj") == names(model, targets=("q_proj", "up_proj"))
    assert names(model, targets="ALL-LINEAR") == every
    assert names(model, targets=("lm_head",)) == ["lm_head"]
    assert names(model, exclude="q_proj") == [name for name in every if "q_proj" not in name]
    assert names(model, exclude=r".*\.layers\.1\..*") == names(model, layers=(0,))
    assert names(model, layers=(0, 1)) == every
    assert names(model, train_modules=("layers.0.mlp",)) == [n for n in every if "layers.0.mlp" not in n]


def test_planning_changes_nothing(tiny: Tiny) -> None:
    model = tiny("llama")
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    find_targets(model, LoraConfig(train_modules=("norm",)))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert inject.attached(model) is None


def test_a_plan_of_an_adapted_model_is_that_of_the_plain_one(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    for config in (LoraConfig(r=4), LoraConfig(r=4, targets=r".*")):
        plain = find_targets(model, config)
        add_lora(model, config)
        assert find_targets(model, config) == plain
        assert find_targets(model, LoraConfig(r=4)).targets == find_targets(tiny(family), LoraConfig(r=4)).targets
        unload_lora(model)


def test_patterns_the_most_specific_key_wins_in_any_order(tiny: Tiny) -> None:
    keys = {"q_proj": 2, "self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 5, r"layers\.\d+\.mlp\..*": 7}
    for pattern in (keys, dict(reversed(keys.items()))):
        plan = find_targets(tiny("llama"), LoraConfig(r=4, alpha=1, rank_pattern=pattern, alpha_pattern=pattern))
        found = {target.name: (target.r, target.alpha) for target in plan.targets}
        assert found["model.layers.0.self_attn.q_proj"] == (3, 3)
        assert found["model.layers.1.self_attn.q_proj"] == (5, 5)
        assert found["model.layers.1.mlp.up_proj"] == (7, 7)
        assert found["model.layers.1.self_attn.v_proj"] == (4, 1)


def test_patterns_reach_the_layers(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, alpha=8, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 18, "v_proj": 1}))
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.r, attention.q_proj.scale) == (9, 2)
    assert (attention.v_proj.r, attention.v_proj.scale) == (4, 0.25)
    assert (attention.k_proj.r, attention.k_proj.scale) == (4, 2)


def test_the_plan_reads_well(tiny: Tiny) -> None:
    config = LoraConfig(r=4, alpha=8, layers=(1,), exclude=("gate", "down_proj"), train_modules=("norm",))
    plan = find_targets(tiny("mixtral"), config)
    assert str(plan).splitlines() == [
        "lora, init kaiming",
        "  model.layers.1.self_attn.q_proj  ×1   32 × 32   r=4, alpha=8",
        "  model.layers.1.self_attn.o_proj  ×1   32 × 32   r=4, alpha=8",
        "  model.layers.1.self_attn.k_proj  ×1   16 × 32   r=4, alpha=8",
        "  model.layers.1.self_attn.v_proj  ×1   16 × 32   r=4, alpha=8",
        "  model.layers.1.mlp.experts.gate_up_proj  ×1   4 × 96 × 32   r=8, alpha=16",
        "  model.norm  ×1   trained in full",
        f"trained: 5,024 of {plan.total:,} parameters ({100 * 5024 / plan.total:.4f} %)",
        f"not reachable by LoRA, stays frozen: 24,832 parameters ({100 * 24832 / plan.total:.1f} %)",
        "  model.layers.{0..1}.mlp.gate.weight  ×2",
        "  model.layers.0.mlp.experts.gate_up_proj  ×1",
        "  model.layers.{0..1}.mlp.experts.down_proj  ×2",
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_that_are_left_out_are_named(family: str, tiny: Tiny) -> None:
    changes = {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8}
    model = tiny(family, **(changes if family != "mixtral" else {}))
    assert not find_targets(model, LoraConfig()).unreachable
    left_out: dict[str, Any] = {"exclude": ("experts", "gate")}
    plan = find_targets(model, LoraConfig(**left_out))
    reached = {f"{target.name}.weight" for target in plan.targets}
    matrices = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name
    }
    assert any("experts" in name for name in plan.unreachable)
    assert dict(plan.unreachable) == {n: size for n, size in matrices.items() if n not in reached}
    trained = find_targets(model, LoraConfig(train_modules=("mlp.gate",), exclude=("experts",)))
    assert plan.unreachable.keys() - trained.unreachable.keys() == {
        name for name in matrices if name.endswith("mlp.gate.weight")
    }


def test_collapse() -> None:
    assert inject.collapse(["h.0.a", "h.1.a", "h.3.a", "h.0.b", "c"]) == [("h.{0,1,3}.a", 3), ("h.0.b", 1), ("c", 1)]
    assert inject.collapse(f"l.{i}.e.{j}.w" for i in range(3) for j in range(2)) == [("l.{0..2}.e.{0..1}.w", 6)]


# --- mistakes -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt target": ({"targets": ("q_porj",)}, "did you mean 'q_proj'"),
    "misspelt among right ones": ({"targets": ("q_proj", "upproj")}, "did you mean 'up_proj'"),
    "misspelt name as a string": ({"targets": "v_porj"}, "did you mean 'v_proj'"),
    "misspelt full name": ({"targets": ("model.layers.0.mlp.upproj",)}, "did you mean 'model.layers.0.mlp.up_proj'"),
    "misspelt all-linear": ({"targets": "all-liner"}, "did you mean 'all-linear'"),
    "another family's names": ({"targets": ("c_attn",)}, "its layers end in"),
    "a norm as target": ({"targets": ("input_layernorm",)}, "matches no layer"),
    "no targets": ({"targets": ()}, "nothing to adapt"),
    "empty target": ({"targets": ("",)}, "targets must be"),
    "target is a number": ({"targets": 3}, "targets must be"),
    "list of numbers": ({"targets": (1, 2)}, "targets must be"),
    "regex that matches nothing": ({"targets": r".*\.query"}, "matches no layer"),
    "broken regex": ({"targets": "(q_proj"}, "is no regular expression"),
    "broken regex in exclude": ({"exclude": "*q_proj"}, "is no regular expression"),
    "misspelt exclude": ({"exclude": ("q_porj",)}, "did you mean 'q_proj'"),
    "everything excluded": ({"exclude": r".*"}, "nothing to adapt"),
    "a block too many": ({"layers": (0, 7)}, "no block 7"),
    "negative block": ({"layers": (-1,)}, "block numbers"),
    "block as text": ({"layers": ("1",)}, "block numbers"),
    "one block, no list": ({"layers": 1}, "block numbers"),
    "rank 0": ({"r": 0}, "r must be"),
    "negative rank": ({"r": -4}, "r must be"),
    "half a rank": ({"r": 2.5}, "whole number"),
    "rank as text": ({"r": "8"}, "r must be"),
    "rank True": ({"r": True}, "r must be"),
    "alpha 0": ({"alpha": 0}, "alpha must be"),
    "alpha NaN": ({"alpha": float("nan")}, "alpha must be"),
    "alpha infinite": ({"alpha": float("inf")}, "alpha must be"),
    "dropout 1": ({"dropout": 1.0}, "dropout must be"),
    "negative dropout": ({"dropout": -0.1}, "dropout must be"),
    "dropout as text": ({"dropout": "0.1"}, "dropout must be"),
    "unknown init": ({"init": "kaimin"}, "did you mean 'kaiming'"),
    "unknown variant": ({"variant": "dorra"}, "did you mean 'dora'"),
    "misspelt module": ({"train_modules": ("lm_haed",)}, "did you mean 'lm_head'"),
    "module is a number": ({"train_modules": 4}, "train_modules must be"),
    "misspelt rank pattern": ({"rank_pattern": {"q_porj": 4}}, "did you mean 'q_proj'"),
    "misspelt alpha pattern": ({"alpha_pattern": {"dwn_proj": 4}}, "did you mean 'down_proj'"),
    "broken pattern": ({"rank_pattern": {"(q_proj": 4}}, "is no regular expression"),
    "rank 0 in a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be"),
    "half a rank in a pattern": ({"rank_pattern": {"q_proj": 1.5}}, "whole number"),
    "alpha as text in a pattern": ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern['q_proj'] must be"),
    "pattern is a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
    "pattern of a layer not adapted": (
        {"targets": ("q_proj",), "rank_pattern": {"v_proj": 4}},
        "rank_pattern 'v_proj'",
    ),
    "DoRA on an embedding": ({"variant": "dora", "targets": ("embed_tokens",)}, "model.embed_tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_one_line_and_changes_nothing(case: str, tiny: Tiny) -> None:
    settings, words = WRONG[case]
    model = tiny("llama")
    modules = list(model.modules())
    with pytest.raises(UsageError) as caught:
        add_lora(model, LoraConfig(**settings))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_mistakes_of_one_kind_are_named_at_once(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"'q_porj'.*'k_porj'"):
        add_lora(tiny("llama"), LoraConfig(targets=("q_porj", "v_proj", "k_porj")))


def test_there_is_one_adapter_at_a_time(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model)
    with pytest.raises(UsageError, match="already carries an adapter"):
        add_lora(model)


def test_nothing_to_merge_or_save(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        merge_lora(tiny("llama"))
    with pytest.raises(UsageError, match="no adapter"):
        lorafit.save_lora(tiny("llama"), tmp_path)


def test_an_init_that_fails_half_way_leaves_the_model_alone(tiny: Tiny) -> None:
    made: list[int] = []

    def third_time_bad(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return INITS["kaiming"](W, r, s)

    model = tiny("llama")
    modules = list(model.modules())
    init("third_time_bad")(third_time_bad)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            add_lora(model, LoraConfig(init="third_time_bad"))
    finally:
        del INITS["third_time_bad"]
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert inject.attached(model) is None


# --- switching, removing, merging -----------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_disabled_is_the_base_bit_for_bit(
    variant: str, family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, without_experts: Tiny
) -> None:
    model = tiny(family)
    raw = logits(model, token_ids())
    rest = without_experts(family) if variant == "dora" else {}
    add_lora(model, LoraConfig(r=4, variant=variant, train_modules=(_last_norm(model),), **rest))
    shaken(model)
    adapted = logits(model, token_ids())
    with lorafit.lora_disabled(model):
        assert torch.equal(logits(model, token_ids()), raw)
        with lorafit.lora_disabled(model):
            pass
        assert torch.equal(logits(model, token_ids()), raw)
    assert torch.equal(logits(model, token_ids()), adapted)
    with pytest.raises(ZeroDivisionError), lorafit.lora_disabled(model):
        _ = 1 / 0
    assert torch.equal(logits(model, token_ids()), adapted)


def _last_norm(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()][-1]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_keeps_the_function_and_the_names(
    variant: str, dtype: torch.dtype, family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, without_experts: Tiny
) -> None:
    model = tiny(family).to(dtype)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    parameters = {name: p.requires_grad for name, p in model.named_parameters()}
    rest = without_experts(family) if variant == "dora" else {}
    add_lora(model, LoraConfig(r=4, variant=variant, train_modules=(_last_norm(model),), **rest))
    shaken(model)
    adapted = logits(model, token_ids()).double()
    assert merge_lora(model) is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == parameters
    assert not list(inject.wrappers(model))
    # A random network multiplies rounding; that a weight is the rounded sum is tested layer by layer.
    bound = {torch.float64: 1e-6 if variant == "dora" else 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.2}
    assert (logits(model, token_ids()).double() - adapted).norm() <= bound[dtype] * adapted.norm()


TIED = ["gemma2", "gemma3_text", "gpt2", "opt", "bloom", "falcon"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end", ["embedding", "head", "both", "embedding in full", "head in full"])
@pytest.mark.parametrize("family", TIED)
def test_merging_one_end_of_a_tied_weight_leaves_the_other(
    family: str, end: str, dtype: torch.dtype, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    tiny(family).to(dtype).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    modules = {module: name for name, module in model.named_modules()}
    ends = {"embedding": modules[model.get_input_embeddings()], "head": modules[model.get_output_embeddings()]}
    before = model.get_input_embeddings().weight.detach().clone()
    chosen = tuple(ends.values()) if end == "both" else (ends[end.removesuffix(" in full")],)
    if end.endswith("in full"):
        add_lora(model, LoraConfig(r=4, layers=(0,), train_modules=chosen))
    else:
        add_lora(model, LoraConfig(r=4, targets=chosen))
    shaken(model)
    adapted = logits(model, token_ids())
    merge_lora(model)
    merged = logits(model, token_ids())
    bound = 2e-5 if dtype == torch.float32 else 0.2
    assert (merged.double() - adapted.double()).norm() <= bound * adapted.double().norm()
    if not end.startswith("embedding") and end != "both":
        assert torch.equal(model.get_input_embeddings().weight, before)
    if end.startswith("embedding"):
        assert torch.equal(model.get_output_embeddings().weight, before)
    model.tie_weights()
    assert torch.equal(logits(model, token_ids()), merged)
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again, token_ids()), merged)


def test_a_tied_model_stays_tied_when_its_blocks_are_merged(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("gemma2")
    add_lora(model)
    merge_lora(shaken(model))
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("where", ["lora_B", "trained"])
def test_merging_numbers_that_are_not_finite_changes_nothing(where: str, tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(train_modules=("norm",)))
    bad = [name for name, _ in model.named_parameters() if where in name][-1]
    model.get_parameter(bad).data.flatten()[0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NumericError, match=re.escape(bad.split(f".{where}")[0])):
        merge_lora(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) or name == bad for name in before)


def test_a_sum_too_large_for_the_base_is_refused(tiny: Tiny) -> None:
    model = tiny("llama").half()
    add_lora(model, LoraConfig(targets=("q_proj",), layers=(0,), init="gaussian_both"))
    model.model.layers[0].self_attn.q_proj.lora_B.weight.data.fill_(1e6)
    with pytest.raises(NumericError, match=r"layers\.0\.self_attn\.q_proj"):
        merge_lora(model)


@pytest.mark.parametrize("own", [30_000.0, 50_000.0])
def test_sums_are_made_once_unless_they_might_not_be_finite(
    own: float, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 ends at 65,504: 30,000 has room, 50,000 may not."""
    made: list[LoraLinear] = []
    plain = LoraLinear.merged_weight

    def counted(layer: LoraLinear) -> torch.Tensor:
        made.append(layer)
        return plain(layer)

    monkeypatch.setattr(LoraLinear, "merged_weight", counted)
    model = tiny("llama").half()
    add_lora(model, LoraConfig(targets=("q_proj",), layers=(0,)))
    model.model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] = own
    merge_lora(model)
    assert len(made) == (1 if own < 32_000 else 2)


def test_a_model_that_multiplies_by_its_layers_weights_itself(tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    """Mamba reads `dt_proj.weight`; a wrapper that handed out the base's would leave the adapter out in silence."""
    model = tiny("mamba", state_size=4, time_step_rank=4).double()
    raw = logits(model, token_ids())
    add_lora(model, LoraConfig(r=2))
    torch.testing.assert_close(logits(model, token_ids()), raw)
    adapted = logits(shaken(model), token_ids())
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(logits(merge_lora(model), token_ids()), adapted)


def test_removing_frees_the_adapter(tiny: Tiny) -> None:
    model = tiny("llama")
    ids_before = [id(p) for p in model.parameters()]
    add_lora(model)
    unload_lora(model)
    gc.collect()
    assert [id(p) for p in model.parameters()] == ids_before
    assert not any(isinstance(found, LoraLinear) for found in model.modules())


def test_the_mode_of_the_model_is_kept(tiny: Tiny) -> None:
    for training in (True, False):
        model = tiny("llama").train(training)
        add_lora(model, LoraConfig(dropout=0.5, train_modules=("norm",)))
        assert all(module.training is training for module in model.modules())
        model.train(not training)
        unload_lora(model)
        assert all(module.training is not training for module in model.modules())


def test_a_copy_of_an_adapted_model_is_independent(tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    model = tiny("gemma2")
    raw = logits(model, token_ids())
    add_lora(model, LoraConfig(train_modules=("norm",)))
    shaken(model)
    twin = copy.deepcopy(model)
    adapted = logits(model, token_ids())
    assert torch.equal(logits(twin, token_ids()), adapted)
    unload_lora(twin)
    assert torch.equal(logits(twin, token_ids()), raw)
    assert torch.equal(logits(model, token_ids()), adapted)
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight


def test_moving_an_adapted_model_moves_the_adapter(tiny: Tiny, token_ids: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(variant="dora", init="gaussian_both"))
    assert {tensor.device.type for tensor in model.to("meta").state_dict().values()} == {"meta"}
    assert all(buffer.device.type == "meta" for _, buffer in model.named_buffers())
    half = tiny("llama")
    add_lora(half, LoraConfig(init="gaussian_both"))
    assert logits(half.bfloat16(), token_ids()).dtype == torch.bfloat16


# --- plain modules, without a configuration -------------------------------------------------------


class Plain(nn.Module):
    """Digits as names, a name that ends another one, attention that multiplies by itself, a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.nested = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)))
        self.outer = nn.ModuleDict({"lin": nn.Linear(6, 6), "xlin": nn.Linear(6, 6)})
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.matrix = nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.nested(self.lin(x)) + self.outer["lin"](x) + self.outer["xlin"](x)
        x = x @ self.matrix
        return self.norm(x + self.attention(x[None], x[None], x[None], need_weights=False)[0][0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": r"lin"},
        {"targets": r"lin|nested\.0"},
        {"targets": ("0", "xlin")},
        {"targets": ("nested.2.1",), "train_modules": ("norm",)},
        {"targets": ("outer.lin", "nested.2.0"), "rank_pattern": {"outer.lin": 3}},
        {"alpha_pattern": {"^lin": 4, "outer.lin": 2}, "variant": "dora"},
        {"alpha_pattern": {"^lin": 4}},
    ],
)
def test_a_plain_module_from_add_to_merge(settings: dict[str, Any], shaken: Tiny, tmp_path: Path) -> None:
    model = Plain().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, 6)
    raw = model(x)
    plan = add_lora(model, LoraConfig(r=2, **settings))
    shaken(model)
    adapted = model(x)
    unload_lora(model, tmp_path / "adapter")
    assert torch.equal(model(x), raw)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = load_lora(model, tmp_path / "adapter")
    assert again.targets == plan.targets
    assert torch.equal(model(x), adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(_plain_again(model)), str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs.eval()(x), adapted)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted)
    assert model.state_dict().keys() == before.keys()


def _plain_again(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    unload_lora(twin)
    return twin


def test_a_string_of_name_characters_is_a_name_ending() -> None:
    assert names(Plain(), targets="lin") == ["lin", "outer.lin"]
    assert names(Plain(), targets="(lin)") == ["lin"]


def test_attention_that_multiplies_by_itself_is_left_alone_and_named() -> None:
    plan = find_targets(Plain(), LoraConfig())
    assert not [target for target in plan.targets if target.name.startswith("attention")]
    assert set(plan.unreachable) == {"matrix", "attention.in_proj_weight", "attention.out_proj.weight"}
    with pytest.raises(UsageError, match=r"'attention\.out_proj' matches no layer"):
        find_targets(Plain(), LoraConfig(targets=("attention.out_proj",)))


def test_one_layer_under_two_names_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    with pytest.raises(UsageError, match="a and c are one layer used twice"):
        add_lora(model)
    assert [t.name for t in add_lora(model, LoraConfig(exclude=("a",))).targets] == ["b"]


def test_two_layers_with_one_weight_are_two_after_a_merge(shaken: Tiny) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    kept = model["b"].weight.detach().clone()
    add_lora(model, LoraConfig(r=2, targets=("a",)))
    merge_lora(shaken(model))
    assert torch.equal(model["b"].weight, kept)
    assert not torch.equal(model["a"].weight, kept)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_nothing_linear_says_so() -> None:
    with pytest.raises(LorafitError, match="nothing to adapt: no linear layer in this Sequential"):
        add_lora(nn.Sequential(nn.LayerNorm(4)))
