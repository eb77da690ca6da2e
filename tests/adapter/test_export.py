"""Adapters for other programs: loaded back into PEFT, and read back tensor by tensor in the other formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lorafit import LoraConfig, add_lora, load_lora, save_lora
from lorafit.adapter.algebra import combine_adapters
from lorafit.adapter.check import check_adapter
from lorafit.adapter.export import export_adapter
from lorafit.adapter.extract import nearest_plain
from lorafit.errors import AdapterError, UsageError
from lorafit.files import damaged
from lorafit.lora import inject
from lorafit.model.load import load_skeleton

Tiny = Callable[..., Any]
UNEVEN = {
    "r": 6,
    "alpha": 3,
    "rslora": True,
    "rank_pattern": {"^.*0.*$": 2},
    "alpha_pattern": {"^.*1.*$": 11},
}


@pytest.fixture
def saved(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """`saved(family, **config)`: an adapter on disk, and the model that carries it."""

    def make(family: str = "llama", *, size: dict[str, Any] | None = None, **config: Any) -> tuple[Path, Any]:
        model = tiny(family, **(size or {}))
        add_lora(model, LoraConfig(**config))
        return save_lora(shaken(model), tmp_path / "adapter", base_model="org/base"), model

    return make


def deltas(model: Any) -> dict[str, Tensor]:
    return {name: layer.delta().detach() for name, layer in inject.wrappers(model)}  # type: ignore[operator]


# --- PEFT's folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_the_profile_has_the_logits_in_peft(saved: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path, to: Any) -> None:
    family = "llama" if to == "peft" else "qwen2"
    folder, model = saved(family, **UNEVEN)
    outcome = export_adapter(folder, to, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    r = 6 if to == "peft" else 8  # as it is, and as TGI would pad it
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["init_lora_weights"]) == (r, r, False, True)
    assert (raw["rank_pattern"], raw["alpha_pattern"], raw["modules_to_save"]) == ({}, {}, None)
    assert (raw["bias"], raw["task_type"], raw["base_model_name_or_path"]) == ("none", "CAUSAL_LM", "org/base")
    assert raw["target_modules"] == sorted(raw["target_modules"])
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert {shape[0] if "lora_A" in name else shape[1] for name, shape in shapes.items()} == {r}
    assert outcome.error == 0

    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "out")
    again = tiny(family)
    load_lora(again, tmp_path / "out")
    for loaded in (theirs, again):
        torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_moved_the_base_is_resolved(
    saved: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path, init: str
) -> None:
    """On the untouched base, and on another one it would show: the logits are those of the model that was trained."""
    folder, model = saved(init=init, r=3)
    export_adapter(folder, "vllm", tmp_path / "out")
    assert check_adapter(tmp_path / "out", "vllm") == []
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    torch.testing.assert_close(theirs(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("program", ["peft", "vllm", "sglang", "llama.cpp", "tgi"])
def test_no_program_has_anything_against_the_profile(saved: Tiny, tmp_path: Path, program: Any) -> None:
    folder, _ = saved(**UNEVEN)
    assert check_adapter(folder, program) or program == "peft"
    export_adapter(folder, "vllm", tmp_path / "out")
    assert check_adapter(tmp_path / "out", program) == []


def test_what_only_peft_reads_goes_to_peft_only(saved: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    folder, model = saved(targets=("embed_tokens", "q_proj"), train_modules=("model.norm",), **UNEVEN)
    export_adapter(folder, "peft", tmp_path / "out")
    again = tiny("llama")
    load_lora(again, tmp_path / "out")
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-5)
    for to in ("vllm", "mlx", "gguf"):
        with pytest.raises(AdapterError, match=r"model\.embed_tokens, model\.norm\.weight is no LoRA on"):
            export_adapter(folder, to, tmp_path / to)
    with pytest.raises(UsageError, match="did you mean 'gguf'"):
        export_adapter(folder, "guff", tmp_path / "ggml")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # though PEFT goes by them
def test_layers_that_are_named_by_their_weight(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    """As PEFT has to be told of linear layers in models with experts; servers read the list of modules."""
    by_weight = {"target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 2}}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj"], alpha_pattern={"v_proj": 3}, **by_weight)
    theirs = shaken(peft.get_peft_model(tiny("llama"), config))
    theirs.save_pretrained(tmp_path / "theirs")
    export_adapter(tmp_path / "theirs", "peft", tmp_path / "peft")
    export_adapter(tmp_path / "theirs", "vllm", tmp_path / "vllm")
    combine_adapters([tmp_path / "theirs", tmp_path / "peft"], [0.5, 0.5], tmp_path / "sum")
    for name, said in (("peft", 2), ("vllm", None), ("sum", 2)):
        raw = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert len(raw["target_parameters"] or []) == (said or 0)
        again = tiny("llama")
        load_lora(again, tmp_path / name)
        for loaded in (again, peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / name)):
            torch.testing.assert_close(loaded(token_ids()).logits, theirs(token_ids()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable_token_indices": [3]}, "trains rows of the embedding"),
        ({"target_parameters": ["experts.down_proj"]}, "adapts stacks of experts"),
    ],
)
def test_what_is_no_pair_of_a_layer_is_refused(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    config = {"target_modules": ["q_proj"], **config}
    peft.get_peft_model(tiny("mixtral"), peft.LoraConfig(**config)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=f"{message}, .*: merge it instead"):
        export_adapter(tmp_path / "theirs", "peft", tmp_path / "out")


def test_a_rank_can_be_cut_on_the_way(saved: Tiny, tmp_path: Path) -> None:
    folder, _ = saved(r=40)
    outcome = export_adapter(folder, "vllm", tmp_path / "out")
    assert "--max-lora-rank 64" in str(outcome)
    outcome = export_adapter(folder, "vllm", tmp_path / "short", rank=8)
    assert "--max-lora-rank 8 --lora-modules short=" in str(outcome)
    assert 0.1 < outcome.error < 1


def test_dora_has_two_ways_out(saved: Tiny, tiny: Tiny, token_ids: Tiny, tmp_path: Path) -> None:
    folder, model = saved(variant="dora", r=4, targets=("q_proj", "down_proj"))
    with pytest.raises(AdapterError, match=r"merge it into its base \(lorafit merge\), or .* --model BASE"):
        export_adapter(folder, "vllm", tmp_path / "out")
    tiny("llama").save_pretrained(tmp_path / "base")
    skeleton = load_skeleton(tmp_path / "base", dtype="float32")
    expected = model(token_ids()).logits
    errors = []
    for rank in (2, 8, 32):
        plain = nearest_plain(skeleton, tmp_path / "base", folder, rank=rank, energy=None)
        outcome = export_adapter(folder, "vllm", tmp_path / f"out{rank}", plain=plain)
        errors.append(outcome.error)
        again = tiny("llama")
        load_lora(again, tmp_path / f"out{rank}")
        moved = {name: layer.merged_weight().detach() for name, layer in inject.wrappers(again)}
        lost = total = 0.0
        for name, layer in inject.wrappers(model):
            merged, W = layer.merged_weight().detach(), layer.base_layer.weight
            lost += float((merged - moved[name]).square().sum())
            total += float((merged - W).square().sum())
        assert outcome.error == pytest.approx((lost / total) ** 0.5, abs=1e-5)
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(again(token_ids()).logits, expected, rtol=0, atol=1e-4)  # the full rank: the same model

    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="made on another base model"):
        nearest_plain(skeleton, tmp_path / "other", folder, rank=2, energy=None)


# --- mlx-lm -------------------------------------------------------------------------------------------


def test_mlx_has_its_layout(saved: Tiny, tmp_path: Path) -> None:
    """Applied as mlx-lm does: y += scale · (x·lora_a)·lora_b, on the layers that its keys name."""
    folder, model = saved("qwen3", **UNEVEN, targets=("q_proj", "up_proj", "down_proj"))
    outcome = export_adapter(folder, "mlx", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["fine_tune_type"] == "lora"
    assert raw["lora_parameters"]["keys"] == ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"]
    rank, scale = raw["lora_parameters"]["rank"], raw["lora_parameters"]["scale"]
    expected = deltas(model)
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * len(expected)
        for name, delta in expected.items():
            a, b = file.get_tensor(f"{name}.lora_a"), file.get_tensor(f"{name}.lora_b")
            assert (a.shape, b.shape) == ((delta.shape[1], rank), (rank, delta.shape[0]))
            torch.testing.assert_close(((scale * b.T) @ a.T), delta)  # LoRALinear.fuse
    # model.layers[-max(num_layers, 0):] are the blocks that get layers at all
    blocks = [f"model.layers.{i}" for i in range(2)][-max(raw["num_layers"], 0) :]
    reached = {f"{block}.{key}" for block in blocks for key in raw["lora_parameters"]["keys"]}
    assert reached == set(expected)
    assert "mlx_lm.generate --model org/base --adapter-path" in str(outcome)
    assert damaged(tmp_path / "out") == []


def test_mlx_refuses_what_it_would_pass_over(saved: Tiny, tmp_path: Path) -> None:
    folder, _ = saved("gpt2")
    with pytest.raises(AdapterError, match="the names mlx-lm gives the layers of gpt2"):
        export_adapter(folder, "mlx", tmp_path / "out")
    folder, _ = saved("qwen2", targets=("q_proj", "lm_head"))
    with pytest.raises(AdapterError, match="lm_head can only be adapted where it is not tied"):
        export_adapter(folder, "mlx", tmp_path / "out")
    export_adapter(folder, "mlx", tmp_path / "out", facts={"tie_word_embeddings": False})
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["lora_parameters"]["keys"] == ["lm_head", "self_attn.q_proj"]


# --- llama.cpp ----------------------------------------------------------------------------------------


def permuted(weights: numpy.ndarray[Any, Any], heads: int) -> numpy.ndarray[Any, Any]:
    """Row i of the first half of a head, then row i of its second half: written out, one row at a time."""
    size = weights.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weights[order]


PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@pytest.mark.parametrize(
    ("family", "arch", "turned"),
    [
        ("llama", "llama", True),
        ("mistral", "llama", True),
        ("mixtral", "llama", True),
        ("qwen2", "qwen2", False),
        ("qwen3", "qwen3", False),
        ("gemma2", "gemma2", False),
        ("gemma3_text", "gemma3", False),
        ("phi3", "phi3", False),
        ("gpt2", "gpt2", False),
    ],
)
def test_a_gguf_file_holds_every_update(saved: Tiny, tmp_path: Path, family: str, arch: str, turned: bool) -> None:
    """Read back through gguf: names, scale alpha / r, and B·A of every layer in llama.cpp's order of rows."""
    attention = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}  # experts have no one A and B
    folder, model = saved(family, **UNEVEN, **(attention if family == "mixtral" else {}))
    outcome = export_adapter(folder, "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == arch
    assert values["adapter.type"] == "lora"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = deltas(model)
    assert len(tensors) == 2 * len(expected)
    for name, delta in expected.items():
        block, kind = next((int(p), name.split(f".{p}.", 1)[1]) for p in name.split(".") if p.isdigit())
        a, b = (tensors[f"blk.{block}.{PLACES[kind]}.weight.lora_{part}"] for part in "ab")
        found = values["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        rows = delta.numpy()
        if turned and kind in ("self_attn.q_proj", "self_attn.k_proj"):
            rows = permuted(rows, 4 if kind.endswith("q_proj") else 2)
        numpy.testing.assert_allclose(found, rows, rtol=0, atol=1e-6)
    assert f"--lora {tmp_path / 'out' / 'adapter.gguf'}" in str(outcome)
    assert damaged(tmp_path / "out") == []


def test_gguf_refuses_what_is_not_known(saved: Tiny, tmp_path: Path, tiny: Tiny, shaken: Tiny) -> None:
    folder, _ = saved("bloom")
    with pytest.raises(AdapterError, match=r"how llama\.cpp lays out bloom; known are .* convert_lora_to_gguf\.py"):
        export_adapter(folder, "gguf", tmp_path / "out")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["k_proj"]))
    shaken(theirs).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"which base this belongs to \(--model BASE\)"):
        export_adapter(tmp_path / "theirs", "gguf", tmp_path / "out")
    with pytest.raises(AdapterError, match="which the base's None heads do not share"):
        export_adapter(tmp_path / "theirs", "gguf", tmp_path / "out", facts={"model_type": "llama"})
    facts = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    export_adapter(tmp_path / "theirs", "gguf", tmp_path / "out", facts=facts, base_model="org/base")
    assert (tmp_path / "out" / "adapter.gguf").is_file()
