"""Adapters added, cut and compared from their files: held to dense sums, and loaded here and in PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit import LoraConfig, LoraLinear, add_lora, load_lora, save_lora
from lorafit.adapter.algebra import combine_adapters, diff_adapters, resize_adapter
from lorafit.adapter.stored import read_stored, write_stored
from lorafit.errors import AdapterError, UsageError
from lorafit.lora import inject

Tiny = Callable[..., Any]
CONFIGS = {  # each another rank, scale, formula of the scale and choice of layers
    "plain": {"r": 4, "alpha": 8},
    "patterns": {
        "r": 6,
        "alpha": 3,
        "rslora": True,
        "rank_pattern": {"^.*0.*$": 2},
        "alpha_pattern": {"^.*1.*$": 11},
    },
    "few": {"r": 3, "alpha": 1, "layers": (1,)},
}


@pytest.fixture
def saved(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """`saved("name", seed, family, **config)`: a trained adapter on disk."""

    def make(name: str, seed: int = 1, family: str = "llama", **config: Any) -> Path:
        model = tiny(family)
        add_lora(model, LoraConfig(**config))
        return save_lora(shaken(model, seed), tmp_path / name, base_model=f"tiny/{family}")

    return make


def deltas(model: Any, folder: Path) -> dict[str, Tensor]:
    """ΔW of every layer that the adapter in `folder` gives `model`, dense, in float64."""
    load_lora(model, folder)
    layers = {name: layer for name, layer in inject.wrappers(model) if isinstance(layer, LoraLinear)}
    found = {name: layer.double().delta().detach() for name, layer in layers.items()}
    inject.remove_lora(model)
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() <= rtol * expected[name].norm(), name


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_alone_tells_the_update_of_every_layer(saved: Tiny, tiny: Tiny, family: str, config: str) -> None:
    folder = saved("a", 1, family, **CONFIGS[config])
    close({n: p.delta().double() for n, p in read_stored(folder).pairs.items()}, deltas(tiny(family), folder))


def test_a_file_of_pefts_tells_it_too(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r".*(q_proj|embed_tokens|down_proj)",
        modules_to_save=["model.norm"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={"q_proj": 3},
    )
    theirs = shaken(peft.get_peft_model(tiny("llama", tie_word_embeddings=False), config))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = read_stored(tmp_path)
    assert stored.pairs["model.embed_tokens"].embedding
    assert list(stored.trained) == ["model.norm.weight"]
    with torch.no_grad():
        for name, pair in stored.pairs.items():
            dense = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(pair.delta(), dense.T if pair.embedding else dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "configuration says 5"),
        ({"modules_to_save": None}, "model.norm.weight is no part of a LoRA adapter"),
        ({"use_dora": True}, "instead of lora_A.weight, lora_B.weight, lora_magnitude_vector"),
    ],
)
def test_files_that_do_not_agree_are_refused(saved: Tiny, change: dict[str, Any], message: str) -> None:
    folder = saved("a", r=4, train_modules=("model.norm",), targets=("q_proj",))
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | change))
    with pytest.raises(AdapterError, match=message):
        read_stored(folder)


@pytest.mark.parametrize("change", [{"lora_alpha": 9}, {"use_rslora": True}])
def test_a_configuration_from_elsewhere_is_noticed_without_the_model(saved: Tiny, change: dict[str, Any]) -> None:
    folder = saved("a")
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | change))
    with pytest.raises(AdapterError, match="do not come from one save"):
        read_stored(folder)


@pytest.mark.parametrize("base", [5, [], {}, {"facts": 1, "values": {}}, {"facts": {}, "values": {"x": "!"}}])
def test_a_note_about_the_base_is_not_believed(saved: Tiny, base: Any) -> None:
    folder = saved("a")
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        note = json.loads(opened.metadata()["lorafit"])
    save_file(load_file(file), file, metadata={"format": "pt", "lorafit": json.dumps(note | {"base": base})})
    (folder / "manifest.json").unlink()
    with pytest.raises(AdapterError, match="its note about the base cannot be read"):
        read_stored(folder)


def test_an_adapter_of_modules_trained_in_full_alone(saved: Tiny, tmp_path: Path) -> None:
    folder = saved("a", targets=(), train_modules=("model.norm",))
    assert str(resize_adapter(folder, tmp_path / "same", rank=2)).endswith("0 layers, rank 0, exact")
    assert diff_adapters(folder, tmp_path / "same").distance == 0


def test_layers_are_named_by_endings_only_where_they_name_no_others(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    source = read_stored(saved("a", targets=("q_proj", "v_proj")))
    write_stored(tmp_path / "all", source.pairs, [source])
    assert read_stored(tmp_path / "all").config["target_modules"] == ["q_proj", "v_proj"]
    less = {name: pair for name, pair in source.pairs.items() if name != "model.layers.0.self_attn.q_proj"}
    write_stored(tmp_path / "less", less, [source])
    plan = load_lora(tiny("llama"), tmp_path / "less")
    assert {target.name for target in plan.targets} == less.keys()


# --- combine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_sum_is_exact(saved: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path, family: str) -> None:
    folders = [saved(name, seed, family, **config) for seed, (name, config) in enumerate(CONFIGS.items())]
    weights = [0.7, -0.2, 2.0]
    outcome = combine_adapters(folders, weights, tmp_path / "sum")
    parts = [deltas(tiny(family), folder) for folder in folders]
    expected = {
        name: sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part) for name in parts[0]
    }
    close(deltas(tiny(family), tmp_path / "sum"), expected)  # type: ignore[arg-type]
    assert "exact" in str(outcome)
    assert read_stored(tmp_path / "sum").config["base_model_name_or_path"] == f"tiny/{family}"

    model = tiny(family)
    load_lora(model, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "sum")
    torch.testing.assert_close(model(token_ids()).logits, theirs(token_ids()).logits, rtol=0, atol=1e-5)


def test_a_sum_cut_to_a_rank_says_what_it_lost(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    folders = [saved("a", 1, r=4), saved("b", 2, r=8, alpha=5)]
    exact = combine_adapters(folders, [1, 1], tmp_path / "exact")
    short = combine_adapters(folders, [1, 1], tmp_path / "short", rank=5)
    whole, part = (deltas(tiny("llama"), tmp_path / name) for name in ("exact", "short"))
    apart = sum((whole[name] - part[name]).square().sum() for name in whole)
    norm = sum(value.square().sum() for value in whole.values())
    assert short.error == pytest.approx(float((apart / norm) ** 0.5), rel=1e-5)  # type: ignore[operator]
    assert exact.error == 0
    assert {cut.pair.r for cut in short.cuts.values()} == {5}
    assert combine_adapters(folders, [1, 1], tmp_path / "long", rank=12).error < 1e-7


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_on_the_dense_update(saved: Tiny, tiny: Tiny, tmp_path: Path, method: Any) -> None:
    """With every value kept and one adapter both are the adapter itself; with two, what was lost is what is said."""
    folders = [saved("a", 1), saved("b", 2, r=3)]
    combine_adapters(folders[:1], [1.0], tmp_path / "one", method=method, density=1.0)
    close(deltas(tiny("llama"), tmp_path / "one"), deltas(tiny("llama"), folders[0]), rtol=1e-5)
    outcome = combine_adapters(folders, [1, 1], tmp_path / "two", method=method, density=0.3, rank=6)
    assert {cut.pair.r for cut in outcome.cuts.values()} == {6}
    assert 0.01 < outcome.error < 1
    assert "relative error" in str(outcome)


def test_embeddings_are_added_as_embeddings(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    folders = [saved("a", 1, targets=("embed_tokens",), r=2), saved("b", 2, targets=("embed_tokens", "q_proj"))]
    combine_adapters(folders, [1, 2], tmp_path / "sum")
    one, two = (deltas(tiny("llama"), folder) for folder in folders)
    expected = {name: one.get(name, 0) + 2 * value for name, value in two.items()}
    close(deltas(tiny("llama"), tmp_path / "sum"), expected)


def test_sums_that_are_not_defined_are_refused(saved: Tiny, tmp_path: Path, tiny: Tiny) -> None:
    plain = saved("plain")
    refused = {
        "a DoRA adapter cannot be added up": saved("dora", variant="dora"),
        "in full, which have no ΔW": saved("trained", train_modules=("model.norm",)),
        "made on another base model": saved("other", family="qwen2"),
    }
    for message, folder in refused.items():
        with pytest.raises(AdapterError, match=message):
            combine_adapters([plain, folder], [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="2 adapters, 1 weights"):
        combine_adapters([plain, plain], [1], tmp_path / "out")
    with pytest.raises(UsageError, match="unknown method"):
        combine_adapters([plain], [1], tmp_path / "out", method="linear")  # type: ignore[arg-type]


def test_other_shapes_are_refused_even_from_strangers(saved: Tiny, tmp_path: Path) -> None:
    one, two = saved("a", targets=("q_proj",)), saved("b", targets=("q_proj",))
    for folder, width in ((one, 32), (two, 30)):  # as PEFT would have written them: without a note of the base
        held = load_file(folder / "adapter_model.safetensors")
        cut = {n: (t[:, :width] if "lora_A" in n else t).contiguous() for n, t in held.items()}
        save_file(cut, folder / "adapter_model.safetensors")
        (folder / "manifest.json").unlink()
    with pytest.raises(AdapterError, match="belong to different base models"):
        combine_adapters([one, two], [1, 1], tmp_path / "out")


# --- resize and diff --------------------------------------------------------------------------------


def test_a_rank_above_all_changes_nothing(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    folder = saved("a", **CONFIGS["patterns"], train_modules=("model.norm",))
    outcome = resize_adapter(folder, tmp_path / "same", rank=6)
    close(deltas(tiny("llama"), tmp_path / "same"), deltas(tiny("llama"), folder))
    assert outcome.error == 0
    assert torch.equal(
        read_stored(tmp_path / "same").trained["model.norm.weight"], read_stored(folder).trained["model.norm.weight"]
    )


def test_a_padded_adapter_shrinks_to_what_it_is(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    """Twice the same adapter has twice the rank, and energy finds that half of it is nothing."""
    folder = saved("a", r=4)
    combine_adapters([folder, folder], [0.5, 0.5], tmp_path / "twice")
    outcome = resize_adapter(tmp_path / "twice", tmp_path / "once", energy=0.9999999)
    assert {cut.pair.r for cut in outcome.cuts.values()} == {4}
    close(deltas(tiny("llama"), tmp_path / "once"), deltas(tiny("llama"), folder))


def test_energy_gives_every_layer_its_own_rank(saved: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    folder = saved("a", r=8)
    outcome = resize_adapter(folder, tmp_path / "small", energy=0.9)
    assert len({cut.pair.r for cut in outcome.cuts.values()}) > 1
    whole, part = deltas(tiny("llama"), folder), deltas(tiny("llama"), tmp_path / "small")
    for name, value in whole.items():
        assert (value - part[name]).square().sum() <= 0.1001 * value.square().sum()
    for config in ({"rank": 0}, {"energy": 1.5}, {}):
        with pytest.raises(UsageError):
            resize_adapter(folder, tmp_path / "none", **config)
    with pytest.raises(AdapterError, match=r"cannot be resized.*lorafit merge.*lorafit extract"):
        resize_adapter(saved("dora", variant="dora"), tmp_path / "none", rank=2)


def test_a_difference_is_that_of_the_dense_updates(saved: Tiny, tiny: Tiny) -> None:
    one, two = saved("a", 1), saved("b", 2, **CONFIGS["few"])
    found = diff_adapters(one, two)
    first, second = (deltas(tiny("llama"), folder) for folder in (one, two))
    apart = sum((value - second.get(name, 0)).square().sum() for name, value in first.items())
    norms = [sum(v.square().sum() for v in side.values()) for side in (first, second)]
    assert found.distance == pytest.approx(float((apart / max(norms)) ** 0.5), rel=1e-6)
    assert "only in the first: model.layers.0" in str(found)


def test_the_same_update_in_other_words_has_no_difference(saved: Tiny, tmp_path: Path) -> None:
    folder = saved("a", **CONFIGS["patterns"])
    resize_adapter(folder, tmp_path / "other", energy=1.0)
    assert diff_adapters(folder, tmp_path / "other").distance < 1e-6
    assert str(diff_adapters(folder, folder)) == "relative difference of the updates: 0"
