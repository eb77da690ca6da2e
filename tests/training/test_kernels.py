"""Liger's kernels, played by a stand-in that does to a model what liger-kernel 0.8.5 does."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.training import kernels
from lorafit.training.kernels import fast_kernels

Tiny = Callable[..., nn.Module]


class Liger:
    """`apply` binds forwards to the norms and replaces names in the file of the model."""

    def __init__(self, factor: float = 1.0, error: Exception | None = None) -> None:
        self.factor, self.error = factor, error
        self.asked: dict[str, Any] = {}
        self.calls = 0

    def apply(self, model: Any, **kwargs: Any) -> None:
        self.asked = kwargs
        modeling_llama.apply_rotary_pos_emb = self.rotate(modeling_llama.apply_rotary_pos_emb)
        modeling_llama.LlamaRMSNorm = nn.LayerNorm
        for norm in [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]:
            norm.in_place = True
            norm.forward = self.normed(norm, norm.forward)
        if self.error:
            raise self.error

    def normed(self, norm: nn.Module, forward: Any) -> Any:
        def fast(states: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            result: torch.Tensor = forward(states) + (self.factor - 1) * states.flip(-1)
            return result

        return fast

    def rotate(self, own: Any) -> Any:
        return lambda *args, **kwargs: own(*args, **kwargs)


def state(model: nn.Module) -> list[dict[str, Any]]:
    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    return [dict(vars(m)) for m in model.modules()] + [{name: getattr(modeling_llama, name) for name in names}]


def install(monkeypatch: pytest.MonkeyPatch, liger: Liger, *, cuda: bool = True) -> None:
    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = liger.apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    if cuda:
        monkeypatch.setattr(kernels, "_on_cuda", lambda model: True)


def test_they_are_used_in_training_and_given_back(tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, liger, notes = tiny("llama"), Liger(), list[str]()
    add_lora(model, LoraConfig(r=4))
    install(monkeypatch, liger)
    before = state(model)
    train(model, Batches(examples(8), 8), TrainConfig(steps=1, keep_best=False), on_note=notes.append)
    assert notes == []
    assert liger.asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger.calls >= 2 * 5  # the trial and the step
    assert state(model) == before


@pytest.mark.parametrize(
    ("liger", "said"),
    [
        (Liger(factor=1.2), "liger-kernel is not used (its logits differ)"),
        (Liger(error=RuntimeError("no\ntriton")), "liger-kernel is not used (RuntimeError: no triton)"),
    ],
)
def test_what_differs_or_fails_is_undone_and_said(
    liger: Liger, said: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = tiny("llama"), list[str]()
    install(monkeypatch, liger)
    before = state(model)
    with fast_kernels(model, notes.append):
        assert state(model) == before
    assert notes == [said]
    assert state(model) == before


def test_an_error_in_training_gives_them_back_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    install(monkeypatch, Liger())
    before = state(model)

    def fail() -> None:
        with fast_kernels(model):
            assert state(model) != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state(model) == before


def test_elsewhere_nothing_happens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, liger = tiny("llama"), Liger()
    before = state(model)
    install(monkeypatch, liger, cuda=False)
    with fast_kernels(model):
        assert state(model) == before
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setattr(kernels, "_on_cuda", lambda model: True)
    with fast_kernels(model):
        assert state(model) == before
    assert liger.calls == 0
