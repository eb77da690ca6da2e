"""The loss equals the model's own, and the hand-written head equals autograd."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafit import LoraConfig, add_lora
from lorafit.data.batches import Batches, collate
from lorafit.data.chat import IGNORE
from lorafit.training import loss as loss_module
from lorafit.training.attention import row_attention
from lorafit.training.loop import evaluate
from lorafit.training.loss import LinearCrossEntropy, find_head, summed_loss

Tiny = Callable[..., nn.Module]


def own_loss(model: nn.Module, rows: list[Any]) -> float:
    """Per supervised token, from the model's own `labels=`, a row at a time."""
    total, tokens = 0.0, 0
    for row in rows:
        count = sum(label != IGNORE for label in row.labels[1:])
        if count:
            out = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
            total, tokens = total + out.loss.item() * count, tokens + count
    return total / tokens


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3_text", "gpt2", "opt", "phi3", "bloom", "cohere", "mixtral"]
)
@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_the_models_own_loss(family: str, packing: bool, tiny: Tiny, examples: Any) -> None:
    model, rows = tiny(family), examples()
    ours = evaluate(model, Batches(rows, 8, packing=packing))
    assert ours == pytest.approx(own_loss(model, rows), rel=2e-6)


HEADS: dict[str, tuple[dict[str, float], tuple[float, float | None]]] = {
    "llama": ({}, (1.0, None)),
    "cohere": ({"logit_scale": 0.5}, (0.5, None)),
    "granite": ({"logits_scaling": 4.0}, (0.25, None)),
    "gemma2": ({"final_logit_softcapping": 0.5}, (1.0, 0.5)),
}


@pytest.mark.parametrize("family", HEADS)
def test_a_head_is_found_with_its_scale_and_its_cap(family: str, tiny: Tiny, examples: Any) -> None:
    settings, expected = HEADS[family]
    model, rows = tiny(family, **settings), examples()
    head = find_head(model)
    assert head is not None
    assert (head.scale, head.cap) == expected
    assert evaluate(model, Batches(rows, 8)) == pytest.approx(own_loss(model, rows), rel=2e-6)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 1.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 100])
def test_head_and_cross_entropy_equal_autograd(
    scale: float, cap: float | None, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, vocab = 7, 5, 11
    monkeypatch.setattr(loss_module, "TILE", tile)
    hidden = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    weight, b = torch.randn(vocab, width, dtype=torch.float64), torch.randn(vocab, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,))
    logits = F.linear(hidden, weight, b if bias else None) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected * 0.7, hidden)
    ours = LinearCrossEntropy.apply(hidden, weight, b if bias else None, targets, scale, cap)
    (ours * 0.7).backward()
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert torch.allclose(hidden.grad, gradient, rtol=1e-10, atol=1e-12)


def test_no_supervised_row_is_a_loss_of_zero() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = LinearCrossEntropy.apply(hidden, torch.randn(9, 4), None, torch.zeros(0, dtype=torch.long), 1.0, None)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("train_head", ["lora", "full", "unfrozen", "no"])
def test_a_trained_head_gets_its_gradient(train_head: str, tiny: Tiny, examples: Any) -> None:
    """The head wrapped by LoRA, trained in full, in place, or not at all: all equal autograd on full logits."""
    model = tiny("llama")
    config = {
        "lora": LoraConfig(r=4, targets=("q_proj", "lm_head"), init="gaussian_both"),
        "full": LoraConfig(r=4, targets=("q_proj",), train_modules=("lm_head",), init="gaussian_both"),
    }.get(train_head, LoraConfig(r=4, targets=("q_proj",), init="gaussian_both"))
    add_lora(model, config)
    if train_head == "unfrozen":
        model.lm_head.requires_grad_(True)
    batch = collate(examples(6), packed=True)
    gradients = []
    for head in (find_head(model), None):
        with row_attention(model, batch):
            summed_loss(model, batch, head).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    with row_attention(model, batch):
        logits = model(**batch.inputs(), use_cache=False).logits[0]
        F.cross_entropy(logits[batch.predict], batch.targets, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for ours in gradients:
                assert (ours[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_nothing_the_size_of_the_vocabulary_is_kept_under_a_frozen_head(tiny: Tiny, examples: Any) -> None:
    model = tiny("llama", vocab_size=1000)
    add_lora(model, LoraConfig(r=4))
    batch, head = collate(examples(6), packed=True), find_head(model)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with row_attention(model, batch), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, batch, head)
    assert kept
    assert not [shape for shape in kept if 1000 in shape]


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "hook", "pre-hook"])
def test_a_head_that_does_more_than_multiply_is_called(kind: str, tiny: Tiny, examples: Any) -> None:
    model, rows = tiny("llama"), examples()
    if kind == "subclass":
        model.lm_head.__class__ = Doubled
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert find_head(model) is not None
    assert evaluate(model, Batches(rows, 8)) == pytest.approx(own_loss(model, rows), rel=2e-6)


@pytest.mark.parametrize(("tile", "shapes"), [(None, [(4096, 4), (904, 4)]), (5000, [(5000, 4)])])
def test_the_heads_weight_is_read_once_tile_by_tile(
    tile: int | None, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        return linear(x, weight, *rest)

    linear = F.linear
    monkeypatch.setattr(F, "linear", counted)
    if tile is not None:
        monkeypatch.setattr(loss_module, "TILE", tile)
    targets = torch.zeros(600, dtype=torch.long)
    LinearCrossEntropy.apply(torch.randn(600, 4), torch.randn(5000, 4), None, targets, 1.0, None)
    assert calls == shapes


def test_logits_that_rise_from_tile_to_tile_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logit comes last: all that was summed before shrinks to almost nothing."""
    monkeypatch.setattr(loss_module, "TILE", 2)
    hidden = torch.ones(1, 1, requires_grad=True)
    weight, target = torch.tensor([[-500.0], [0.0], [200.0], [499.0], [500.0]]), torch.tensor([3])
    loss = LinearCrossEntropy.apply(hidden, weight, None, target, 1.0, None)
    loss.backward()
    expected = F.cross_entropy(weight.T, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    p = weight.flatten().softmax(0)
    assert hidden.grad.item() == pytest.approx((p @ weight).item() - 499.0, rel=1e-5)


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError, RuntimeError])
def test_a_decoder_that_cannot_be_run_alone_means_no_head(
    error: type[Exception], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error("not alone")

    model = tiny("llama")
    decoder = copy.copy(model.model)
    decoder.forward = refuse
    monkeypatch.setattr(model, "get_decoder", lambda: decoder)
    assert find_head(model) is None


def test_a_head_is_recognised_only_if_it_gives_the_models_logits(tiny: Tiny) -> None:
    model = tiny("llama")
    assert find_head(model) is not None
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    model.forward = _shift(model.forward)
    assert find_head(model) is None


def _shift(forward: Callable[..., Any]) -> Callable[..., Any]:
    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output

    return shifted
