"""Laws of every formula, in every precision, over every kind of layer, whatever the numbers.

That a fresh adapter changes nothing, and that `forward` is `merged_weight`, is tested layer by layer in
`lora/test_layers.py`; what holds for whole transformers models is in `test_invariants.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit import (
    VARIANTS,
    LoraConfig,
    LoraEmbedding,
    LoraLinear,
    add_lora,
    load_lora,
    lora_disabled,
    merge_lora,
    save_lora,
    unload_lora,
)
from lorafit.lora.inject import wrappers
from lorafit.lora.weights import read_weight

Tiny = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Each formula with the layers it fits.
FORMULAS = [("lora", ("embed", "linear", "conv")), ("dora", ("linear", "conv"))]
KINDS = [("Linear", variant) for variant in VARIANTS] + [("Conv1D", variant) for variant in VARIANTS]
KINDS += [("Embedding", "lora")]
SEEDS = st.integers(0, 10**6)
TRIES = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Small(nn.Module):
    """One layer of each kind, of sizes that cannot be taken for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.conv = Conv1D(7, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(self.linear(self.embed(tokens)).tanh())  # type: ignore[no-any-return]


TOKENS = torch.arange(10).reshape(2, 5)


def small(seed: int, dtype: torch.dtype) -> Small:
    torch.manual_seed(seed)
    model = Small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype).eval()


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every tensor by name: its bytes, type, flag, and whether it is the same object."""
    return {
        name: (p.detach().contiguous().view(torch.uint8).numpy().tobytes(), p.dtype, p.requires_grad, id(p))
        for name, p in model.state_dict(keep_vars=True).items()
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "targets"), FORMULAS)
@TRIES
@given(
    seed=SEEDS,
    config=st.fixed_dictionaries({
        "r": st.integers(1, 9), "alpha": st.floats(0.01, 99), "dropout": st.floats(0, 0.9), "rslora": st.booleans()
    }),
    flags=st.integers(0, 31),
)  # fmt: skip
def test_saved_and_loaded_is_the_same_on_bits_and_taken_off_it_was_never_there(
    variant: str,
    targets: tuple[str, ...],
    dtype: torch.dtype,
    seed: int,
    config: dict[str, Any],
    flags: int,
    shaken: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path: Path = tmp_path_factory.mktemp("adapter")
    model = small(seed, dtype)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(flags >> number & 1))
    before, raw = bits(model), model(TOKENS)
    plan = add_lora(model, LoraConfig(variant=variant, targets=targets, **config))
    shaken(model, seed)
    adapter, adapted = trained(model), model(TOKENS)
    unload_lora(model, path)
    assert bits(model) == before
    assert torch.equal(model(TOKENS), raw)
    loaded = load_lora(model, path)
    assert loaded.targets == plan.targets
    assert {name: getattr(loaded.config, name) for name in config} == config
    assert loaded.config.variant == variant
    assert equal(trained(model), adapter)
    assert torch.equal(model(TOKENS), adapted)
    file = (path / "adapter_model.safetensors").read_bytes()
    save_lora(model, path)
    assert (path / "adapter_model.safetensors").read_bytes() == file
    unload_lora(model)
    assert bits(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "targets"), FORMULAS)
@TRIES
@given(seed=SEEDS, training=st.booleans())
def test_switched_off_is_the_base_on_bits_gradients_included(
    variant: str, targets: tuple[str, ...], dtype: torch.dtype, seed: int, training: bool, shaken: Tiny
) -> None:
    model = small(seed, dtype).train(training)
    layers = [model.linear, model.conv]
    inputs = [torch.randn(3, width, dtype=dtype, requires_grad=True) for width in (6, 5)]
    raw = [model(TOKENS), *(layer(x) for layer, x in zip(layers, inputs, strict=True))]
    slopes = torch.autograd.grad(sum(y.sum() for y in raw[1:]), inputs)  # type: ignore[arg-type]
    add_lora(model, LoraConfig(variant=variant, targets=targets, dropout=0.5))
    shaken(model, seed)
    with lora_disabled(model):
        found = [model(TOKENS), *(layer(x) for layer, x in zip((model.linear, model.conv), inputs, strict=True))]
    assert all(torch.equal(a, b) for a, b in zip(found, raw, strict=True))
    assert all(map(torch.equal, torch.autograd.grad(sum(y.sum() for y in found[1:]), inputs), slopes))  # type: ignore[arg-type]
    assert not torch.equal(model(TOKENS), raw[0])


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "variant"), KINDS)
@TRIES
@given(
    seed=SEEDS, sizes=st.tuples(*[st.integers(1, 9)] * 3), s=st.sampled_from([0.25, 1, 2]), m=st.sampled_from([1, 2])
)
def test_a_merged_weight_is_the_exact_sum_rounded_once(
    kind: str, variant: str, dtype: torch.dtype, seed: int, sizes: tuple[int, int, int], s: float, m: int
) -> None:
    """Over whole numbers nothing is rounded on the way, so the exact sum is known, and the bits it is rounded to."""
    torch.manual_seed(seed)
    in_, out, r = sizes
    base = {"Linear": nn.Linear, "Conv1D": lambda a, b: Conv1D(b, a), "Embedding": nn.Embedding}[kind](in_, out)
    W, A, B = whole(-200, 200, out, in_), whole(-9, 9, r, in_), whole(-9, 9, out, r)
    if dtype == torch.float64 and variant == "lora":  # the squares in DoRA's norm would be rounded
        W += whole(-9, 9, out, in_) * 2.0**-40  # fp32 would lose it
    base.weight = nn.Parameter((W if kind == "Linear" else W.T.contiguous()).to(dtype))
    model = nn.ModuleDict({"layer": base})
    add_lora(model, LoraConfig(variant=variant, targets=r".*", r=r, alpha=s * r))
    layer = model["layer"]
    assert isinstance(layer, LoraLinear)
    for factor, value in zip(layer.factors, (A, B), strict=True):
        factor.data.copy_(value)
    exact = W + s * (B @ A)
    if variant == "dora":  # of the length that the row has, or twice that: the quotient is 1 or 2
        length = exact.to(layer.lora_magnitude_vector.dtype).square().sum(dim=1).sqrt()
        layer.lora_magnitude_vector.data.copy_(m * length)
        exact = m * exact
    expected = exact.to(dtype)
    assert torch.equal(layer.merged_weight(), expected)
    merge_lora(model)
    assert torch.equal(read_weight(base), expected)
    assert base.weight.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@TRIES
@given(seed=SEEDS, r=st.integers(1, 9), alpha=st.floats(0.1, 8), power=st.integers(-3, 3), c=st.floats(0.1, 9))
def test_the_update_is_linear_in_alpha_and_exactly_so_for_powers_of_two(
    kind: str, dtype: torch.dtype, seed: int, r: int, alpha: float, power: int, c: float
) -> None:
    torch.manual_seed(seed)
    base = {"Linear": nn.Linear, "Conv1D": lambda a, b: Conv1D(b, a), "Embedding": nn.Embedding}[kind](6, 5).to(dtype)
    for parameter in base.parameters():
        nn.init.zeros_(parameter)  # so that what comes out is the update alone
    x = torch.arange(6) if kind == "Embedding" else torch.randn(4, 6).to(dtype)
    of = LoraEmbedding if kind == "Embedding" else LoraLinear

    def made(alpha: float) -> LoraLinear:
        layer = of(base, r=r, alpha=alpha)
        torch.manual_seed(seed)
        for factor in layer.factors:
            nn.init.normal_(factor)
        return layer

    one, twice, other = made(alpha), made(2.0**power * alpha), made(c * alpha)
    assert one(x).any()
    assert torch.equal(twice(x), 2.0**power * one(x))
    torch.testing.assert_close(other.delta(), c * one.delta(), rtol=4 * torch.finfo(one.delta().dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "targets"), FORMULAS)
@TRIES
@given(data=st.data(), seed=SEEDS)
def test_the_order_of_independent_things_does_not_matter(
    variant: str, targets: tuple[str, ...], dtype: torch.dtype, data: Any, seed: int, shaken: Tiny
) -> None:
    """Naming the layers in another order, and merging them one by one in any order."""
    model = small(seed, dtype)
    plan = add_lora(model, LoraConfig(variant=variant, targets=targets))
    adapter = {name: trained(layer) for name, layer in wrappers(shaken(model, seed))}
    shuffled = tuple(data.draw(st.permutations(targets)))
    again = small(seed, dtype)
    assert add_lora(again, LoraConfig(variant=variant, targets=shuffled)).targets == plan.targets
    unload_lora(again)
    for name in shuffled:
        add_lora(again, LoraConfig(variant=variant, targets=(name,)))
        again.get_submodule(name).load_state_dict(adapter[name], strict=False)
        merge_lora(again)
    merge_lora(model)
    assert equal(trained(model.requires_grad_(True)), trained(again.requires_grad_(True)))
