"""Merging from files to files: the same bytes as in memory, with memory for one tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorafit import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from lorafit.adapter import merge
from lorafit.adapter.merge import merge_files, reason_against
from lorafit.errors import AdapterError, DiskError, ModelError, NumericError
from lorafit.files import MANIFEST, damaged
from lorafit.model.load import load_skeleton

Tiny = Callable[..., Any]
Folders = tuple[Path, Path]
TIED = {"tie_word_embeddings": True}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {}, {"r": 3, "alpha": 5, "rslora": True, "rank_pattern": {"up_proj": 7}}, "float32"),
    ("llama", {}, {"variant": "dora"}, "bfloat16"),
    ("llama", TIED, {"targets": ("embed_tokens", "q_proj")}, "float32"),
    ("llama", TIED, {"targets": ("lm_head", "q_proj")}, "bfloat16"),
    ("llama", TIED, {"targets": ("q_proj",), "train_modules": ("lm_head", "model.norm")}, "float32"),
    ("llama", TIED, {}, "float16"),
    ("gpt2", {}, {}, "float32"),
    ("gpt_neox", {}, {}, "float64"),
    ("mixtral", {}, {"targets": ("q_proj", "o_proj")}, "bfloat16"),
    ("gemma2", {}, {}, "float32"),
    ("opt", {}, {}, "float32"),
]


@pytest.fixture
def made(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., Folders]:
    """`made(family, size, **config)`: folders of a base in several files, and of an adapter that was trained on it."""

    def make(family: str = "llama", size: dict[str, Any] | None = None, **config: Any) -> Folders:
        model = tiny(family, **(size or {}))
        model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
        add_lora(model, LoraConfig(**config))
        return tmp_path / "base", save_lora(shaken(model), tmp_path / "adapter")

    return make


def in_memory(base: Path, adapter: Path, out: Path, dtype: str, **saving: Any) -> dict[str, bytes]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    load_lora(model, adapter)
    merge_lora(model).save_pretrained(out, **saving)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


@pytest.mark.parametrize(("family", "size", "config", "dtype"), CASES, ids=lambda value: str(value)[:30])
def test_the_same_bytes_as_in_memory(
    made: Tiny, tmp_path: Path, family: str, size: dict[str, Any], config: dict[str, Any], dtype: str
) -> None:
    base, adapter = made(family, size, **config)
    merge_files(load_skeleton(base, dtype=dtype), base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == in_memory(base, adapter, tmp_path / "memory", dtype)
    assert damaged(tmp_path / "out") == []
    with pytest.raises(AdapterError, match="already merged into this model"):
        load_lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapter, force_base=True)


def test_several_files_and_their_index(made: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made()
    monkeypatch.setattr(merge, "LARGEST_FILE", "12KB")
    merge_files(load_skeleton(base, dtype="float32"), base, adapter, tmp_path / "out")
    expected = in_memory(base, adapter, tmp_path / "memory", "float32", max_shard_size="12KB")
    assert "model.safetensors.index.json" in expected
    assert contents(tmp_path / "out") == expected


def test_memory_is_that_of_a_tensor(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("this system does not tell the peak of a process's memory")
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "num_key_value_heads": 4}
    model = tiny("llama", **size)
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    add_lora(model, LoraConfig(r=4))
    save_lora(shaken(model), tmp_path / "adapter")
    del model

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    peak.write_text("5")
    before = kib("VmRSS")
    merge_files(
        load_skeleton(tmp_path / "base", dtype="float32"), tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    )
    grown = (kib("VmHWM") - before) * 1024
    assert total > 80e6
    assert grown < total / 2  # a few tensors of 4 MB, and what is loaded when it is first used


def test_nothing_is_written_where_a_sum_is_none(made: Tiny, tmp_path: Path) -> None:
    base, adapter = made(targets=("q_proj",))
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * 1e20 for name, value in held.items()}, adapter / "adapter_model.safetensors")
    (adapter / MANIFEST).unlink()
    with pytest.raises(NumericError, match=r"NaN or infinity into .*q_proj; nothing was written"):
        merge_files(load_skeleton(base, dtype="float16"), base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_another_base_is_refused(made: Tiny, tmp_path: Path) -> None:
    base, adapter = made()
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = next(path for path in other.glob("model-*") if any("q_proj" in name for name in load_file(path)))
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="made on another base model"):
        merge_files(load_skeleton(other, dtype="float32"), other, adapter, tmp_path / "out")
    merge_files(load_skeleton(other, dtype="float32"), other, adapter, tmp_path / "out", force_base=True)
    with pytest.raises(DiskError, match="choose a new folder"):
        merge_files(load_skeleton(base, dtype="float32"), base, adapter, tmp_path / "out")


def test_what_has_to_be_merged_in_memory(made: Tiny, tmp_path: Path, tiny: Tiny) -> None:
    base, adapter = made("gpt2")
    skeleton = load_skeleton(base, dtype="float32")
    assert reason_against(skeleton, base, adapter) is None
    held = {name: value for file in base.glob("*.safetensors") for name, value in load_file(file).items()}

    def folder(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    short = folder("short", {name.removeprefix("transformer."): value for name, value in held.items()})
    assert "another name for transformer.h.0.attn.c_attn.weight" in str(reason_against(skeleton, short, adapter))
    twice = folder("twice", {**held, "lm_head.weight": held["transformer.wte.weight"].clone()})
    assert "twice" in str(reason_against(skeleton, twice, adapter))
    less = folder("less", {name: value for name, value in held.items() if "ln_f" not in name})
    assert "its files lack transformer.ln_f" in str(reason_against(skeleton, less, adapter))
    (tmp_path / "bin").mkdir()
    assert "weights in safetensors" in str(reason_against(skeleton, tmp_path / "bin", adapter))
    skeleton.config.quantization_config = {"quant_method": "fp8"}
    assert reason_against(skeleton, base, adapter) == "its weights are quantised"
    with pytest.raises(ModelError, match="cannot be merged from its files: its weights are quantised"):
        merge_files(skeleton, base, adapter, tmp_path / "out")


def test_an_index_is_not_believed(made: Tiny, tmp_path: Path) -> None:
    base, adapter = made()
    skeleton = load_skeleton(base, dtype="float32")
    index = base / "model.safetensors.index.json"
    for weight_map in ({"a": "../adapter/adapter_model.safetensors"}, {"a": 5}, {}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "not a readable index of shards" in str(reason_against(skeleton, base, adapter))
