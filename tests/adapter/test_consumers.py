"""The programs that adapters are exported for, where they are at hand: what is written is what they read.

mlx-lm is used where it is installed (`pip install "mlx[cpu]" mlx-lm`), llama.cpp's converter where LLAMA_CPP names a
checkout.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

from lorafit import LoraConfig, add_lora, save_lora
from lorafit.adapter.export import GGUF_FAMILIES, MLX_SAME_NAMES, export_adapter

Tiny = Callable[..., Any]
MIXTURE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
# What a family needs beyond the sizes of conftest.py; windows are as long as the text, which not all programs have.
SIZES: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo3": {"num_hidden_layers": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2_moe": MIXTURE,
    "qwen3_moe": {**MIXTURE, "head_dim": 8},
    "stablelm": {"partial_rotary_factor": 0.5},
    **{name: {"head_dim": 8} for name in ("ernie4_5", "gemma", "glm", "glm4", "helium", "hunyuan_v1_dense")},
    **{name: {"head_dim": 8} for name in ("ministral3", "seed_oss")},
}
WINDOWS = ("gemma2", "gemma3_text", "mistral", "starcoder2")
UNEVEN = {"r": 6, "alpha": 3, "rslora": True, "rank_pattern": {"^.*0.*$": 2}}


@pytest.fixture
def made(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """`made(family)`: a model with an adapter, saved as `base` and `adapter`."""

    def make(family: str, **config: Any) -> Any:
        model = tiny(family, **SIZES.get(family, {}), **({"sliding_window": 64} if family in WINDOWS else {}))
        model.save_pretrained(tmp_path / "base")
        add_lora(model, LoraConfig(**UNEVEN, **config))
        save_lora(shaken(model), tmp_path / "adapter", base_model="org/base")
        return model

    return make


# --- mlx-lm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MLX_SAME_NAMES)
def test_mlx_lm_has_the_logits(made: Tiny, token_ids: Tiny, tmp_path: Path, family: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    from mlx_lm.tuner.utils import load_adapters  # type: ignore[import-not-found]

    mx.set_default_device(mx.cpu)
    model = made(family)
    _in_older_words(tmp_path / "base" / "config.json")
    export_adapter(tmp_path / "adapter", "mlx", tmp_path / "mlx")
    theirs = load_adapters(utils.load_model(tmp_path / "base", lazy=False)[0], str(tmp_path / "mlx"))
    found = torch.tensor(numpy.array(theirs(mx.array(token_ids().numpy())).astype(mx.float32)))
    # GELU and the rotary angles are approximated otherwise in some families; the adapter moves logits by 0.1 to 0.7.
    torch.testing.assert_close(found, model(token_ids()).logits, rtol=0, atol=5e-5)


def _in_older_words(file: Path) -> None:
    """What mlx-lm reads from config.json where transformers 4 had it."""
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    older = {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "rope_scaling": None,
        "head_dim": 8,
    }
    file.write_text(json.dumps({**older, **config}))


# --- llama.cpp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(GGUF_FAMILIES.keys() - {"gpt2"}))
def test_llama_cpps_converter_writes_the_same(made: Tiny, tmp_path: Path, family: str) -> None:
    checkout = os.environ.get("LLAMA_CPP")
    if not checkout:
        pytest.skip("LLAMA_CPP does not name a checkout of llama.cpp")
    attention = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}  # experts have no one A and B
    made(family, **(attention if family in ("mixtral", "qwen2_moe", "qwen3_moe") else {}))
    export_adapter(tmp_path / "adapter", "peft", tmp_path / "peft")
    export_adapter(tmp_path / "adapter", "gguf", tmp_path / "gguf")
    theirs = tmp_path / "theirs.gguf"
    command = [sys.executable, Path(checkout) / "convert_lora_to_gguf.py", "--base", tmp_path / "base"]
    ran = subprocess.run([*command, tmp_path / "peft", "--outfile", theirs], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-600:]
    one, two = (gguf.GGUFReader(path) for path in (tmp_path / "gguf" / "adapter.gguf", theirs))
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert one.fields[key].contents() == two.fields[key].contents()
    ours, expected = ({tensor.name: tensor for tensor in reader.tensors} for reader in (one, two))
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == expected[name].tensor_type
        numpy.testing.assert_array_equal(tensor.data, expected[name].data, name)
