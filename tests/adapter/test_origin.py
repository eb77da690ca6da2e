"""Where an adapter comes from: what only our own files can tell, and what is believed of everybody else's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorafit import LoraConfig, add_lora, load_lora, save_lora
from lorafit.adapter.peft_config import CONFIG
from lorafit.adapter.peft_format import WEIGHTS
from lorafit.errors import AdapterError
from lorafit.files import MANIFEST
from lorafit.lora import inject

Tiny = Callable[..., Any]


@pytest.fixture
def adapter(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Path:
    return saved(tiny, shaken, tmp_path / "adapter")


def saved(tiny: Tiny, shaken: Tiny, path: Path, seed: int = 3, **changes: Any) -> Path:
    model = tiny("llama")
    add_lora(model, LoraConfig(**({"r": 4, "alpha": 8, "targets": ("q_proj", "v_proj")} | changes)))
    return save_lora(shaken(model, seed), path)


def as_others_write_it(adapter: Path, **more: Any) -> Path:
    """Without our notes and our manifest, and with `more` tensors."""
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | more, adapter / WEIGHTS, metadata={"format": "pt"})
    (adapter / MANIFEST).unlink()
    return adapter


def edit(adapter: Path, **fields: Any) -> None:
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | fields))


# --- what was saved together ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"alpha": 9}, {"rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"alpha": 4, "alpha_pattern": {".*0.*": 8}}],
)
@pytest.mark.parametrize("mixed", [CONFIG, WEIGHTS])
def test_two_files_of_different_saves_are_noticed(
    mixed: str, changes: dict[str, Any], adapter: Path, tiny: Tiny, shaken: Tiny, tmp_path: Path
) -> None:
    """Every tensor fits: the two differ in the scale alone."""
    other = saved(tiny, shaken, tmp_path / "other", **changes)
    shutil.copy(other / mixed, adapter / mixed)
    (adapter / MANIFEST).unlink()
    with pytest.raises(AdapterError, match=f"{CONFIG} and {WEIGHTS} do not come from one save"):
        load_lora(tiny("llama"), adapter)


def test_harmless_edits_and_other_words_for_the_same_are_no_other_save(adapter: Path, tiny: Tiny) -> None:
    for fields in (
        {"base_model_name_or_path": "elsewhere", "inference_mode": False, "revision": "main", "peft_version": "9.9"},
        {"lora_dropout": 0.5, "task_type": None, "eva_config": {"rho": 2}, "init_lora_weights": "gaussian"},
        {"target_modules": ["v_proj", "q_proj"], "lora_alpha": 8.0, "rank_pattern": {"k_proj": 2}},
        {"target_modules": r".*\.(q|v)_proj"},
        {"r": 1, "rank_pattern": {".*": 4}, "lora_alpha": 1, "alpha_pattern": {".*q_proj": 8, "v_proj": 8}},
    ):
        edit(adapter, **fields)
        assert len(load_lora(tiny("llama"), adapter).targets) == 4


# --- the manifest -----------------------------------------------------------------------------------


def flip_a_bit_of_a_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("notes", ["ours", "none"])
def test_a_flipped_bit_in_a_value_is_noticed_by_the_manifest(notes: str, adapter: Path, tiny: Tiny) -> None:
    if notes == "none":  # the manifest alone says that the file is not what we saved
        save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata={"format": "pt"})
    else:
        flip_a_bit_of_a_value(adapter / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} .*: take the adapter from where .*, or delete {MANIFEST}"):
        load_lora(tiny("llama"), adapter)
    (adapter / MANIFEST).unlink()
    load_lora(tiny("llama"), adapter)


def test_a_damaged_manifest_of_ours_is_noticed(adapter: Path, tiny: Tiny) -> None:
    (adapter / MANIFEST).write_text((adapter / MANIFEST).read_text()[:-9])
    with pytest.raises(AdapterError, match=f"{MANIFEST} is damaged"):
        load_lora(tiny("llama"), adapter)


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": {}}', '{"name": "an app", "version": 3}', "no JSON", ""])
def test_another_programs_manifest_is_no_concern(text: str, adapter: Path, tiny: Tiny) -> None:
    as_others_write_it(adapter)
    (adapter / MANIFEST).write_text(text)
    load_lora(tiny("llama"), adapter)


# --- copies of the base, and models without values ----------------------------------------------------


def test_a_copied_base_weight_is_compared_unless_the_base_is_forced(adapter: Path, tiny: Tiny) -> None:
    name = "model.layers.0.self_attn.q_proj"
    own = tiny("llama").get_submodule(name).weight.detach()
    key = f"base_model.model.{name}.base_layer.weight"
    as_others_write_it(adapter, **{key: own.clone()})
    load_lora(tiny("llama"), adapter)
    for other in (own + 1e-3, own[:4].clone()):
        save_file(load_file(adapter / WEIGHTS) | {key: other}, adapter / WEIGHTS)
        with pytest.raises(AdapterError, match="1 tensors copied from another base model"):
            load_lora(tiny("llama"), adapter)
        model = tiny("llama")
        load_lora(model, adapter, force_base=True)
        assert torch.equal(model.get_submodule(name).base_layer.weight, own)


def test_a_model_without_values_takes_what_fits(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    """`inspect` looks at a model without loading it: there is nothing to compare with."""
    ours = saved(tiny, shaken, tmp_path / "ours")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert any(".base_layer." in key for key in load_file(tmp_path / "theirs" / WEIGHTS))
    for path, count in ((ours, 4), (tmp_path / "theirs", 3)):
        with torch.device("meta"):
            model = tiny("llama")
        assert len(load_lora(model, path).targets) == count


# --- values -----------------------------------------------------------------------------------------


def test_a_value_beyond_the_models_precision_is_refused(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    path = saved(tiny, shaken, tmp_path / "adapter", train_modules=("model.norm",))
    tensors = load_file(path / WEIGHTS)
    tensors["base_model.model.model.norm.weight"][0] = 1e6
    save_file(tensors, path / WEIGHTS)
    (path / MANIFEST).unlink()
    load_lora(tiny("llama"), path)
    with pytest.raises(AdapterError, match=r"1 tensors NaN or infinite: model\.norm\.weight"):
        load_lora(tiny("llama").half(), path)


def test_a_whole_rank_may_be_written_as_a_fraction(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4.0))  # type: ignore[arg-type]
    save_lora(model, tmp_path)
    assert {target.r for target in load_lora(tiny("llama"), tmp_path).targets} == {4}


def test_a_weight_with_two_names_in_a_module_trained_in_full_is_saved(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        block[1].weight = block[0].weight
        return nn.Sequential(block, nn.Linear(3, 3))

    model = made()
    add_lora(model, LoraConfig(targets=("1",), train_modules=("0",)))
    model[0].trained[0].weight.data += 1
    save_lora(model, tmp_path)
    again = made()
    load_lora(again, tmp_path)
    x = torch.randn(2, 3)
    assert torch.equal(again(x), model(x))


def test_the_same_adapter_is_the_same_bytes(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(train_modules=("norm",)))
    made = [save_lora(model, tmp_path / str(number)) for number in range(3)]
    for name in (WEIGHTS, CONFIG, MANIFEST):
        assert len({(path / name).read_bytes() for path in made}) == 1


def test_a_refused_adapter_leaves_the_one_in_use(adapter: Path, tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    load_lora(model, adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = inject.attached(model)
    other = saved(tiny, shaken, tmp_path / "other", seed=5, alpha=2)
    flip_a_bit_of_a_value(other / WEIGHTS)
    with pytest.raises(AdapterError):
        load_lora(model, other)
    assert inject.attached(model) is plan
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
