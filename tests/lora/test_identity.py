"""Which base, which adapter: no false alarm for the same one, no silence about another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafit import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from lorafit.adapter.fingerprint import base_fingerprint, other_base
from lorafit.errors import AdapterError
from lorafit.lora import inject
from lorafit.lora.identity import adapter_digest, merged_digests

Tiny = Callable[..., Any]
TARGETS = ("q_proj", "down_proj")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in inject.plain_modules(model).items() if name.endswith(TARGETS)}


def difference(made_on: nn.Module, loaded_on: nn.Module) -> str | None:
    return other_base(base_fingerprint(made_on, layers(made_on)), loaded_on, layers(loaded_on))


# --- the same base --------------------------------------------------------------------------------


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_a_base_is_itself_in_every_precision(family: str, tiny: Tiny) -> None:
    models = [tiny(family).to(dtype) for dtype in PRECISIONS]
    names = [target.layer for target in inject.find_targets(models[0], LoraConfig()).targets]
    chosen = [{name: model.get_submodule(name) for name in names} for model in models]
    for there, under in zip(models, chosen, strict=True):
        fingerprint = base_fingerprint(there, under)
        assert len(fingerprint["values"]) == 8
        assert [other_base(fingerprint, *here) for here in zip(models, chosen, strict=True)] == [None] * 4


def through_bfloat16_and_float16(model: Any) -> Any:
    return model.bfloat16().half().float()


def with_more_tokens(model: Any) -> Any:
    model.resize_token_embeddings(104)
    return model


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def on_meta(model: Any) -> Any:
    return model.to("meta")


def carrying_an_adapter(model: Any) -> Any:
    add_lora(model, LoraConfig(targets=("q_proj", "o_proj"), init="gaussian_both"))
    return model


def of_a_version_that_knows_other_facts(model: Any) -> Any:
    del model.config.num_key_value_heads
    model.config.hidden_activation = "gelu"
    model.config.hidden_act = "swish"
    return model


def in_training(model: Any) -> Any:
    return model.train().requires_grad_(False)


SAME = (
    through_bfloat16_and_float16, with_more_tokens, untied, on_meta, carrying_an_adapter, in_training,
    of_a_version_that_knows_other_facts,
)  # fmt: skip


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_is_itself(change: Callable[[Any], Any], tied: bool, tiny: Tiny) -> None:
    plain = tiny("llama", tie_word_embeddings=tied)
    changed = change(tiny("llama", tie_word_embeddings=tied))
    assert difference(plain, changed) is None
    assert difference(changed, plain) is None


def test_a_base_is_itself_after_saving_and_loading(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family)
    model.bfloat16().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    chosen = [t.layer for t in inject.find_targets(model, LoraConfig()).targets]
    fingerprint = base_fingerprint(tiny(family), {name: model.get_submodule(name) for name in chosen})
    assert other_base(fingerprint, again, {name: again.get_submodule(name) for name in chosen}) is None


def test_a_weight_that_is_not_plain_numbers_is_left_out(tiny: Tiny) -> None:
    class Packed(nn.Parameter):
        pass

    model = tiny("llama")
    for layer in layers(model).values():
        layer.weight = Packed(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert base_fingerprint(model, layers(model))["values"] == {}
    assert difference(tiny("llama"), model) is None


def test_a_model_that_is_no_transformer_has_a_fingerprint_too() -> None:
    torch.manual_seed(1)
    model, other = (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)) for _ in range(2))
    chosen = dict(model.named_children())
    assert other_base(base_fingerprint(model, chosen), model, chosen) is None
    assert other_base(base_fingerprint(model, chosen), other, dict(other.named_children()))


# --- another base ---------------------------------------------------------------------------------


def random_weights(model: Any) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)


def moved_by_two_percent(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)


def merged_with_an_adapter(model: Any) -> None:
    add_lora(model, LoraConfig(r=4, targets=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    merge_lora(model)
    del model.config.lorafit_merged


def one_layer_replaced(model: Any) -> None:
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, std=0.02)


def another_epsilon(model: Any) -> None:
    model.config.rms_norm_eps = 1e-5


def another_activation(model: Any) -> None:
    model.config.hidden_act = "gelu"


def other_heads(model: Any) -> None:
    model.config.num_attention_heads = 8


OTHER = (
    random_weights, moved_by_two_percent, merged_with_an_adapter, one_layer_replaced,
    another_epsilon, another_activation, other_heads,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", OTHER)
def test_another_base_is_noticed(change: Callable[[Any], None], dtype: torch.dtype, tiny: Tiny) -> None:
    other = tiny("llama")
    change(other)
    found = difference(tiny("llama"), other.to(dtype))
    assert found is not None
    assert "\n" not in found
    assert difference(other, tiny("llama")) is not None


def test_another_base_is_refused_in_one_line_and_can_be_forced(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, targets=TARGETS))
    save_lora(shaken(model), tmp_path)
    other = tiny("llama")
    random_weights(other)
    with pytest.raises(
        AdapterError, match=r"made on another base model \(model\.layers\.0\.mlp\.down_proj\.weight has"
    ):
        load_lora(other, tmp_path)
    assert inject.attached(other) is None
    assert len(load_lora(other, tmp_path, force_base=True).targets) == 4
    save_lora(other, tmp_path)  # it now belongs to the other base
    load_lora(other, tmp_path)
    with pytest.raises(AdapterError, match="made on another base model"):
        load_lora(tiny("llama"), tmp_path)


NO_FINGERPRINTS: tuple[Any, ...] = (
    None, [], 3, {}, {"facts": {}}, {"facts": [], "values": []}, {"facts": None, "values": {}},
    {"facts": {"hidden_size": [1]}, "values": {}}, {"facts": {"hidden_size": None}, "values": {}},
    {"facts": {"model_type": "x" * 101}, "values": {}}, {"facts": {"hidden_size": 10**200}, "values": {}},
    {"facts": {}, "values": {"a": 1}}, {"facts": {}, "values": {"a": "?"}}, {"facts": {}, "values": {"a": "AAA="}},
    {"facts": {}, "values": {"a": ""}}, {"facts": {}, "values": {"a": "ä"}},
)  # fmt: skip


@pytest.mark.parametrize("fingerprint", NO_FINGERPRINTS)
def test_what_is_no_fingerprint_is_a_value_error(fingerprint: Any, tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="not the fingerprint"):
        other_base(fingerprint, model, layers(model))


def test_a_number_with_many_digits_is_only_another_number(tiny: Tiny) -> None:
    model = tiny("llama")
    for fact in (10**99, 1e300, float("nan"), float("inf"), -1):
        assert other_base({"facts": {"rms_norm_eps": fact}, "values": {}}, model, layers(model))


# --- which adapter --------------------------------------------------------------------------------


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("variant", "dtype"), [("lora", torch.bfloat16), ("lora", torch.float64), ("dora", torch.float32)]
)
def test_a_merged_adapter_is_not_put_in_again(
    family: str, dtype: torch.dtype, variant: str, tiny: Tiny, shaken: Tiny, without_experts: Tiny, tmp_path: Path
) -> None:
    """Trained here, merged, saved, loaded by transformers: the model still knows what is in it."""
    model = tiny(family).to(dtype)
    add_lora(model, LoraConfig(r=2, variant=variant, **(without_experts(family) if variant == "dora" else {})))
    save_lora(shaken(model), tmp_path / "adapter")
    merge_lora(model)
    assert len(model.config.lorafit_merged) == 1
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for merged in (model, again):
        with pytest.raises(AdapterError, match="already merged into this model"):
            load_lora(merged, tmp_path / "adapter", force_base=True)
    load_lora(tiny(family), tmp_path / "adapter")


def test_an_adapter_merged_from_its_file_is_not_put_in_again(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, train_modules=("norm",)))
    save_lora(shaken(model), tmp_path)
    other = tiny("llama").bfloat16()
    load_lora(other, tmp_path)
    merge_lora(other)
    with pytest.raises(AdapterError, match="already merged into this model"):
        load_lora(other.float(), tmp_path, force_base=True)


def test_an_adapter_of_peft_is_not_put_in_again(tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    shaken(peft.get_peft_model(tiny("llama"), config)).save_pretrained(tmp_path)
    model = tiny("llama")
    load_lora(model, tmp_path)
    merge_lora(model)
    before = logits(model, token_ids())
    with pytest.raises(AdapterError, match="already merged into this model"):
        load_lora(model, tmp_path)
    assert torch.equal(logits(model, token_ids()), before)


def test_another_adapter_goes_into_a_merged_model(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    for number in (1, 2):
        add_lora(model, LoraConfig(r=2))
        save_lora(shaken(model, number), tmp_path / str(number))
        merge_lora(model)
    assert len(set(model.config.lorafit_merged)) == 2
    add_lora(model, LoraConfig(r=2))
    save_lora(shaken(model, 3), tmp_path / "3")
    load_lora(model, tmp_path / "3")
    assert merged_digests(model) == model.config.lorafit_merged


def test_a_module_trained_in_full_alone_can_be_put_in_twice(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(targets=(), train_modules=("norm",)))
    save_lora(shaken(model), tmp_path)
    merge_lora(model)
    assert merged_digests(model) == []
    before = logits(model, token_ids())
    load_lora(model, tmp_path, force_base=True)
    assert torch.equal(logits(model, token_ids()), before)


def test_the_digest_depends_on_names_shapes_and_values_alone() -> None:
    A, B = torch.randn(2, 6), torch.randn(6, 2)
    tensors = {"a.lora_A.weight": A, "a.lora_B.weight": B, "norm.weight": torch.ones(2)}
    digest = adapter_digest(tensors)
    assert digest == adapter_digest({name: t.double() for name, t in reversed(tensors.items())})
    assert digest == adapter_digest(tensors | {"norm.weight": torch.zeros(2)})
    for change in ({"a.lora_A.weight": A + 1e-3}, {"a.lora_A.weight": A.view(6, 2)}, {"b.lora_A.weight": A}):
        assert digest != adapter_digest(tensors | change)
    assert adapter_digest({"norm.weight": torch.ones(2)}) is None


@pytest.mark.parametrize("noted", [None, "text", 3, {"a": 1}, [1, None]])
def test_a_configuration_that_says_nonsense_is_passed_over(noted: Any, tiny: Tiny, shaken: Tiny) -> None:
    model = tiny("llama")
    model.config.lorafit_merged = noted
    assert merged_digests(model) == []
    add_lora(model, LoraConfig(r=2))
    merge_lora(shaken(model))
    assert len(merged_digests(model)) == 1


def test_a_failed_merge_notes_nothing(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2))
    model.model.layers[0].mlp.up_proj.lora_B.weight.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError):
        merge_lora(model)
    assert merged_digests(model) == []
