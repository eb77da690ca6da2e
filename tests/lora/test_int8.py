"""8-bit layers are the dequantised dense layers, in everything but memory."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit import (
    Batches,
    LoraConfig,
    TrainConfig,
    add_lora,
    count_parameters,
    load_lora,
    lora_disabled,
    merge_lora,
    save_lora,
    train,
    unload_lora,
)
from lorafit.errors import AdapterError, CheckpointError, ModelError, UsageError
from lorafit.lora.inject import wrappers
from lorafit.lora.int8 import Int8Linear
from lorafit.lora.weights import read_weight, write_weight
from lorafit.model import storage
from lorafit.model.storage import store, stored_while_loading
from lorafit.training.memory import need
from tests.test_peft_parity import assert_same, in_peft, logits

Tiny = Callable[..., Any]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(kind: str, dtype: torch.dtype, bias: bool = True) -> Any:
    layer: Any = Conv1D(40, 24) if kind == "Conv1D" else nn.Linear(24, 40, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
        read_weight(layer)[3] = 0.0  # a row of zeros has no scale
        if layer.bias is not None:
            layer.bias.normal_()
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_each_value_is_within_half_a_step(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, dtype)
    W, stored = read_weight(layer).double(), Int8Linear(layer)
    step = W.abs().amax(dim=1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * W.abs().amax(dim=1, keepdim=True)  # of the scale, and of scale times code
    assert ((read_weight(stored).double() - W).abs() <= step / 2 + 2 * rounding).all()
    assert read_weight(stored).dtype == dtype
    assert (stored.scales > 0).all()
    assert torch.equal(read_weight(stored)[3], torch.zeros(24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24)])
def test_forward_and_backward_are_the_dequantised_layers(
    shape: tuple[int, ...], kind: str, bias: bool, dtype: torch.dtype
) -> None:
    stored = Int8Linear(make(kind, dtype, bias))
    if stored.bias is not None:
        stored.bias.requires_grad_()
    dense = write_weight(stored, read_weight(stored))
    assert (type(dense), dense.weight.dtype) == (Conv1D if kind == "Conv1D" else nn.Linear, dtype)
    assert torch.equal(stored.weight, dense.weight)
    found = []
    for layer in (stored, dense):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype))
        found.append([y, x.grad] + ([layer.bias.grad] if bias else []))
        layer.zero_grad()
    exact = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact * theirs.abs().max().item())


def test_the_backward_by_finite_differences() -> None:
    stored = Int8Linear(make("Linear", torch.float64))
    assert torch.autograd.gradcheck(stored, torch.randn(3, 24, dtype=torch.float64, requires_grad=True))


def stored_and_dense(tiny: Tiny, family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """An 8-bit model, and the plain one with the same weights."""
    model = store(tiny(family).to(dtype), "int8")
    return model, store(copy.deepcopy(model), "dense")


def test_every_linear_layer_but_the_head(tiny: Tiny, family: str, token_ids: Tiny) -> None:
    if family == "falcon":
        with pytest.raises(ModelError, match="this FalconForCausalLM has no plain linear layers to keep in 8 bits"):
            store(tiny(family), "int8")
        return
    model, dense = stored_and_dense(tiny, family)
    kinds = (nn.Linear, Conv1D)
    left = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    assert left == [name for name, m in model.named_modules() if m is model.get_output_embeddings()]
    assert count_parameters(model).total == count_parameters(dense).total == count_parameters(tiny(family)).total
    assert [type(m) for m in dense.modules()] == [type(m) for m in tiny(family).modules()]
    assert_same(logits(model, token_ids()), logits(dense, token_ids()))
    assert (logits(model, token_ids()) - logits(tiny(family), token_ids())).abs().max() > 0


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_it_is_one_on_the_dequantised_base(
    family: str, variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model, dense = stored_and_dense(tiny, family, torch.float64)
    raw = logits(model, token_ids())
    add_lora(model, LoraConfig(r=4, variant=variant))
    assert torch.equal(logits(model, token_ids()), raw)
    adapted = logits(shaken(model), token_ids())
    assert (adapted - raw).abs().max() > 0.01 * raw.abs().max()
    save_lora(model, tmp_path)
    assert_same(logits(in_peft(copy.deepcopy(dense), tmp_path), token_ids()), adapted)
    load_lora(dense, tmp_path)
    assert_same(logits(dense, token_ids()), adapted)
    with lora_disabled(model):
        assert torch.equal(logits(model, token_ids()), raw)
    unload_lora(model)
    assert torch.equal(logits(model, token_ids()), raw)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_makes_dense_layers_and_says_so(family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    model, _ = stored_and_dense(tiny, family)
    add_lora(model, LoraConfig(r=4, targets=r".*\.0\..*"))
    adapted = logits(shaken(model), token_ids())
    expected = {name: layer.merged_weight() for name, layer in wrappers(model)}
    with pytest.warns(UserWarning, match=r"merged into what their storage held, not into the original weights, and de"):
        merge_lora(model)
    for name, W in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) in (nn.Linear, Conv1D)
        assert torch.equal(read_weight(layer), W)
    assert any(isinstance(layer, Int8Linear) for layer in model.modules())  # what had no adapter stays as it was
    torch.testing.assert_close(logits(model, token_ids()), adapted, rtol=1e-5, atol=1e-5)


def size(model: nn.Module) -> int:
    """Bytes of the linear layers but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, Int8Linear | nn.Linear | Conv1D) and m is not head]
    return sum(t.nbytes for layer in layers for t in layer.state_dict().values())


def test_memory_falls_while_it_lies_and_while_it_trains(tiny: Tiny, examples: Tiny, kept_bytes: Any) -> None:
    model, dense = stored_and_dense(tiny, "llama")
    assert size(model) < 0.4 * size(dense)  # rows of 32: codes and scales are 36 bytes of 128
    for each in (model, dense):
        add_lora(each, LoraConfig(r=4))
    assert need(model).base < need(dense).base
    assert need(model).token == need(dense).token
    W = sum(read_weight(layer.base_layer).nbytes for _, layer in wrappers(model))
    more = kept_bytes(model.train(), examples(1)) - kept_bytes(dense.train(), examples(1))
    assert more < W / 2  # no dense copy of W is kept for backward


def test_a_model_is_never_dense_while_it_is_loaded(
    tiny: Tiny, token_ids: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer at a time, to the same bits as when all of it is loaded first; tied head and biases included."""
    for family in ("llama", "gpt2", "gemma2", "mixtral"):
        tiny(family).save_pretrained(tmp_path / family)
        loader: Any = transformers.AutoModelForCausalLM
        whole = store(loader.from_pretrained(tmp_path / family, dtype=torch.float32), "int8").eval()
        dense: list[int] = []

        def counted(model: nn.Module, layer: nn.Module, plain: Any = storage._is_stored, dense: Any = dense) -> Any:
            found = plain(model, layer)
            linear = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
            dense.extend([sum(not m.weight.is_meta for m in linear)] * found)
            return found

        with monkeypatch.context() as patched, stored_while_loading("int8"):
            patched.setattr(storage, "_is_stored", counted)
            model = loader.from_pretrained(tmp_path / family, dtype=torch.float32)
        assert len(dense) == sum(isinstance(m, Int8Linear) for m in whole.modules()) > 0
        assert max(dense) <= 2  # this one, and the head
        store(model, "int8").eval()
        assert torch.equal(logits(model, token_ids()), logits(whole, token_ids()))
        assert {name: type(module) for name, module in model.named_modules()} == {
            name: type(module) for name, module in whole.named_modules()
        }


class Stop(Exception):
    pass


def test_a_run_on_it_resumes_and_knows_its_base(tiny: Tiny, examples: Tiny, tmp_path: Path) -> None:
    def run(base: nn.Module, **options: Any) -> tuple[list[Any], list[Tensor]]:
        torch.manual_seed(5)
        add_lora(base, LoraConfig(r=2))
        config = TrainConfig(lr=1e-2, steps=4, save_every=0)
        result = train(base, Batches(examples(8), 4), config, **options)
        return [r["loss"] for r in result.history], [p.detach() for p in base.parameters() if p.requires_grad]

    def stop(record: Any) -> None:
        if record["step"] == 2:
            raise Stop

    whole = run(store(tiny("llama"), "int8"))
    with pytest.raises(Stop):
        run(store(tiny("llama"), "int8"), checkpoints=tmp_path, on_step=stop)
    with pytest.raises(CheckpointError, match=r"storage was \['Int8Linear'\] and is \['Linear'\]"):
        run(tiny("llama"), resume=tmp_path)
    other = tiny("llama")
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"another base model \(model.layers.0.self_attn.q_proj.scales has other"):
        run(store(other, "int8"), resume=tmp_path)
    again = run(store(tiny("llama"), "int8"), resume=tmp_path)
    assert whole[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(whole[1], again[1], strict=True))


def test_an_adapter_knows_an_8_bit_base_in_any_precision(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> None:
    model = store(tiny("llama").bfloat16(), "int8")
    add_lora(model, LoraConfig(r=2))
    save_lora(shaken(model), tmp_path)
    load_lora(store(tiny("llama"), "int8"), tmp_path)
    load_lora(tiny("llama"), tmp_path)
    other = tiny("llama")
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(1.1)
    with pytest.raises(AdapterError, match=r"made on another base model"):
        load_lora(store(other, "int8"), tmp_path)


def test_what_cannot_be_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match=r"unknown storage 'int9' \(did you mean 'int8'\?\): use dense, int8"):
        store(model, "int9")
    add_lora(model)
    with pytest.raises(UsageError, match="carries an adapter already: choose the storage before"):
        store(model, "int8")
    unload_lora(model)
    with pytest.raises(UsageError, match=r"train_modules: model.layers.0.mlp.gate_proj.codes, .* cannot be trained"):
        add_lora(store(model, "int8"), LoraConfig(train_modules=("layers.0.mlp",)))


LOADING = """
import sys
import torch, transformers
from lorafit.lora.int8 import Int8Linear
from lorafit.model.storage import store, stored_while_loading

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def seen(made, layer, plain=Int8Linear.__init__):
    plain(made, layer)
    peak.append(anonymous())

Int8Linear.__init__ = seen
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])  # imports what there is to import
peak, before = [], anonymous()
with stored_while_loading("int8"):
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(max(peak) - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process has")
def test_the_peak_while_loading_is_a_few_layers_above_the_8_bit_model(tiny: Tiny, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    tiny("llama", **sizes).save_pretrained(tmp_path / "large")
    tiny("llama").save_pretrained(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    peak, size = map(int, done.stdout.split())
    assert peak < size + 6 * 4 * 1024 * 4096  # one layer, and what is made on the way to its codes
