"""What other programs do with an adapter: every rule said for what it is about, and for nothing else."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit import LoraConfig, add_lora, save_lora
from lorafit.adapter.check import RULES, VLLM_RANKS, check_adapter, lora_rank_flag
from lorafit.errors import AdapterError, UsageError

Tiny = Callable[..., Any]
PLAIN = {"r": 8, "alpha": 16, "targets": ("q_proj", "v_proj")}
# A change of the configuration, and which program says what of it.
FIELDS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"use_dora": True}, {"vllm": "rejects", "sglang": "rejects", "llama.cpp": "rejects", "tgi": "ignores"}),
    ({"use_rslora": True}, {"sglang": "ignores", "llama.cpp": "ignores"}),
    ({"alpha_pattern": {"q_proj": 3}}, {"vllm": "needs", "sglang": "needs", "llama.cpp": "ignores", "tgi": "ignores"}),
    ({"alpha_pattern": {"q_proj": 16}}, {"vllm": "needs", "sglang": "needs"}),
    (
        {"alpha_pattern": {"q_proj": 3, "self_attn.q_proj": 4}},
        {"peft": "ignores", "vllm": "needs", "sglang": "needs", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    ({"rank_pattern": {"q_proj": 8}}, {"vllm": "needs", "sglang": "needs"}),
    ({"modules_to_save": ["lm_head"]}, {"vllm": "rejects", "sglang": "ignores", "tgi": "ignores"}),
    ({"modules_to_save": ["score"]}, {"sglang": "ignores", "tgi": "ignores"}),
    ({"bias": "all"}, {"vllm": "rejects", "sglang": "ignores", "llama.cpp": "rejects", "tgi": "ignores"}),
    ({"lora_bias": True}, {"vllm": "rejects", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"}),
    (
        {"init_lora_weights": "pissa"},
        {"peft": "needs", "vllm": "rejects", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    (
        {"init_lora_weights": "lora_ga"},
        {"peft": "ignores", "vllm": "ignores", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    (
        {"init_lora_weights": "pissa_niter_16"},
        {"peft": "ignores", "vllm": "rejects", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    (
        {"init_lora_weights": "corda"},
        {"peft": "rejects", "vllm": "rejects", "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"},
    ),
    ({"init_lora_weights": "gaussian"}, {}),
    ({"init_lora_weights": "mica"}, {}),
    ({"alora_invocation_tokens": [1, 2]}, {"vllm": "rejects", "sglang": "ignores", "tgi": "ignores"}),
    *(
        ({name: value}, {"vllm": vllm, "sglang": "ignores", "llama.cpp": "ignores", "tgi": "ignores"})
        for name, value, vllm in (
            ("layer_replication", [[0, 1]], "rejects"),
            ("use_bdlora", {"n": 1}, "rejects"),
            ("use_qalora", True, "rejects"),
            ("kasa_config", {"n": 1}, "ignores"),
        )
    ),
    ({"trainable_token_indices": [5]}, {"sglang": "ignores", "tgi": "ignores"}),
    ({"target_modules": ".*q_proj"}, {"sglang": "rejects"}),
    ({"target_modules": None}, {"sglang": "rejects"}),
    ({"fan_in_fan_out": True}, {"llama.cpp": "rejects"}),
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
    assert any(what.startswith("layers of other kinds than q_proj") for _, what in said("tgi"))
    for block in (0, 1):  # of two: that there is another is only in the note about the base
        folder = saved(layers=(block,))
        assert ("ignores", "layers adapted in some blocks only") in said("tgi")
    folder = saved(r=24)
    assert ("needs", "--max-lora-rank 32 (rank 24)") in said("vllm")
    assert ("ignores", "that r is 24") in said("tgi")
    folder = saved(r=24, targets=("q_proj",))
    assert said("tgi") == []  # one kind is the first
    folder = saved(r=40, rank_pattern={"q_proj": 2, "v_proj": 2})
    assert ("needs", "--max-lora-rank 64 (rank 40)") in said("vllm")  # it compares the configuration's r, used or not
    folder = saved(rank_pattern={"q_proj": 2})
    assert ("ignores", "rank_pattern") in said("tgi")
    folder = saved(train_modules=("lm_head",))
    assert ("rejects", "tensors that are no LoRA factors") in said("llama.cpp")
    folder = saved(train_modules=("model.norm",))
    assert said("llama.cpp") == [("ignores", "norms trained in full")]
    folder = saved()
    (folder / "added_tokens.json").write_text('{"<call>": 99}')
    assert [verdict for verdict, _ in said("sglang")] == ["needs"]
    folder = saved(train_modules=("lm_head",))

    held = load_file(folder / "adapter_model.safetensors")
    held["base_model.model.x.trainable_tokens_delta"] = torch.ones(2)
    save_file(held, folder / "adapter_model.safetensors")
    assert ("rejects", "tensors that are no LoRA factors") in said("vllm")
    folder = saved(variant="dora")
    assert ("rejects", "DoRA (use_dora and its magnitude vectors)") in said("vllm")


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
def test_a_field_that_is_not_there(saved: Tiny, name: str) -> None:
    """PEFT takes its default."""
    folder = saved()
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw[name]
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    found = {program: [str(said) for said in check_adapter(folder, program)] for program in RULES}  # type: ignore[arg-type]
    for program in ("vllm", "sglang", *(("llama.cpp",) if name == "lora_alpha" else ())):
        assert found[program][0].startswith(f"rejects: {name} is not in adapter_config.json")


def test_what_peft_makes_of_each_start(saved: Tiny, tiny: Tiny) -> None:
    """That some move the base when they are loaded, one is refused and the others are plain: PEFT itself says so."""
    folder, base = saved(), tiny("llama")
    warnings.simplefilter("ignore")  # that EVA's settings are not there
    raw = json.loads((folder / "adapter_config.json").read_text())
    for init in (True, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "corda", "lora_ga"):
        (folder / "adapter_config.json").write_text(json.dumps(raw | {"init_lora_weights": init}))
        verdicts = {found.verdict for found in check_adapter(folder, "peft")}
        try:
            loaded = peft.PeftModel.from_pretrained(tiny("llama"), folder)
        except ValueError:
            assert verdicts == {"rejects"}, init
            continue
        q_proj = loaded.base_model.model.model.layers[0].self_attn.q_proj
        moved = not torch.equal(q_proj.base_layer.weight, base.model.layers[0].self_attn.q_proj.weight)
        assert moved == bool(verdicts) or init == "lora_ga", init  # which moved it in training


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
    with pytest.raises(AdapterError, match="peft_type is 'LOHA'; lorafit opens LORA adapters"):
        check_adapter(folder, "vllm")
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"modules_to_save": 5}))
    with pytest.raises(AdapterError, match="modules_to_save=5: a list of at most"):
        check_adapter(folder, "vllm")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": -1}')
    with pytest.raises(AdapterError, match="an adapter for mlx-lm, which alone reads it"):
        check_adapter(folder, "vllm")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json here"):
        check_adapter(tmp_path, "vllm")
