"""The loss equals the model's own, and the hand-written head equals autograd."""

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


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 1.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_head_and_cross_entropy_equal_autograd(
    scale: float, cap: float | None, bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, vocab = 7, 5, 11
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * vocab * chunk)
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


@pytest.mark.parametrize("train_head", ["lora", "full", "no"])
def test_a_trained_head_gets_its_gradient(train_head: str, tiny: Tiny, examples: Any) -> None:
    """The head wrapped by LoRA, trained in full, or reached without `find_head`: all equal autograd on full logits."""
    model = tiny("llama")
    config = {
        "lora": LoraConfig(r=4, targets=("q_proj", "lm_head"), init="gaussian_both"),
        "full": LoraConfig(r=4, targets=("q_proj",), train_modules=("lm_head",), init="gaussian_both"),
        "no": LoraConfig(r=4, targets=("q_proj",), init="gaussian_both"),
    }[train_head]
    add_lora(model, config)
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
