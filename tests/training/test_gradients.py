"""One buffer, of which every gradient is a view."""

import copy
import math

import pytest
import torch
from torch import nn

from lorafit.training.gradients import FlatGradients


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 5))


def backward(model: nn.Module, layers: int = 4) -> None:
    model[:layers](torch.ones(6, 3)).square().sum().backward()


def test_autograd_fills_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = net(), net()
    flat = FlatGradients(ours.parameters())
    flat.begin()
    for _ in range(2):  # two passes of a step add up
        backward(ours)
        backward(theirs)
    (buffer,) = flat.buffers
    assert torch.equal(buffer, torch.cat([p.grad.flatten() for p in theirs.parameters()]))
    assert all(p.grad.untyped_storage().data_ptr() == buffer.data_ptr() for p in ours.parameters())


def test_a_step_begins_with_zeros_whatever_was_there() -> None:
    model = net()
    flat = FlatGradients(model.parameters())
    flat.begin()
    backward(model)
    model[0].weight.grad = torch.ones(4, 3)  # somebody else's
    model[2].zero_grad(set_to_none=True)
    flat.begin()
    assert all(not p.grad.any() for p in model.parameters())
    backward(model, layers=3)
    expected = net()
    backward(expected, layers=3)
    for (name, p), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, torch.zeros_like(p) if name.startswith("3") else other.grad)  # not used: zero
    flat.end()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_clipping_is_torchs(limit: float | None) -> None:
    """Over two precisions at once, as with a module trained in full in bf16."""
    ours = net()
    ours[2].double()
    ours[3].double()
    theirs = copy.deepcopy(ours)
    flat = FlatGradients(ours.parameters())
    assert len(flat.buffers) == 2
    flat.begin()
    for model in (ours, theirs):
        model[2:](model[:2](torch.ones(6, 3)).double()).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if limit is None else limit)
    assert flat.clip(limit) == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-6, atol=0)


def test_a_norm_that_is_no_number_is_said() -> None:
    model = net()
    flat = FlatGradients(model.parameters())
    flat.begin()
    model[0].weight.grad[0, 0] = torch.nan
    assert math.isnan(flat.clip(1.0))
