"""PEFT and lorafit compute the same: files go both ways, and one training step has the same gradients."""

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafit
from lorafit import LoraConfig, add_lora, load_lora, save_lora

Tiny = Callable[..., Any]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def targets_of(family: str, variant: str = "lora") -> Any:
    """DoRA is for linear layers; in Mixtral 'all-linear' wraps the experts and the router, too."""
    return ATTENTION if family == "mixtral" and variant == "dora" else "all-linear"


def base(tiny: Tiny, family: str, dtype: torch.dtype) -> Any:
    model = tiny(family).to(dtype)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def peft_config(**changes: Any) -> peft.LoraConfig:
    changes = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    return peft.LoraConfig(**changes)


def in_peft(model: nn.Module, path: Path, **options: Any) -> Any:
    """`model` with the adapter in `path`, by PEFT; any key that PEFT misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*tied.*|.*fan_in_fan_out.*", category=UserWarning)
        # PEFT looks for a pattern's layers among modules and weights, and then warns that it is none of the modules.
        warnings.filterwarnings("ignore", message=".*gate_up_proj.*", category=RuntimeWarning)
        return peft.PeftModel.from_pretrained(model, str(path), **options).eval()


def from_peft(model: nn.Module, config: peft.LoraConfig, path: Path, shaken: Any) -> Any:
    """A PEFT model with random adapter values, and its file in `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on Conv1D and tied weights
        made = shaken(peft.get_peft_model(model, config)).eval()
        made.save_pretrained(str(path))
    return made


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6 of the largest logit; in float64, where rounding hides nothing, within 1e-12."""
    bound = 1e-12 if ours.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * theirs.abs().max().item())


def gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The gradient of every trained parameter after one step, under lorafit's names."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    """PEFT's name of a parameter in memory -> lorafit's."""
    name = name.removeprefix("base_model.model.").replace("modules_to_save.default", "trained")
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every tensor agrees to 1e-5 of its norm."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


# --- every family, both ways ----------------------------------------------------------------------


# DoRA in float64: its two fp32 evaluations, ours and PEFT's, are up to 1.3e-6 apart by rounding alone.
EACH_VARIANT = pytest.mark.parametrize(
    ("variant", "dtype"), [("lora", torch.float32), ("lora", torch.float64), ("dora", torch.float64)]
)


@EACH_VARIANT
def test_our_adapter_in_peft(
    family: str,
    variant: str,
    dtype: torch.dtype,
    tiny: Tiny,
    shaken: Tiny,
    token_ids: Tiny,
    tmp_path: Path,
) -> None:
    ours = base(tiny, family, dtype)
    plain = logits(ours, token_ids())
    add_lora(ours, LoraConfig(r=4, alpha=8, targets=targets_of(family, variant), variant=variant))
    save_lora(shaken(ours), tmp_path)
    assert (logits(ours, token_ids()) - plain).abs().max() > 0.01 * plain.abs().max()
    theirs = in_peft(base(tiny, family, dtype), tmp_path, is_trainable=True)
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    assert_same_gradients(gradients(ours, token_ids()), gradients(theirs, token_ids()))


@EACH_VARIANT
def test_pefts_adapter_here(
    family: str,
    variant: str,
    dtype: torch.dtype,
    tiny: Tiny,
    shaken: Tiny,
    token_ids: Tiny,
    tmp_path: Path,
) -> None:
    names = targets_of(family, variant)
    config = peft_config(target_modules=names if isinstance(names, str) else list(names), use_dora=variant == "dora")
    theirs = from_peft(base(tiny, family, dtype), config, tmp_path, shaken)
    ours = base(tiny, family, dtype)
    load_lora(ours, tmp_path)
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    assert_same_gradients(gradients(ours, token_ids()), gradients(theirs, token_ids()))


def test_the_same_layers_and_counts_as_peft(family: str, tiny: Tiny) -> None:
    names = targets_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            tiny(family), peft_config(target_modules=names if isinstance(names, str) else list(names))
        )
    ours = tiny(family)
    plan = add_lora(ours, LoraConfig(r=4, alpha=8, targets=names))
    assert (plan.trainable, plan.total) == theirs.get_nb_trainable_parameters()
    assert lorafit.count_parameters(ours).trainable == plan.trainable
    tuner = theirs.base_model
    assert {t.name for t in plan.targets} == {*tuner.targeted_module_names, *tuner.targeted_parameter_names}


# --- every setting, both ways ---------------------------------------------------------------------

OVERLAPPING: dict[str, Any] = {
    "rank_pattern": {"q_proj": 8, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"q_proj": 6, "layers.1.self_attn.q_proj": 3, "down_proj": 12},
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "suffix list": ("llama", {"targets": ("q_proj", "mlp.down_proj")}),
    "regex": ("llama", {"targets": r".*\.(k|v)_proj|.*layers\.1\.mlp\..*"}),
    "regex of one name": ("llama", {"targets": r"model\.layers\.0\.self_attn\.q_proj"}),
    "exclude list": ("llama", {"exclude": ("v_proj", "layers.0.mlp.up_proj")}),
    "exclude regex": ("llama", {"exclude": r".*\.layers\.0\..*"}),
    "layers": ("llama", {"layers": (1,)}),
    "layers of a list": ("gpt2", {"layers": (0,), "targets": ("c_attn", "c_fc")}),
    "rsLoRA": ("llama", {"rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3, r"layers\.0\.mlp.*": 1}},
    ),
    "overlapping patterns": ("llama", OVERLAPPING),
    "overlapping patterns, rsLoRA": ("qwen3", OVERLAPPING | {"rslora": True}),
    "pattern as regex": ("llama", {"rank_pattern": {r"layers\.\d+\.self_attn\..*": 2}}),
    "one exact pattern": ("llama", {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}}),
    "embedding": ("llama", {"targets": ("embed_tokens", "q_proj")}),
    "tied embedding": ("gemma2", {"targets": ("embed_tokens", "q_proj")}),
    "scaled embedding": ("gemma3_text", {"targets": ("embed_tokens",)}),
    "head": ("llama", {"targets": ("lm_head", "q_proj")}),
    "Conv1D and wte": ("gpt2", {"targets": ("wte", "c_proj")}),
    "norm": ("llama", {"train_modules": ("model.norm",)}),
    "every norm": ("llama", {"train_modules": ("input_layernorm",), "targets": ("q_proj",)}),
    "head in full": ("llama", {"train_modules": ("lm_head",)}),
    "tied head in full": ("gpt2", {"train_modules": ("lm_head",)}),
    "embedding in full": ("gemma2", {"train_modules": ("embed_tokens",)}),
    "a block in full": ("llama", {"train_modules": ("layers.1.mlp",)}),
    "only a module in full": ("llama", {"train_modules": ("norm",), "targets": ("q_proj",)}),
    "a kept start": ("llama", {"init": "pissa"}),
    "a kept start, Conv1D": ("gpt2", {"init": "pissa"}),
    "a kept start, rsLoRA": ("qwen3", {"init": "pissa", "rslora": True}),
    "a kept start, DoRA": ("llama", {"init": "pissa", "variant": "dora"}),
    "a kept start, overlapping patterns, rsLoRA": ("qwen3", OVERLAPPING | {"init": "pissa", "rslora": True}),
    "a kept start and an embedding": ("llama", {"init": "pissa", "targets": ("embed_tokens", "q_proj")}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_our_file_means_the_same_in_peft(case: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    family, settings = SETTINGS[case]
    ours = tiny(family)
    add_lora(ours, LoraConfig(**({"r": 4, "alpha": 8} | settings)))
    save_lora(shaken(ours), tmp_path)
    theirs = in_peft(tiny(family), tmp_path)
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    again = tiny(family)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again, token_ids()), logits(ours, token_ids()))


PEFT_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "suffix list": ("llama", {"target_modules": ["q_proj", "mlp.down_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.(k|v)_proj"}),
    "string that looks like a name": ("llama", {"target_modules": r"model.layers.0.self_attn.q_proj"}),
    "exclude": ("llama", {"exclude_modules": ["v_proj"], "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "layer subset": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": 1}),
    "layers_pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 1}}),
    "anchored pattern": ("llama", {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2}}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "MiCA": ("llama", {"init_lora_weights": "mica"}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding": ("gemma3_text", {"target_modules": ["embed_tokens"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "Conv1D and wte": ("gpt2", {"target_modules": ["wte", "c_proj"], "fan_in_fan_out": True}),
    "every norm that ends so": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "one norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "head in full": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "tied head in full": ("gpt2", {"modules_to_save": ["lm_head"], "target_modules": ["c_attn"]}),
    "embedding in full": ("gemma2", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_pefts_file_means_the_same_here(case: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    family, settings = PEFT_SETTINGS[case]
    theirs = from_peft(tiny(family), peft_config(**settings), tmp_path / "theirs", shaken)
    ours = tiny(family)
    load_lora(ours, tmp_path / "theirs")
    assert_same(logits(ours, token_ids()), logits(theirs, token_ids()))
    save_lora(ours, tmp_path / "ours")
    assert_same(logits(in_peft(tiny(family), tmp_path / "ours"), token_ids()), logits(theirs, token_ids()))


MOVED: dict[str, tuple[str, dict[str, Any]]] = {
    "PiSSA": ("llama", {"rank_pattern": {"q_proj": 8}}),
    "PiSSA, Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "PiSSA, rsLoRA": ("qwen3", {"use_rslora": True}),
    "PiSSA, DoRA": ("llama", {"use_dora": True}),
    "OLoRA": ("llama", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("case", MOVED)
def test_what_peft_saves_of_a_base_it_moved(
    case: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    """As it is, so that the start is made anew from the base, and as the pair of twice the rank it can convert it to.

    PEFT's own base is rounded where it was moved, and it moves none in float64.
    """
    family, settings = MOVED[case]
    config = peft_config(**({"init_lora_weights": "pissa"} | settings))
    init, names = config.init_lora_weights, ["native"]
    model: Any = peft.get_peft_model(tiny(family), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.init_lora_weights = True  # or PEFT would take the start from the base once more
        model.save_pretrained(str(tmp_path / "start"))
        config.init_lora_weights = init
        trained = logits(shaken(model).eval(), token_ids())
        model.save_pretrained(str(tmp_path / "native"))
        if not config.use_dora:  # in which PEFT's conversion would lose the magnitudes
            model.save_pretrained(
                str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
            )
            names.append("converted")
    for name in names:
        ours = tiny(family)
        plan = load_lora(ours, tmp_path / name)
        assert min(target.r for target in plan.targets) == (8 if name == "converted" else 4)
        torch.testing.assert_close(
            logits(ours, token_ids()), trained, rtol=0, atol=3e-6 * trained.abs().max().item()
        )


def test_peft_reloads_its_overlapping_patterns_wrongly_and_ours_rightly(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    """PEFT goes by the order of the keys and then sorts them in its file; we write keys that do not overlap."""
    alphas = {"model.layers.1.mlp.up_proj": 24, "mlp.up_proj": 2}
    theirs = from_peft(tiny("llama"), peft_config(alpha_pattern=alphas), tmp_path / "theirs", shaken)
    trained = logits(theirs, token_ids())
    reloaded = logits(in_peft(tiny("llama"), tmp_path / "theirs"), token_ids())
    assert (reloaded - trained).abs().max() > 1e-3 * trained.abs().max()
    here = tiny("llama")
    load_lora(here, tmp_path / "theirs")  # such a file means here what it means there
    assert_same(logits(here, token_ids()), reloaded)

    ours = tiny("llama")
    add_lora(ours, LoraConfig(r=4, alpha=8, alpha_pattern=dict(reversed(alphas.items()))))
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    assert not ours.load_state_dict(state, strict=False).unexpected_keys
    assert_same(logits(ours, token_ids()), trained)
    save_lora(ours, tmp_path / "ours")
    assert_same(logits(in_peft(tiny("llama"), tmp_path / "ours"), token_ids()), trained)


def test_a_string_in_a_file_is_a_regular_expression_even_if_it_looks_like_a_name(shaken: Tiny, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.Sequential(OrderedDict(lin=nn.Linear(4, 4)))
        return nn.Sequential(OrderedDict(lin=nn.Linear(4, 4), inner=inner))

    theirs = from_peft(plain(), peft_config(target_modules="lin", task_type=None), tmp_path, shaken)
    ours = plain()
    assert [target.name for target in load_lora(ours, tmp_path).targets] == ["lin"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_config_file_has_the_fields_peft_writes(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    from_peft(tiny("llama"), peft_config(target_modules=list(ATTENTION)), tmp_path / "theirs", shaken)
    ours = tiny("llama")
    add_lora(ours, LoraConfig(r=4, alpha=8, targets=ATTENTION))
    save_lora(ours, tmp_path / "ours")
    read = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in read:
        config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT, in any order
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None
        config.pop("peft_version")
    assert read[0] == read[1]
    keys = [load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_on_disk(
    dtype: torch.dtype, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    from_peft(tiny("llama"), peft_config(), tmp_path, shaken)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    ours = tiny("llama")
    load_lora(ours, tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(logits(ours, token_ids()), logits(in_peft(tiny("llama"), tmp_path), token_ids()))


def test_a_bf16_base_keeps_the_adapter_in_fp32_as_peft_does(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    ours = tiny("llama").bfloat16()
    add_lora(ours, LoraConfig(r=4, alpha=8))
    save_lora(shaken(ours), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    theirs = in_peft(tiny("llama").bfloat16(), tmp_path)
    got, peers = logits(ours, token_ids()), logits(theirs, token_ids())
    exact = logits(ours.double(), token_ids())
    # PEFT multiplies by A and B in fp32, we in bf16, the precision of everything else in such a model.
    assert (got - exact).norm() <= 3 * (peers - exact).norm() < 0.05 * exact.norm()


# --- adapters that others made --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_all_linear", "dora", "rslora", "modules_to_save", "rank_alpha_pattern"])
def test_adapters_with_recorded_logits(name: str, shared: Callable[[str], Path]) -> None:
    path = shared(f"adapters/made_with_peft/{name}")
    golden = json.loads((path / "golden.json").read_text())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(shared("models/tinystories-260k")).eval()
    load_lora(model, path, trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.tensor([golden["probe_ids"]])
    recorded = torch.tensor(golden["last_logits"])
    # The recorded logits are fp32 from another processor, up to 1.3e-6 from float64.
    torch.testing.assert_close(
        logits(model, tokens)[0, -1], recorded, rtol=0, atol=1.5e-6 * recorded.abs().max().item()
    )


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_r8_cattn_cproj_apache": ("gpt2", {"hidden_size": 768, "num_attention_heads": 12}),
    "opencalm1b-neox_r1_qkv": ("gpt_neox", {"hidden_size": 2048, "num_attention_heads": 16}),
}
BLOCKS = {"gpt2": 12, "gpt_neox": 24}


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_trained_by_others(
    name: str, tiny: Tiny, token_ids: Tiny, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    """The whole file fits the whole model; the values are compared on its first two blocks, which is quick."""
    path = shared(f"adapters/{name}")
    family, sizes = FOREIGN[name]
    with torch.device("meta"):
        whole = tiny(family, **sizes, num_hidden_layers=BLOCKS[family])
    tensors = load_file(path / "adapter_model.safetensors")
    assert len(load_lora(whole, path).targets) == len(tensors) / 2

    (tmp_path / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    first = {key: tensor for key, tensor in tensors.items() if int(key.split(".")[4]) < 2}
    save_file(first, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = tiny(family, **sizes).double()
    plain = logits(model, token_ids())
    load_lora(model, tmp_path)
    ours = logits(model, token_ids())
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    lorafit.unload_lora(model)
    assert torch.equal(logits(model, token_ids()), plain)
    assert_same(ours, logits(in_peft(model, tmp_path), token_ids()))
