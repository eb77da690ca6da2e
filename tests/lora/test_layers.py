"""The formulas: what a layer computes is what its merged weight means."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit import VARIANTS, DoraLinear, LoraEmbedding, LoraLinear
from lorafit.errors import UsageError
from lorafit.lora.inits import INITS
from lorafit.lora.layers import TrainedCopy
from lorafit.lora.weights import read_weight

SIZES = st.integers(1, 12)
DTYPES = [torch.float32, torch.float64]
OPTIONS = {"max_examples": 25, "deadline": None}


def make(kind: str, in_: int, out: int, bias: bool = True) -> nn.Module:
    if kind == "Embedding":
        return nn.Embedding(in_, out)
    layer: nn.Module = Conv1D(out, in_) if kind == "Conv1D" else nn.Linear(in_, out, bias=bias)
    if getattr(layer, "bias", None) is not None:
        nn.init.normal_(layer.bias)
    return layer


def wrap(kind: str, variant: str, base: nn.Module, **options: Any) -> LoraLinear:
    layer = (LoraEmbedding if kind == "Embedding" else VARIANTS[variant])(base, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def dense(layer: LoraLinear, x: Tensor) -> Tensor:
    """The layer's function from its merged weight alone."""
    W = layer.merged_weight()
    if isinstance(layer, LoraEmbedding):
        return F.embedding(x, W.T)
    return F.linear(x, W, layer.base_layer.bias)


GRID = [("Linear", v) for v in VARIANTS] + [("Conv1D", v) for v in VARIANTS] + [("Embedding", "lora")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "variant"), GRID)
@settings(**OPTIONS)
@given(data=st.data(), in_=SIZES, out=SIZES, r=SIZES, rslora=st.booleans(), bias=st.booleans())
def test_forward_is_the_merged_weight(
    kind: str, variant: str, dtype: torch.dtype, data: Any, in_: int, out: int, r: int, rslora: bool, bias: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    base = make(kind, in_, out, bias).to(dtype)
    layer = wrap(kind, variant, base, r=r, alpha=data.draw(st.floats(0.1, 8)), rslora=rslora)
    batch = data.draw(st.lists(st.integers(1, 3), max_size=3))
    x = torch.randint(in_, batch) if kind == "Embedding" else torch.randn(*batch, in_, dtype=dtype)
    reference = dense(layer, x)
    scale = max(1.0, reference.abs().max().item(), layer.delta().abs().max().item() * in_)
    if variant == "dora":  # a row that nearly vanishes makes the quotient large
        scale *= max(1.0, (layer.lora_magnitude_vector / layer.row_norm()).abs().max().item()) ** 2
    bound = scale * (2e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(layer(x), reference, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@settings(**OPTIONS)
@given(in_=SIZES, out=SIZES, r=SIZES, seed=st.integers(0, 10**6))
def test_a_merge_is_the_fp32_sum_rounded_once(
    kind: str, dtype: torch.dtype, in_: int, out: int, r: int, seed: int
) -> None:
    torch.manual_seed(seed)
    base = make(kind, in_, out).to(dtype)
    layer = wrap(kind, "lora", base, r=r, alpha=2.0)
    A, B = layer.factors
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert A.dtype == B.dtype == wide
    exact = read_weight(base).double() + 2.0 / r * (B.double() @ A.double())
    merged = layer.merged_weight()
    assert merged.dtype == dtype
    fp32 = (read_weight(base).to(wide) + 2.0 / r * (B @ A)).to(dtype)
    assert torch.equal(merged, fp32)
    # One rounding of the sum, so within half a unit in the last place of it (and fp32's own error).
    half_unit = torch.finfo(dtype).eps / 2
    assert ((merged.double() - exact).abs() <= half_unit * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@settings(**OPTIONS)
@given(in_=SIZES, out=SIZES, r=SIZES, seed=st.integers(0, 10**6), sign=st.sampled_from([-1.0, 1.0]))
def test_no_merged_value_is_beyond_the_bound(kind: str, in_: int, out: int, r: int, seed: int, sign: float) -> None:
    torch.manual_seed(seed)
    layer = wrap(kind, "lora", make(kind, in_, out).double(), r=r)
    layer.base_layer.weight.data.mul_(sign * 10 ** (4 * torch.rand(1).item() - 2))
    assert layer.merged_weight().abs().max() <= layer.bound() * (1 + 1e-12)
    list(layer.factors)[seed % 2].data.view(-1)[-1] = torch.nan
    assert not layer.bound() < torch.inf


@settings(**OPTIONS)
@given(alpha=st.floats(0.1, 50), r=st.integers(1, 16), rslora=st.booleans())
def test_the_scale_and_that_the_update_is_linear_in_it(alpha: float, r: int, rslora: bool) -> None:
    layer = LoraLinear(nn.Linear(5, 7).double(), r=r, alpha=alpha, rslora=rslora, init="gaussian_both")
    assert layer.scale == pytest.approx(alpha / r**0.5 if rslora else alpha / r)
    x = torch.randn(3, 5, dtype=torch.float64)
    update = layer(x) - layer.base_layer(x)
    A, B = layer.factors
    torch.testing.assert_close(update, layer.scale * x @ A.T @ B.T)
    layer.scale *= 3
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3 * update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [name for name, init in INITS.items() if init.start != "free" and not init.statistic])
@pytest.mark.parametrize(("kind", "variant"), GRID)
@pytest.mark.parametrize("training", [False, True])
def test_step_0_is_the_base_bit_for_bit(kind: str, variant: str, init: str, dtype: torch.dtype, training: bool) -> None:
    base = make(kind, 24, 40).to(dtype)
    x = torch.randint(24, (2, 9)) if kind == "Embedding" else torch.randn(2, 9, 24, dtype=dtype)
    expected = base(x)
    cls = LoraEmbedding if kind == "Embedding" else VARIANTS[variant]
    layer = cls(base, r=4, dropout=0.2, init=init).train(training)
    assert torch.equal(layer(x), expected)
    assert layer.delta().abs().max() == 0
    layer.enabled = False
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_dropout_acts_on_the_input_of_a_and_only_while_training(kind: str, variant: str) -> None:
    layer = wrap(kind, variant, make(kind, 50, 6), r=3, alpha=6.0, dropout=0.4)
    x = torch.randn(2, 50)
    torch.testing.assert_close(layer.eval()(x), dense(layer, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    thinned = F.dropout(x, 0.4)
    update = layer.scale * (thinned @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    Wx = x @ read_weight(layer.base_layer).T
    gain = torch.ones(6)
    if isinstance(layer, DoraLinear):
        gain = layer.lora_magnitude_vector / layer.row_norm()
    torch.testing.assert_close(got, gain * (Wx + update) + layer.base_layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "variant"), GRID)
def test_the_weight_a_model_may_read_is_laid_out_as_the_bases(kind: str, variant: str) -> None:
    layer = wrap(kind, variant, make(kind, 5, 7))
    merged = layer.merged_weight()
    assert torch.equal(layer.weight, merged if kind == "Linear" else merged.T)
    assert layer.weight.shape == layer.base_layer.weight.shape
    layer.enabled = False
    assert torch.equal(layer.weight, layer.base_layer.weight)
    assert layer.bias is getattr(layer.base_layer, "bias", None)


def test_only_a_and_b_are_trained_and_the_base_is_held() -> None:
    base = nn.Linear(5, 7)
    layer = LoraLinear(base, r=2)
    assert layer.base_layer is base
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    assert repr(layer).startswith("LoraLinear(\n  r=2, alpha=16")
    assert [(thin.in_features, thin.out_features) for thin in (layer.lora_A, layer.lora_B)] == [(5, 2), (2, 7)]


def test_dora_norm_without_the_sum_and_its_gradient() -> None:
    layer = wrap("Linear", "dora", nn.Linear(9, 7).double(), r=3)
    assert isinstance(layer, DoraLinear)
    V = read_weight(layer.base_layer) + layer.delta()
    torch.testing.assert_close(layer.row_norm(), V.norm(dim=1))
    x = torch.randn(4, 9, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    # The paper's §4.3: the norm is a constant in the backward pass.
    direction = (V / V.detach().norm(dim=1, keepdim=True)) * layer.lora_magnitude_vector[:, None]
    reference = F.linear(x, direction, layer.base_layer.bias)
    got = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(reference.square().sum(), parameters))


def test_dora_over_rows_of_zeros_stays_finite() -> None:
    base = nn.Linear(6, 4)
    nn.init.zeros_(base.weight)
    layer = DoraLinear(base, r=2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert layer.merged_weight().isfinite().all()


def test_unknown_init_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'gaussian'"):
        LoraLinear(nn.Linear(3, 3), init="gausian")


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "gaussian_both"])
def test_the_starts_are_as_their_equations_say(name: str) -> None:
    W = torch.zeros(300, 400)
    A, B = INITS[name](W, 8, 2.0)
    assert (A.shape, B.shape) == ((8, 400), (300, 8))
    deviation = {"kaiming": 400**-0.5 / 3**0.5, "gaussian": 1 / 8, "gaussian_both": 0.02}[name]
    assert A.std().item() == pytest.approx(deviation, rel=0.05)
    assert B.std().item() == pytest.approx(0.02 if name == "gaussian_both" else 0, rel=0.05)
    if name == "kaiming":
        assert A.abs().max() <= 400**-0.5


def test_a_trained_copy_switches_and_answers_for_the_module_in_use() -> None:
    base = nn.LayerNorm(4)
    copy = TrainedCopy(base)
    flags = {name: parameter.requires_grad for name, parameter in copy.named_parameters()}
    assert flags == {
        "base_layer.weight": False,
        "base_layer.bias": False,
        "trained.weight": True,
        "trained.bias": True,
    }
    nn.init.constant_(copy.trained.weight, 3.0)
    x = torch.randn(2, 4)
    torch.testing.assert_close(copy(x), 3 * base(x))
    assert copy.weight is copy.trained.weight
    assert copy.normalized_shape == (4,)
    copy.enabled = False
    assert torch.equal(copy(x), base(x))
    assert copy.weight is base.weight
    with pytest.raises(AttributeError):
        _ = copy.nothing_of_the_kind
