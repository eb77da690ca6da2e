"""What other programs do with an adapter: every rule said for what it is about, and for nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit import LoraConfig, add_lora, save_lora
from lorafit.adapter.check import RULES, VLLM_RANKS, check_adapter, lora_rank_flag
from lorafit.errors import AdapterError, UsageError

Tiny = Callable[..., Any]
PLAIN = {"r": 4, "alpha": 8, "targets": ("q_proj", "v_proj")}
# A change of the configuration, and which program says what of it.
FIELDS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"use_dora": True}, {"vllm": "rejects", "sglang": "rejects", "llama.cpp": "rejects", "tgi": "ignores"}),
    ({"use_rslora": True}, {"sglang": "ignores", "llama.cpp": "ignores"}),
    ({"alpha_pattern": {"q_proj": 3}}, {"vllm": "needs", "sglang": "needs", "llama.cpp": "ignores", "tgi": "ignores"}),
    ({"alpha_pattern": {"q_proj": 8}}, {"vllm": "needs", "sglang": "needs"}),
    (
        {"alpha_pattern": {"q_proj": 3, "self_attn.q_proj": 4}},
        {"peft": "ignores", "vllm": "needs", "sglang": "needs", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    ({"rank_pattern": {"q_proj": 4}}, {"vllm": "needs", "sglang": "needs"}),
    ({"modules_to_save": ["lm_head"]}, {"vllm": "rejects", "sglang": "ignores", "tgi": "ignores"}),
    ({"modules_to_save": ["score"]}, {"sglang": "ignores", "tgi": "ignores"}),
    ({"bias": "all"}, {"vllm": "rejects", "sglang": "ignores", "tgi": "ignores"}),
    ({"lora_bias": True}, {"vllm": "rejects"}),
    (
        {"init_lora_weights": "pissa"},
        {"peft": "ignores", "vllm": "rejects", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    (
        {"init_lora_weights": "lora_ga"},
        {"peft": "ignores", "vllm": "ignores", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    ({"init_lora_weights": "gaussian"}, {}),
    ({"alora_invocation_tokens": [1, 2]}, {"vllm": "rejects", "sglang": "ignores"}),
    ({"layer_replication": [[0, 1]]}, {"vllm": "rejects", "sglang": "ignores"}),
    ({"use_bdlora": {"n": 1}}, {"vllm": "rejects"}),
    ({"use_qalora": True}, {"vllm": "rejects"}),
    ({"target_modules": ".*q_proj"}, {"sglang": "rejects"}),
    ({"target_modules": None}, {"sglang": "rejects"}),
    ({"base_model_name_or_path": None}, {"llama.cpp": "needs"}),
]


@pytest.fixture
def saved(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., Path]:
    def make(**config: Any) -> Path:
        model = tiny("llama")
        add_lora(model, LoraConfig(**{**PLAIN, **config}))
        return save_lora(shaken(model), tmp_path / "adapter", base_model="org/base")

    return make


@pytest.mark.parametrize(("change", "expected"), FIELDS, ids=lambda value: str(value)[:50])
def test_each_field_is_judged(saved: Tiny, change: dict[str, Any], expected: dict[str, str]) -> None:
    folder = saved()
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | change))
    found = {program: check_adapter(folder, program) for program in RULES}  # type: ignore[arg-type]
    assert {program: findings[0].verdict for program, findings in found.items() if findings} == expected
    assert all(finding.source in str(finding) for findings in found.values() for finding in findings)


def test_a_plain_adapter_is_taken_everywhere(saved: Tiny) -> None:
    folder = saved()
    assert {program: check_adapter(folder, program) for program in RULES} == {  # type: ignore[arg-type]
        program: [] for program in RULES
    }


def test_what_the_tensors_show(saved: Tiny, tmp_path: Path) -> None:
    def said(program: Any) -> list[tuple[str, str]]:
        return [(found.verdict, found.what.split(":")[0]) for found in check_adapter(folder, program)]

    folder = saved(targets=("q_proj", "embed_tokens", "lm_head"))
    assert ("needs", "LoRA on an embedding") in said("vllm")
    assert ("needs", "LoRA on the output head") in said("vllm")
    assert ("rejects", "LoRA on the output head") in said("llama.cpp")
    assert ("ignores", "LoRA on an embedding") in said("tgi")
    folder = saved(layers=(1,))
    assert ("ignores", "layers adapted in some blocks only") in said("tgi")
    folder = saved(r=24)
    assert ("needs", "--max-lora-rank 32 (rank 24)") in said("vllm")
    folder = saved(rank_pattern={"q_proj": 2})
    assert ("ignores", "rank_pattern") in said("tgi")
    folder = saved(train_modules=("lm_head",))
    assert ("rejects", "tensors that are no LoRA factors") in said("llama.cpp")

    held = load_file(folder / "adapter_model.safetensors")
    held["base_model.model.x.trainable_tokens_delta"] = torch.ones(2)
    save_file(held, folder / "adapter_model.safetensors")
    assert ("rejects", "tensors that are no LoRA factors") in said("vllm")
    folder = saved(variant="dora")
    assert ("rejects", "DoRA (use_dora and its magnitude vectors)") in said("vllm")


def test_stacks_of_experts_are_no_layers_of_a_large_rank(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("mixtral")
    add_lora(model, LoraConfig(r=8))
    save_lora(model, tmp_path / "adapter", base_model="org/base")
    said = {program: [str(found) for found in check_adapter(tmp_path / "adapter", program)] for program in RULES}  # type: ignore[arg-type]
    assert said["vllm"][-1].startswith("needs: LoRA on stacks of experts: model.layers.0.mlp.experts")
    assert not any("--max-lora-rank" in line for line in said["vllm"])
    assert said["llama.cpp"][0].startswith("rejects: LoRA on stacks of experts")
    assert any(line.startswith("ignores: LoRA on stacks of experts") for line in said["tgi"])


def test_vllms_ranks() -> None:
    assert [lora_rank_flag(n) for n in (1, 2, 8, 17, 300, 512, 513)] == [1, 8, 8, 32, 320, 512, None]
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)


def test_what_cannot_be_checked_is_refused(saved: Tiny, tmp_path: Path) -> None:
    folder = saved()
    with pytest.raises(UsageError, match="unknown program 'vlm' \\(did you mean 'vllm'"):
        check_adapter(folder, "vlm")  # type: ignore[arg-type]
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"peft_type": "LOHA"}))
    with pytest.raises(AdapterError, match="peft_type is 'LOHA'; only LORA adapters"):
        check_adapter(folder, "vllm")
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"modules_to_save": 5}))
    with pytest.raises(AdapterError, match="modules_to_save=5: a list of at most"):
        check_adapter(folder, "vllm")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json here"):
        check_adapter(tmp_path, "vllm")
