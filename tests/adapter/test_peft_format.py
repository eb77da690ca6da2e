"""The file: what is written, and what is refused without a byte of the model changed."""

import hashlib
import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafit import LoraConfig, add_lora, load_lora, save_lora, unload_lora
from lorafit.adapter.peft_config import DEFAULTS
from lorafit.errors import AdapterError, DiskError, NumericError
from lorafit.files import MANIFEST
from lorafit.lora import inject

Tiny = Callable[..., Any]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


def digest(model: nn.Module) -> str:
    """Names, flags and every byte."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(f"{name} {tensor.requires_grad} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture
def adapter(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Path:
    """A good adapter on disk: q_proj and v_proj of the tiny Llama, r 4, alpha 8."""
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, alpha=8, targets=("q_proj", "v_proj"), train_modules=("model.norm",)))
    return save_lora(shaken(model), tmp_path / "adapter")


def rewrite(path: Path, **changes: Any) -> None:
    raw = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(raw | changes))


@contextmanager
def tensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """The file's tensors, to be changed; what is written then is a file that somebody else might have written."""
    found = load_file(path / WEIGHTS)
    yield found
    save_file(found, path / WEIGHTS, metadata={"format": "pt"})
    (path / MANIFEST).unlink(missing_ok=True)


# --- writing --------------------------------------------------------------------------------------


def test_what_is_written(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    with safe_open(adapter / WEIGHTS, "pt") as opened:
        assert sorted(opened.metadata()) == ["format", "lorafit"]
        assert opened.metadata()["format"] == "pt"
        assert f"{Q}.lora_A.weight" in opened.keys()  # noqa: SIM118
        assert "base_model.model.model.norm.weight" in opened.keys()  # noqa: SIM118
        assert len(opened.keys()) == 2 * 4 + 1
    config = json.loads((adapter / CONFIG).read_text())
    assert list(config) == sorted(config)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert (config["modules_to_save"], config["task_type"]) == (["model.norm"], "CAUSAL_LM")
    assert stat.S_IMODE((adapter / WEIGHTS).stat().st_mode) == stat.S_IMODE((adapter / CONFIG).stat().st_mode)


def test_the_name_of_the_base_model(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model)
    save_lora(model, tmp_path, base_model="someone/llama")
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "someone/llama"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["llama", "gpt2", "gemma3_text", "falcon"]),
    variant=st.sampled_from(["lora", "dora"]),
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 100),
    rslora=st.booleans(),
    trained=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_saved_and_loaded_it_is_the_same_adapter_bit_for_bit(
    family: str,
    variant: str,
    r: int,
    alpha: float,
    rslora: bool,
    trained: bool,
    dtype: torch.dtype,
    seed: int,
    tiny: Tiny,
    shaken: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("adapter")
    model = tiny(family).to(dtype)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    plan = add_lora(
        model,
        LoraConfig(r=r, alpha=alpha, rslora=rslora, variant=variant, train_modules=(head,) if trained else ()),
    )
    shaken(model, seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unload_lora(model, path)
    again = load_lora(model, path)
    assert (again.targets, again.trained) == (plan.targets, plan.trained)
    assert (again.trainable, again.total) == (plan.trainable, plan.total)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = (path / WEIGHTS).read_bytes(), (path / CONFIG).read_bytes()
    save_lora(model, path)
    assert ((path / WEIGHTS).read_bytes(), (path / CONFIG).read_bytes()) == first


def test_nothing_is_written_of_numbers_that_are_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model)
    model.model.layers[1].mlp.up_proj.lora_B.weight.data[0, 0] = torch.inf
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight; nothing was written"):
        save_lora(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_replaced_and_anything_else_is_left_alone(adapter: Path, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2))
    (adapter / "README.md").write_text("a card")
    save_lora(model, adapter)
    assert json.loads((adapter / CONFIG).read_text())["r"] == 2
    thesis = tmp_path / "documents"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskError, match=r"holds other files \(thesis\.txt\)"):
        save_lora(model, thesis)
    assert [file.name for file in thesis.iterdir()] == ["thesis.txt"]


def test_buffers_of_a_module_trained_in_full_are_saved_with_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    add_lora(model, LoraConfig(train_modules=("1",)))
    for _ in range(3):
        model(torch.randn(8, 4))
    x, expected = torch.randn(5, 4), None
    expected = model.eval()(x)
    unload_lora(model, tmp_path)
    assert not torch.equal(model(x), expected)
    load_lora(model, tmp_path)
    assert torch.equal(model(x), expected)
    assert model.state_dict()["1.trained.num_batches_tracked"] == 3


# --- reading --------------------------------------------------------------------------------------


def test_loading_leaves_random_numbers_and_mode_alone(adapter: Path, tiny: Tiny) -> None:
    model = tiny("llama").train()
    state = torch.get_rng_state()
    load_lora(model, adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_trainable_or_not(adapter: Path, tiny: Tiny) -> None:
    for trainable in (True, False):
        model = tiny("llama")
        load_lora(model, adapter, trainable=trainable)
        assert {p.requires_grad for n, p in model.named_parameters() if "lora" in n or "trained" in n} == {trainable}
        assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
        unload_lora(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_over_an_adapter_replaces_it(
    adapter: Path, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    fresh = tiny("llama")
    load_lora(fresh, adapter)
    model = tiny("llama")
    plain = digest(model)
    add_lora(model, LoraConfig(variant="dora", targets=("q_proj", "lm_head"), r=3))
    shaken(model)
    load_lora(model, adapter)
    assert digest(model) == digest(fresh)
    assert torch.equal(logits(model, token_ids()), logits(fresh, token_ids()))
    unload_lora(model)
    assert digest(model) == plain


def test_keys_as_other_tools_write_them(adapter: Path, tiny: Tiny, token_ids: Tiny) -> None:
    expected = tiny("llama")
    load_lora(expected, adapter)
    with tensors(adapter) as found:
        for key, tensor in list(found.items()):
            del found[key]
            key = key.replace("lora_A.weight", "lora_A.default.weight").replace("layers.0", "layers.0._orig_mod")
            found[f"module.{key}" if "v_proj" in key else key.removeprefix("base_model.model.")] = tensor
    model = tiny("llama")
    load_lora(model, adapter)
    assert torch.equal(logits(model, token_ids()), logits(expected, token_ids()))


def test_without_target_modules_the_tensors_say_what_is_adapted(adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, target_modules=None)
    model = tiny("llama")
    assert {t.name.rsplit(".", 1)[-1] for t in load_lora(model, adapter).targets} == {"q_proj", "v_proj"}


def test_names_of_other_models_in_a_list_are_passed_over(adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, target_modules=["q_proj", "v_proj", "c_attn"])
    assert len(load_lora(tiny("llama"), adapter).targets) == 4


def test_what_describes_the_past_changes_nothing(adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, peft_version="9.9", revision="main", fan_in_fan_out=True, a_field_of_tomorrow=None)
    load_lora(tiny("llama"), adapter)


Spoil = Callable[[Path], Any]


def change(key: str, make: Callable[[Tensor], Tensor] | None) -> Spoil:
    def spoil(path: Path) -> None:
        with tensors(path) as found:
            old = found.pop(key, torch.zeros(1))
            if make is not None:
                found[key] = make(old)

    return spoil


def config(**changes: Any) -> Spoil:
    return lambda path: rewrite(path, **changes)


def both(*spoils: Spoil) -> Spoil:
    def spoil(path: Path) -> None:
        for one in spoils:
            one(path)

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def pickle(path: Path) -> None:
    (path / WEIGHTS).unlink()
    torch.save({}, path / "adapter_model.bin")


def nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), torch.nan)


BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (change(f"{Q}.lora_A.weight", None), "1 tensors missing: model.layers.0.self_attn.q_proj.lora_A.weight"),
    "two missing": (
        both(change(f"{Q}.lora_A.weight", None), change(f"{Q}.lora_B.weight", None)),
        "2 tensors missing: model.layers.0.self_attn.q_proj.lora_A.weight, model.layers.0.self_attn.q_proj.lora_B",
    ),
    "unexpected": (change(f"{Q}.lora_C.weight", torch.clone), "unexpected: model.layers.0.self_attn.q_proj.lora_C"),
    "not in this model": (
        change("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.clone),
        "1 tensors unexpected: model.layers.9",
    ),
    "a base weight": (
        change("base_model.model.model.layers.0.self_attn.q_proj.weight", lambda t: torch.zeros(32, 32)),
        "unexpected: model.layers.0.self_attn.q_proj.weight",
    ),
    "a base weight without prefix": (
        change("model.embed_tokens.weight", lambda t: torch.zeros(96, 32)),
        "unexpected: model.embed_tokens.weight",
    ),
    "a wrapped base weight": (
        change("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", lambda t: torch.zeros(32, 32)),
        "copied from another base model: model.layers.0.self_attn.q_proj.base_layer.weight",
    ),
    "the original of a trained copy": (
        change("base_model.model.model.norm.base_layer.weight", lambda t: torch.zeros(32)),
        "unexpected: model.norm.base_layer.weight",
    ),
    "wrong shape": (
        change(f"{Q}.lora_A.weight", lambda t: t[:, :5].contiguous()),
        "of the wrong shape: model.layers.0.self_attn.q_proj.lora_A.weight is (4, 5), the model and "
        "adapter_config.json say (4, 32)",
    ),
    "transposed": (change(f"{Q}.lora_A.weight", lambda t: t.T.contiguous()), "is (32, 4)"),
    "rank of the file is another": (config(r=8), "8 tensors of the wrong shape"),
    "integers": (
        change(f"{Q}.lora_A.weight", lambda t: t.to(torch.int32)),
        "wrong dtype: model.layers.0.self_attn.q_proj.lora_A.weight is torch.int32",
    ),
    "NaN": (change(f"{Q}.lora_B.weight", nan), "NaN or infinite: model.layers.0.self_attn.q_proj.lora_B.weight"),
    "infinite in fp16": (
        change(f"{Q}.lora_B.weight", lambda t: (t * torch.inf).half()),
        "NaN or infinite: model.layers.0.self_attn.q_proj.lora_B.weight",
    ),
    "one place twice": (
        change(f"module.{Q}.lora_A.default.weight", lambda t: torch.zeros(4, 32)),
        "several tensors for one place",
    ),
    "everything the header says": (
        both(
            change(f"{Q}.lora_A.weight", None),
            change(f"{Q}.lora_B.weight", torch.Tensor.int),
            change("base_model.model.model.norm.weight", lambda t: t[:3].clone()),
            change("lm_head.weight", lambda t: torch.zeros(96, 32)),
        ),
        "1 tensors missing: model.layers.0.self_attn.q_proj.lora_A.weight; 1 tensors unexpected: lm_head.weight; "
        "1 tensors of the wrong shape: model.norm.weight is (3,), the model and adapter_config.json say (32,); "
        "1 tensors of the wrong dtype: model.layers.0.self_attn.q_proj.lora_B.weight is torch.int32; nothing",
    ),
    "everything the values say": (
        both(
            change(f"{Q}.lora_B.weight", nan),
            change("base_model.model.model.norm.weight", nan),
            change(f"{Q}.base_layer.weight", lambda t: torch.zeros(32, 32)),
        ),
        "2 tensors NaN or infinite: model.layers.0.self_attn.q_proj.lora_B.weight, model.norm.weight; 1 tensors copied "
        "from another base model: model.layers.0.self_attn.q_proj.base_layer.weight; nothing was loaded",
    ),
    "modules the model lacks": (config(modules_to_save=["classifier"]), "does not fit this model"),
    "names of another family": (config(target_modules=["c_attn"]), "target_modules=['c_attn'] names no layer of it"),
    "another rank pattern": (config(rank_pattern={"q_proj": 2}), "4 tensors of the wrong shape"),
    "fewer layers": (config(layers_to_transform=[0]), "4 tensors unexpected"),
    "DoRA without magnitudes": (config(use_dora=True), "4 tensors missing: model.layers.0.self_attn.q_proj.lora_m"),
    "a pickle": (pickle, "is a pickle, which lorafit never opens"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"no {WEIGHTS} here"),
    "no configuration": (lambda path: (path / CONFIG).unlink(), f"no {CONFIG} here"),
    "weights cut short": (
        lambda path: text(WEIGHTS, (path / WEIGHTS).read_bytes()[:-100])(path),
        "not a readable safetensors file",
    ),
    "weights are text": (text(WEIGHTS, "hello"), "not a readable safetensors file"),
    "weights are empty": (text(WEIGHTS, b""), "not a readable safetensors file"),
    "configuration is no JSON": (text(CONFIG, "{'r': 4}"), "not readable as JSON"),
    "configuration is no text": (text(CONFIG, b"\xff\xfe\x00"), "not readable as JSON"),
    "configuration is a list": (text(CONFIG, "[1]"), "a JSON object is expected, not list"),
    "configuration is a tower": (text(CONFIG, "[" * 100_000), "not readable as JSON"),
    "no peft_type": (text(CONFIG, '{"r": 4}'), "peft_type is None"),
    "misspelt field": (config(lora_alfa=3), "unknown field lora_alfa=3 (did you mean 'lora_alpha'?)"),
    "field of tomorrow": (config(use_magic=True), "unknown field use_magic=True"),
    "experts as text": (config(target_parameters="down_proj"), "target_parameters='down_proj': a list of at most"),
    "weights that nothing is for": (config(target_parameters=["k_proj.weight"]), "4 tensors missing"),
    "biases": (config(bias="lora_only"), "bias='lora_only' is not supported"),
    "bias of B": (config(lora_bias=True), "lora_bias=True is not supported"),
    "other tokens in each layer": (
        config(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
        "the same tokens of embedding and head are expected",
    ),
    "a token far off": (config(trainable_token_indices=[10**8]), "has 96 rows, and no 100000000: add_tokens first"),
    "tokens by name": (config(trainable_token_indices=["<a>"]), "a list of token ids, or an object of such lists"),
    "copied layers": (config(layer_replication=[[0, 1]]), "layer_replication=[[0, 1]] is not supported"),
    "aLoRA": (config(alora_invocation_tokens=[7]), "alora_invocation_tokens=[7] is not supported"),
    "QALoRA": (config(use_qalora=True), "use_qalora=True is not supported"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' belongs to a changed base"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' belongs to a changed base"),
    "alpha is text": (config(lora_alpha="16"), "lora_alpha='16': a number greater than 0"),
    "alpha is not finite": (config(lora_alpha=float("inf")), "lora_alpha=inf: a number greater than 0"),
    "r is huge": (config(r=10**6), "is (4, 32), the model and adapter_config.json say (1000000, 32)"),
    "r is beyond huge": (config(r=10**30), f"r={10**30}: a whole number from 1 to"),
    "pattern is no regex": (config(rank_pattern={"(q": 4}), "does not fit this model"),
    "target is no regex": (config(target_modules="(q"), "is no regular expression"),
    "modules are text": (config(modules_to_save="norm"), "modules_to_save='norm': a list of at most"),
}  # fmt: skip
BAD |= {
    f"peft_type {kind}": (config(peft_type=kind), f"peft_type is '{kind}'; lorafit opens LORA adapters only")
    for kind in ("LOHA", "IA3", "PREFIX_TUNING", "ADALORA", "VERA")
}


@pytest.mark.parametrize("occupied", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line_and_changes_nothing(
    case: str, occupied: bool, adapter: Path, tiny: Tiny, shaken: Tiny, token_ids: Tiny
) -> None:
    model = tiny("llama")
    model.model.embed_tokens.requires_grad_(False)
    if occupied:
        add_lora(model, LoraConfig(r=3, targets=("k_proj",), train_modules=("layers.0.input_layernorm",)))
        shaken(model)
    plan = inject.attached(model)
    before = digest(model), logits(model, token_ids())
    spoil, words = BAD[case]
    spoil(adapter)
    with pytest.raises(AdapterError) as caught:
        load_lora(model, adapter)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert digest(model) == before[0]
    assert torch.equal(logits(model, token_ids()), before[1])
    assert inject.attached(model) is plan


def test_the_base_is_unchanged_by_a_load(adapter: Path, tiny: Tiny) -> None:
    model = tiny("llama")
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    load_lora(model, adapter)
    for name, parameter in model.named_parameters():
        if "lora" not in name and "trained" not in name:
            pointer, value = before[name.replace(".base_layer", "")]
            assert parameter.data_ptr() == pointer
            assert torch.equal(parameter, value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**25) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(sorted(DEFAULTS)), value=JSON)
def test_no_configuration_does_more_than_load_or_refuse(field: str, value: Any, adapter: Path, tiny: Tiny) -> None:
    original = (adapter / CONFIG).read_text()
    model = tiny("llama")
    before = digest(model)
    rewrite(adapter, **{field: value})
    with suppress(AdapterError):
        load_lora(model, adapter)
    (adapter / CONFIG).write_text(original)
    unload_lora(model)
    assert digest(model) == before


def test_a_configuration_of_another_save_is_refused(adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, lora_alpha=9)
    with pytest.raises(AdapterError, match=rf"{CONFIG} and {WEIGHTS} do not come from one save"):
        load_lora(tiny("llama"), adapter)


def test_a_flipped_bit_is_noticed(adapter: Path, tiny: Tiny) -> None:
    raw = bytearray((adapter / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (adapter / WEIGHTS).write_bytes(raw)
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} is not what was written"):
        load_lora(tiny("llama"), adapter)
