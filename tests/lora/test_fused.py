"""The hand-written backward is autograd's, to rounding, and as good a citizen of torch."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafit import VARIANTS, LoraConfig, LoraLinear, add_lora
from lorafit.lora.fused import Parts, low_rank_linear

Tiny = Callable[..., Any]
SIZES = st.integers(1, 9)


def random(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def low_rank(x: Tensor, dropped: Tensor | None, *parts: Any) -> Tensor:
    return low_rank_linear(x, dropped, [Parts(*parts)])[0]


@settings(max_examples=30, deadline=None)
@given(n=SIZES, in_=SIZES, out=SIZES, r=SIZES, bias=st.booleans(), dropped=st.booleans(), gained=st.booleans())
def test_gradcheck(n: int, in_: int, out: int, r: int, bias: bool, dropped: bool, gained: bool) -> None:
    x, A, B = random(n, in_, grad=True), random(r, in_, grad=True), random(out, r, grad=True)
    thinned, gain = random(n, in_, grad=True) if dropped else None, random(out, grad=True) if gained else None
    W, b = random(out, in_), random(out) if bias else None
    assert torch.autograd.gradcheck(
        lambda x, thinned, A, B, g: low_rank(x, thinned, W, b, A, B, 0.7, g), (x, thinned, A, B, gain), fast_mode=True
    )


@settings(max_examples=30, deadline=None)
@given(n=SIZES, in_=SIZES, out=SIZES, r=SIZES, bias=st.booleans(), frozen=st.sampled_from(["", "x", "A", "B"]))
def test_it_is_the_formula(n: int, in_: int, out: int, r: int, bias: bool, frozen: str) -> None:
    x, A, B = (random(*shape, grad=name != frozen) for name, shape in
               (("x", (n, in_)), ("A", (r, in_)), ("B", (out, r))))  # fmt: skip
    W, b, weigh = random(out, in_), random(out) if bias else None, random(n, out)
    inputs = [tensor for tensor in (x, A, B) if tensor.requires_grad]
    y = low_rank(x, None, W, b, A, B, 1.3)
    reference = F.linear(x, W, b) + 1.3 * x @ A.T @ B.T
    torch.testing.assert_close(y, reference)
    got = torch.autograd.grad((y * weigh).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad((reference * weigh).sum(), inputs))


@settings(max_examples=30, deadline=None)
@given(
    n=SIZES, in_=SIZES, outs=st.lists(SIZES, min_size=2, max_size=4), r=SIZES, dropped=st.booleans(),
    frozen=st.sampled_from(["", "x", "A", "B", "all A", "g"]), unused=st.booleans(), gained=st.booleans(),
)  # fmt: skip
def test_layers_that_share_their_input_are_the_layers_one_by_one(
    n: int, in_: int, outs: list[int], r: int, dropped: bool, frozen: str, unused: bool, gained: bool
) -> None:
    """Ranks, scales, biases and gains of their own; a frozen factor in the first, and an output that nobody uses."""
    x, thinned = random(n, in_, grad=frozen != "x"), random(n, in_, grad=True) if dropped else None
    layers = [
        Parts(random(out, in_), random(out) if i % 2 else None,
              random(r + i, in_, grad=frozen != "all A" and (i > 0 or frozen != "A")),
              random(out, r + i, grad=i > 0 or frozen != "B"), 0.5 + i,
              random(out, grad=i > 0 or frozen != "g") if gained else None)
        for i, out in enumerate(outs)
    ]  # fmt: skip
    inputs = [t for t in (x, thinned, *(t for p in layers for t in p if isinstance(t, Tensor)))
              if t is not None and t.requires_grad]  # fmt: skip
    together = low_rank_linear(x, thinned, layers)

    def formula(p: Parts) -> Tensor:
        u = x @ p.weight.T + p.scale * (x if thinned is None else thinned) @ p.A.T @ p.B.T
        y = u if p.gain is None else p.gain * u
        return y if p.bias is None else y + p.bias

    alone = [formula(p) for p in layers]
    torch.testing.assert_close(together, tuple(alone))
    weigh = [random(n, out) for out in outs]
    last = len(outs) - unused

    def slopes(ys: Any) -> Any:
        loss = sum((y * w).sum() for y, w in zip(ys[:last], weigh, strict=False))
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(slopes(together), slopes(alone))


def test_there_is_no_second_derivative_and_it_says_so() -> None:
    x, A, B = random(2, 3, grad=True), random(1, 3, grad=True), random(4, 1, grad=True)
    y = low_rank(x, None, random(4, 3), None, A, B, 1.0)
    (gradient,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_it_writes_to_nothing_it_was_given() -> None:
    given = [random(5, 3), random(4, 3), random(4), random(2, 3, grad=True), random(4, 2, grad=True)]
    before = [tensor.detach().clone() for tensor in given]
    x, W, b, A, B = given
    low_rank(x, None, W, b, A, B, 1.0).sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def layers() -> dict[str, Callable[[], nn.Module]]:
    return {
        "linear": lambda: nn.Linear(6, 10),
        "linear without bias": lambda: nn.Linear(6, 10, bias=False),
        "Conv1D": lambda: Conv1D(10, 6),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)])
def test_the_fused_path_is_the_plain_path(
    kind: str, shape: tuple[int, ...], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = VARIANTS[variant](layers()[kind](), r=4, init="gaussian_both").double()
    x = random(*shape, grad=True)
    assert layer._plain(x)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for parameter in parameters[1:]:
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    y = layer(x)
    got = torch.autograd.grad(y.square().sum(), parameters)
    monkeypatch.setattr(LoraLinear, "_plain", lambda self, x: False)
    reference = layer(x)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(got, torch.autograd.grad(reference.square().sum(), parameters))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_drawn_alike_on_both_paths(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VARIANTS[variant](nn.Linear(6, 10), r=4, dropout=0.5, init="gaussian_both").double().train()
    x = random(7, 6, grad=True)
    results = []
    for path in ("fused", "plain"):
        if path == "plain":
            monkeypatch.setattr(LoraLinear, "_plain", lambda self, x: False)
        torch.manual_seed(5)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.factors])))
    torch.testing.assert_close(*results)


def test_what_is_not_an_ordinary_frozen_matrix_goes_the_plain_way() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 6)
    cases: dict[str, nn.Module] = {name: nn.Linear(6, 6) for name in ("hook", "pre-hook", "moved", "trained")}
    cases["subclass"] = Quantised(6, 6)
    wrapped = {name: LoraLinear(base, r=2) for name, base in cases.items()}
    cases["hook"].register_forward_hook(lambda module, given, y: y + 1)
    cases["pre-hook"].register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    plain = cases["moved"].forward
    cases["moved"].forward = lambda x: plain(x) - 1  # what accelerate does to place layers on devices
    cases["trained"].requires_grad_(True)
    for name, layer in wrapped.items():
        assert not layer._plain(x), name
        torch.testing.assert_close(layer(x), cases[name](x))
    assert LoraLinear(nn.Linear(6, 6), r=2)._plain(x)
    assert not LoraLinear(nn.Linear(6, 6), r=2)._plain(x.double())


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    layer = LoraLinear(nn.Linear(6, 6), r=2)
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_autocast_goes_by_torchs_rules() -> None:
    layer = LoraLinear(nn.Linear(6, 10), r=4, init="gaussian_both")
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert all(factor.grad is not None and factor.grad.dtype == torch.float32 for factor in layer.factors)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant: bool, variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny
) -> None:
    model = tiny("llama").train()
    add_lora(model, LoraConfig(r=4, dropout=0.3, variant=variant))
    shaken(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(token_ids(), labels=token_ids()).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 is about to rename it
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()  # its blocks see no other input that asks for a gradient
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", ["gaussian_both", "pissa"])
def test_compiled_it_is_one_graph_with_the_same_gradients(init: str, variant: str) -> None:
    layer = VARIANTS[variant](nn.Linear(6, 10), r=4, init=init)
    x = torch.randn(3, 6, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        got = torch.autograd.grad(y.square().sum(), [x, *layer.factors])
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).square().sum(), [x, *layer.factors]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_precision_base_factors_and_gradients_stay_fp32(dtype: torch.dtype) -> None:
    base = nn.Linear(16, 10).to(dtype)
    layer = LoraLinear(base, r=4, init="gaussian_both")
    x = torch.randn(32, 16, requires_grad=True)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    got = torch.autograd.grad(y.float().sum(), layer.factors)
    exact = LoraLinear(nn.Linear(16, 10), r=4).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    reference = torch.autograd.grad(exact(x.to(dtype).double()).sum(), exact.factors)
    for gradient, truth in zip(got, reference, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - truth).norm() <= 0.02 * truth.norm()


def test_a_gain_next_to_one_survives_bf16() -> None:
    """A gain of 1.003 is 1 in bf16; what it adds is there all the same."""
    base = nn.Linear(64, 64, bias=False).bfloat16()
    layer = VARIANTS["dora"](base, r=2)
    layer.lora_magnitude_vector.data.mul_(1.003)
    x = torch.randn(512, 64).bfloat16()
    learned = layer(x).double().abs().sum() / base(x).double().abs().sum() - 1
    assert 0.002 < learned.item() < 0.004


@pytest.mark.parametrize("frozen", ["", "A", "B"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_only_x_and_the_thin_product_are_kept_for_the_backward(variant: str, frozen: str) -> None:
    """h (n, r) and x, and one y for DoRA's gain; a plain composition keeps two. With A frozen, as in LoRA-FA, no x."""
    layer = VARIANTS[variant](nn.Linear(64, 48, bias=False), r=2)
    for name, factor in zip("AB", layer.factors, strict=True):
        factor.requires_grad_(name != frozen)
    x = torch.randn(100, 64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    found = Counter(tuple(t.shape) for t in kept if t.data_ptr() not in own and t.ndim == 2)
    wanted = {(100, 64): frozen != "A", (100, 2): frozen != "B", (100, 48): variant == "dora"}
    assert found == {shape: 1 for shape, there in wanted.items() if there}
