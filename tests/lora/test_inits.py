"""Each start beside an independent computation: PEFT's, where it has one and is right, else float64."""

import math
from typing import Any

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit import INITS, LoraLinear
from lorafit.errors import UsageError
from lorafit.lora.inits import GAMMA, Moments, explained, find_init
from lorafit.lora.weights import read_weight

IN, OUT, R, ALPHA = 40, 56, 6, 15.0
S = ALPHA / R


def made(kind: str = "Linear") -> nn.Module:
    return Conv1D(OUT, IN) if kind == "Conv1D" else nn.Linear(IN, OUT)


def in_peft(layer: nn.Module, init: str) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's A, B and what it leaves of W."""
    model = nn.Sequential(layer)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init, fan_in_fan_out=isinstance(layer, Conv1D)
    )
    wrapped: Any = peft.get_peft_model(model, config).base_model.model[0]
    if init == "orthogonal":  # once more, with random numbers of its own only
        torch.manual_seed(0)
        wrapped.orthogonal_init("default")
    A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    return A.detach(), B.detach(), read_weight(wrapped.base_layer).detach().clone()


def same_up_to_signs(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Row by row, each to its sign."""
    signs = torch.sign((ours * theirs).sum(dim=1, keepdim=True))
    torch.testing.assert_close(ours * signs, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def best(M: Tensor, n: int) -> Tensor:
    """The best approximation of M of rank n, by the eigenvectors of M·Mᵀ."""
    _, vectors = torch.linalg.eigh(M.double() @ M.double().T)
    U = vectors[:, -n:]
    return U @ U.T @ M.double()


def data(count: int = 200) -> Tensor:
    """Inputs with a mean, and directions that count unequally."""
    basis = torch.linalg.qr(torch.randn(IN, IN)).Q
    return (torch.randn(count, IN) * 0.85 ** torch.arange(IN)) @ basis + torch.randn(IN)


def moments(x: Tensor, *cuts: int) -> Moments:
    found = Moments(0, torch.zeros(IN, dtype=x.dtype), torch.zeros(IN, IN, dtype=x.dtype))
    for part in torch.tensor_split(x, cuts):
        found.add(part)
    return found


# OLoRA over a Conv1D is not right in PEFT: it factorises the transpose, and its A and B do not fit the layer.
@pytest.mark.parametrize(
    ("name", "kind"),
    [("pissa", "Linear"), ("pissa", "Conv1D"), ("olora", "Linear"), ("orthogonal", "Linear"), ("orthogonal", "Conv1D")],
)
def test_as_in_peft(name: str, kind: str) -> None:
    layer = made(kind)
    W = read_weight(layer).detach().clone()
    torch.manual_seed(0)
    A, B = INITS[name](W, R, S)
    theirs = in_peft(layer, name)
    torch.testing.assert_close(A, theirs[0])
    torch.testing.assert_close(B, theirs[1])
    if name != "orthogonal":
        torch.testing.assert_close(W - S * B @ A, theirs[2])


def test_pissa_and_milora_are_the_two_ends_of_w() -> None:
    W = torch.randn(OUT, IN)
    A, B = INITS["pissa"](W, R, S)
    torch.testing.assert_close((S * B @ A).double(), best(W, R), rtol=0, atol=1e-5)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-4)  # what is large is split evenly
    A, B = INITS["milora"](W, R, S)
    torch.testing.assert_close((S * B @ A).double(), W.double() - best(W, IN - R), rtol=0, atol=1e-5)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-5)


def test_the_randomised_pissa_comes_closer_with_each_round() -> None:
    W = torch.randn(200, 150)
    errors = []
    for rounds in (0, 2, 16):
        A, B = find_init(f"pissa_niter_{rounds}")(W, R, S)
        errors.append(((S * B @ A).double() - best(W, R)).norm().item() / W.norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
    with pytest.raises(UsageError, match="did you mean 'pissa_niter_4'"):
        find_init("pissa_niter_x")


@pytest.mark.parametrize("r", [1, 5, 6])
def test_orthogonal_starts_at_zero_though_neither_factor_does(r: int) -> None:
    A, B = INITS["orthogonal"](torch.zeros(OUT, IN), r, S)
    assert (A.shape, B.shape) == ((r, IN), (OUT, r))
    assert (B @ A).abs().max() < 1e-6
    assert (r == 1) != bool(B.any())


def test_moments_are_those_of_all_rows_at_once() -> None:
    x = data(300).double()
    found = moments(x, 1, 7, 150)
    centred = x - x.mean(dim=0)
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    torch.testing.assert_close(found.scatter, centred.T @ centred)
    torch.testing.assert_close(found.second, x.T @ x / 300)


def test_eva_is_pefts_principal_components() -> None:
    x = data()
    inputs = moments(x, 30, 90)
    A, B = INITS["eva"](torch.zeros(OUT, IN), R, S, inputs)
    assert not B.any()
    pca = IncrementalPCA(n_components=IN // 2, lowrank=True, lowrank_seed=42)  # as its EVA hook, with all directions
    pca.partial_fit(x.clone())
    same_up_to_signs(A, pca.components_[:R])
    torch.testing.assert_close(explained(inputs)[:R], pca.explained_variance_ratio_[:R], rtol=1e-4, atol=0)
    torch.testing.assert_close(A @ A.T, torch.eye(R))


def test_lora_ga_is_the_papers_where_peft_is_not() -> None:
    """PEFT multiplies B by the singular values of G, so that it depends on the size of the loss, and A by nothing."""
    G = torch.randn(OUT, IN) @ torch.diag(0.7 ** torch.arange(IN))
    A, B = INITS["lora_ga"](torch.zeros(OUT, IN), R, S, G)
    scale = OUT**0.25 / GAMMA["lora_ga"] ** 0.5
    U, _, Vh = torch.linalg.svd(G.double())
    same_up_to_signs(A, (scale * Vh[:R]).float())
    same_up_to_signs(B.T, (scale * U[:, R : 2 * R].T).float())
    again = INITS["lora_ga"](torch.zeros(OUT, IN), R, S, 1e-3 * G)
    same_up_to_signs(again[0], A)

    layer = made()
    layer._peft_loraga_grad = G.clone()
    model = nn.Sequential(layer)
    about = peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=about
    )
    wrapped: Any = peft.get_peft_model(model, config).base_model.model[0]
    theirs = wrapped.lora_A["default"].weight.detach(), wrapped.lora_B["default"].weight.detach()
    same_up_to_signs(A / A.norm(dim=1, keepdim=True), theirs[0])  # the directions are the same
    same_up_to_signs((B / B.norm(dim=0)).T, (theirs[1] / theirs[1].norm(dim=0)).T)
    assert not torch.allclose(theirs[1].norm(dim=0), theirs[1].norm(dim=0)[0].expand(R), rtol=0.1)


def test_lora_one_is_the_best_step_of_rank_r() -> None:
    G = torch.randn(OUT, IN) @ torch.diag(0.7 ** torch.arange(IN))
    A, B = INITS["lora_one"](torch.zeros(OUT, IN), R, S, G)
    largest = torch.linalg.matrix_norm(G.double(), 2)
    step = GAMMA["lora_one"] * largest * (B.double() @ A.double())
    torch.testing.assert_close(step, best(-G, R), rtol=0, atol=1e-4 * largest.item())
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("corda", slice(None, R)), ("corda_kpm", slice(-R, None))])
def test_corda_is_the_papers_without_its_inverse(name: str, part: slice) -> None:
    """W·C = U·S·Vᵀ, s·B·A = U·S·Vᵀ·C⁻¹. (PEFT has it so, in a module that imports a package it does not ask for.)"""
    x = data(400).double()
    W = torch.randn(OUT, IN, dtype=torch.float64)
    A, B = INITS[name](W, R, S, moments(x))
    C = x.T @ x / 400
    C += 0.01 * C.diagonal().mean() * torch.eye(IN)
    U, values, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    torch.testing.assert_close(S * B @ A, (U[:, part] * values[part]) @ Vh[part] @ torch.linalg.inv(C))
    torch.testing.assert_close(A @ C @ C @ A.T * C.diagonal().mean() ** -2, B.T @ B, rtol=0.05, atol=1e-6)
    torch.testing.assert_close(INITS[name](W, R, S, moments(100 * x))[1], B)  # the scale of x stays out of it


@pytest.mark.parametrize("name", [name for name in INITS if INITS[name].statistic is None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_are_wide_and_of_the_right_shape(name: str, dtype: torch.dtype) -> None:
    A, B = INITS[name](torch.randn(OUT, IN).to(dtype), R, S)
    assert {A.dtype, B.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (A.shape, B.shape) == ((R, IN), (OUT, R))


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "milora", "olora"])
def test_more_directions_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="needs 6 directions, and there are 5: lower r, or exclude it"):
        find_init(name)(torch.randn(5, 9), 6, 1.0)


def test_without_its_data_an_init_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"'eva' looks at data: add_lora\(model, \*calibrate"):
        LoraLinear(nn.Linear(3, 3), init="eva")
    assert math.isclose(S, LoraLinear(nn.Linear(9, 9), r=R, alpha=ALPHA).scale)
