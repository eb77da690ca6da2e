"""A model arrives whole, quiet and ready; whatever is wrong is one line that says so."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorafit.adapter.peft_format import save_lora
from lorafit.config import LoraConfig, ModelConfig
from lorafit.errors import DiskError, LorafitError, ModelError, UsageError
from lorafit.lora.inject import add_lora
from lorafit.model import load
from lorafit.model.load import load_model, load_skeleton, load_tokenizer, resolve_device, resolve_dtype

CPU = torch.device("cpu")
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]  # as many as the tiny models have rows


def tokenizer() -> PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture
def folder(tiny: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A complete model folder as `save_pretrained` writes it."""
    path = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(3, 20)[None]).logits
    return out


def test_folder_gives_the_same_model(
    folder: Path, tiny: Callable[..., nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    model, words = load_model(folder, dtype="float32")
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert not model.training
    assert words("w5 w6").input_ids == [WORDS.index("w5"), WORDS.index("w6")]
    assert capfd.readouterr() == ("", "")


def test_saved_model_comes_back(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, words = load_model(folder, dtype="float32")
    load.save_model(model, words, tmp_path / "copy")
    again, _ = load_model(tmp_path / "copy", dtype="float32")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(DiskError):
        load.save_model(model, words, tmp_path / "copy", replaces=())
    assert capfd.readouterr() == ("", "")


def test_adapter_is_loaded_on_top(folder: Path, tmp_path: Path) -> None:
    model, _ = load_model(folder, dtype="float32")
    before = logits(model)
    add_lora(model, LoraConfig(r=2, init="gaussian_both"))
    save_lora(model, tmp_path / "adapter", base_model=str(folder))
    again, _ = load_model(str(folder), dtype="float32", adapter=tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert not torch.allclose(logits(again), before, atol=1e-3)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)


def test_skeleton_has_the_shapes_and_no_storage(folder: Path) -> None:
    model, _ = load_model(folder, dtype="bfloat16")
    bones = load_skeleton(folder, dtype="bfloat16")
    shapes = {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in bones.named_parameters()} == shapes
    assert all(p.is_meta for p in bones.parameters())


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_dtype_follows_the_processor(
    able: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("auto", torch.device("meta")) == torch.float32
    assert resolve_dtype("float64", CPU) == resolve_dtype(torch.float64, CPU) == torch.float64


def test_dtype_reaches_the_weights(folder: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        model, _ = load_model(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_wrong_dtype_and_device_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'bfloat16'") as error:
        load_model(folder, dtype="bfloat61")
    one_line(error)
    with pytest.raises(UsageError, match="device 'gpu' cannot be used here") as error:
        load_model(folder, device="gpu")
    one_line(error)
    assert resolve_device("cpu") == CPU


def without(path: Path, *names: str) -> None:
    for name in names:
        (path / name).unlink()


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda p: without(p, "config.json"), "has no config.json"),
    ("no weights", lambda p: without(p, "model.safetensors"), "its model cannot be loaded: .*safetensors"),
    ("weight missing", lambda p: edit_weights(p, lambda t: t.pop(UP)), f"1 weights are missing .*: {UP}"),
    (
        "wrong shape",
        lambda p: edit_weights(p, lambda t: t.update({UP: t[UP].T.contiguous()})),
        "cannot be loaded",
    ),
    ("not safetensors", lambda p: (p / "model.safetensors").write_bytes(b"junk"), "cannot be loaded"),
    ("config cut", lambda p: (p / "config.json").write_text('{"model_type"'), "config.json"),
    ("unknown family", lambda p: (p / "config.json").write_text('{"model_type": "quux"}'), "quux"),
    ("no causal LM", lambda p: (p / "config.json").write_text('{"model_type": "t5"}'), "T5Config"),
    ("no tokenizer", lambda p: without(p, "tokenizer.json", "tokenizer_config.json"), "tokenizer cannot be"),
    (
        "own code",
        lambda p: (p / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "x.C"}}'),
        "read that, then load it with trust_remote_code",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_folder_is_one_line(folder: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(folder)
    with pytest.raises(ModelError) as error:
        load_model(folder, dtype="float32")
    text = one_line(error)
    assert str(folder) in text
    assert re.search(expected, text)


def test_mistyped_path_names_the_nearest(folder: Path) -> None:
    for name in (folder.with_name("tiny-lama"), str(folder.with_name("tiny-lama"))):
        with pytest.raises(ModelError, match="did you mean 'tiny-llama'") as error:
            load_model(name)
        one_line(error)


def test_what_is_no_model_is_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        load_model(tmp_path / "adapter")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "x.gguf").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"name the file, .*x\.gguf"):
        load_model(tmp_path / "packed")
    with pytest.raises(ModelError, match=r"x\.gguf: its tokenizer cannot be loaded") as error:
        load_model(tmp_path / "packed" / "x.gguf")
    one_line(error)
    with pytest.raises(ModelError, match=r"is a file, but no \.gguf"):
        load_model(folder / "model.safetensors")
    with pytest.raises(UsageError, match="no model given"):
        load_model("")
    with pytest.raises(ModelError, match="that the hub could have"):
        load_tokenizer("two words")


def test_hub_name_that_is_not_cached_is_one_line() -> None:
    for loader in (load_model, load_tokenizer, load_skeleton):
        with pytest.raises(ModelError, match="the hub cannot be reached") as error:
            loader("nobody/no-such-model")
        assert one_line(error).startswith("nobody/no-such-model: ")


def test_old_transformers_and_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"junk")
    monkeypatch.setattr(load, "transformers", SimpleNamespace(__version__="5.17.0"))
    with pytest.raises(ModelError, match=r"GGUF files need transformers 5\.23 or newer") as error:
        load_model(tmp_path / "x.gguf")
    one_line(error)


def test_loading_leaves_the_settings_of_transformers_alone(folder: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), logging.set_tqdm_hook(None)
    logging.set_verbosity_info()
    try:
        load_tokenizer(folder)
        with pytest.raises(LorafitError):
            load_tokenizer(folder.parent)
        assert logging.get_verbosity() == logging.INFO
        assert logging.set_tqdm_hook(None) is None
    finally:
        logging.set_verbosity(before[0])
    assert logging.is_progress_bar_enabled() == before[1]


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="older ones guess the tokens of a GGUF file")
def test_gguf_is_the_model_it_was_made_from(tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    model: Any = tiny("llama", tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    write_gguf(model, tmp_path / "tiny.gguf")
    again, words = load_model(tmp_path / "tiny.gguf", dtype="float32")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert all(isinstance(m, nn.Linear) for n, m in again.named_modules() if n.endswith("_proj"))
    assert (words.eos_token_id, again.generation_config.eos_token_id) == (2, 2)
    again.save_pretrained(tmp_path / "plain")  # a packed model would refuse
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_gguf_is_refused_where_transformers_guesses_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(transformers, "__version__", "5.22.9")
    with pytest.raises(ModelError, match=r"GGUF files need transformers 5\.23 or newer, not 5\.22\.9"):
        load_model(tmp_path / "tiny.gguf")


def write_gguf(model: Any, path: Path) -> None:
    """`model` as llama.cpp's converter writes it: other names, each head's q and k rows interleaved."""
    import gguf

    config, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in tensors.items():
        value = tensor.numpy()
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            key.split(".")[-2], 0
        ):
            value = np.reshape(value, (heads, 2, -1, value.shape[1])).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_dtype_name_is_a_knob_choice() -> None:
    assert set(get_args(get_type_hints(ModelConfig)["dtype"])) == {"auto", *load.DTYPES}
