"""An init and a formula of one's own, from outside the package: they work, are saved, or are refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafit import INITS, VARIANTS, LoraConfig, LoraLinear, add_lora, init, load_lora, merge_lora, save_lora
from lorafit.errors import UsageError
from lorafit.lora.inits import Init
from lorafit.lora.weights import read_weight

Tiny = Callable[..., Any]


class UnitLinear(LoraLinear):
    """y = W x + b + s·B·(A/‖A‖) x, the norm taken over each row of A."""

    @property
    def update(self) -> tuple[Tensor, Tensor]:
        A, B = super().update
        return F.normalize(A, dim=1), B


class HadamardLinear(LoraLinear):
    """y = (W ⊙ (1 + s·B·A)) x + b"""

    def merged_weight(self) -> Tensor:
        return read_weight(self.base_layer) * (1 + self.delta())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.bias)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    @init("first rows", "kept")
    def first_rows(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        return W[:r].clone(), torch.eye(len(W), r) / s

    VARIANTS.update({"unit": UnitLinear, "hadamard": HadamardLinear})
    yield
    del INITS["first rows"], VARIANTS["unit"], VARIANTS["hadamard"]


def test_miss_is_lora_with_a_fixed_a() -> None:
    """The init of docs/methods.md beside PEFT's layer, with one D."""
    peft = pytest.importorskip("peft")
    base, x, D = torch.nn.Linear(12, 10), torch.randn(5, 12), torch.randn(10, 4)
    theirs = peft.get_peft_model(torch.nn.Sequential(base), peft.MissConfig(r=4, target_modules=["0"]))
    theirs.base_model.model[0].miss_block["default"].data.copy_(D.T)

    def shards(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        return torch.eye(r).repeat(1, -(-W.shape[1] // r))[:, : W.shape[1]] / s, torch.zeros(len(W), r)

    ours = LoraLinear(base, r=4, alpha=6, init=Init("shards", shards))
    ours.lora_B.weight.data.copy_(D)
    torch.testing.assert_close(ours(x), theirs(x))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("start", "variant"), [("first rows", "lora"), ("first rows", "dora"), ("kaiming", "unit")])
def test_they_start_as_the_base_and_are_saved_as_what_they_compute(
    start: str, variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    raw = logits(model, token_ids())
    plan = add_lora(model, LoraConfig(r=4, init=start, variant=variant))
    assert torch.equal(logits(model, token_ids()), raw)
    learned = logits(shaken(model), token_ids())
    save_lora(model, tmp_path)
    again = tiny("llama")
    loaded = load_lora(again, tmp_path)
    assert (loaded.config.init, loaded.trainable) == (start, plan.trainable)
    torch.testing.assert_close(logits(again, token_ids()), learned)
    merge_lora(model)
    torch.testing.assert_close(logits(model, token_ids()), learned, rtol=1e-4, atol=1e-5)


def test_a_start_is_still_kept_where_its_init_is_not_known(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, init="first rows"))
    save_lora(shaken(model), tmp_path)
    known = INITS.pop("first rows")
    again = tiny("llama")
    assert {target.r for target in load_lora(again, tmp_path).targets} == {4}
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
    INITS["first rows"] = known


def test_what_peft_has_no_words_for_is_not_saved_as_something_else(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, variant="hadamard"))
    learned = logits(shaken(model), token_ids())
    with pytest.raises(UsageError, match=r"'hadamard' is not W \+ s·B·A: PEFT's format has no words"):
        save_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    merge_lora(model)
    torch.testing.assert_close(logits(model, token_ids()), learned)
