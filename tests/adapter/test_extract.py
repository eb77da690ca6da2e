"""The adapter taken out of a fine-tuned model, read shard by shard: held to the model that was merged."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit import LoraConfig, add_lora, load_lora, merge_lora
from lorafit.adapter.extract import extract_adapter
from lorafit.errors import ModelError, NumericError
from lorafit.model.load import load_skeleton

Tiny = Callable[..., Any]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def tuned(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """`tuned(family, **config)`: folders of a base, in several shards, and of the base with a trained adapter in it."""

    def make(family: str = "llama", **config: Any) -> tuple[Path, Path, Any]:
        model = tiny(family)
        model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
        layers = ATTENTION if family == "mixtral" else "all-linear"  # experts have no one A and B
        add_lora(model, LoraConfig(**{"r": 4, "targets": layers, **config}))
        merge_lora(shaken(model))
        model.save_pretrained(tmp_path / "tuned")
        return tmp_path / "base", tmp_path / "tuned", model

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_what_was_low_rank_comes_back(tuned: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path, family: str) -> None:
    base, folder, model = tuned(family)
    assert len(list(base.glob("model-*.safetensors"))) > 1
    outcome = extract_adapter(load_skeleton(base, dtype="float32"), base, folder, tmp_path / "out", rank=4)
    assert outcome.error < 1e-5
    assert outcome.left_out == ()
    again = tiny(family)
    load_lora(again, tmp_path / "out")  # also: the fingerprint is that of the base
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=2e-5)


def test_a_full_fine_tuning_is_cut_and_the_rest_is_named(tiny: Tiny, tmp_path: Path) -> None:
    base, model = tiny("llama"), tiny("llama")
    base.save_pretrained(tmp_path / "base")
    changed = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        for name in (*changed, "model.norm", "lm_head"):
            weight = model.get_submodule(name).weight
            weight.add_(0.01 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    skeleton = load_skeleton(tmp_path / "base", dtype="float32")
    outcome = extract_adapter(skeleton, tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert sorted(outcome.cuts) == changed
    assert outcome.left_out == ("lm_head.weight", "model.norm.weight")
    assert "changed, but not extracted: lm_head.weight, model.norm.weight" in str(outcome)
    for name, cut in outcome.cuts.items():
        delta = (model.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        rest = torch.linalg.svdvals(delta.double())[3:].square().sum()
        assert cut.lost == pytest.approx(float(rest), rel=1e-4)
        assert cut.pair.r == 3

    full = {"targets": ("q_proj", "up_proj", "lm_head"), "train_modules": ("model.norm",), "energy": 1.0}
    outcome = extract_adapter(skeleton, tmp_path / "base", tmp_path / "tuned", tmp_path / "full", **full)
    assert outcome.left_out == ()
    again = copy.deepcopy(base)
    load_lora(again, tmp_path / "full")
    merge_lora(again)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-6)


def test_what_cannot_be_extracted_is_refused(tuned: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    base, folder, model = tuned()
    skeleton = load_skeleton(base, dtype="float32")
    with pytest.raises(ModelError, match="no layer of it that LoRA could adapt differs"):
        extract_adapter(skeleton, base, base, tmp_path / "out", rank=4)
    tiny("llama", hidden_size=16).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"\(32, 32\) in a plain floating-point type is needed"):
        extract_adapter(skeleton, base, tmp_path / "small", tmp_path / "out", rank=4)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NumericError, match="NaN or infinity in model"):
        extract_adapter(skeleton, base, tmp_path / "nan", tmp_path / "out", rank=4)
    sorted(base.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(ModelError, match="no model-0"):
        extract_adapter(skeleton, base, folder, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
