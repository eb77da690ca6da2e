"""Training rules against PEFT's, and against the dense matrices that they are about."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer, lorafa
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from lorafit import Batches, LoraConfig, LoraLinear, TrainConfig, add_lora, evaluate, train
from lorafit.data.batches import collate
from lorafit.errors import UsageError
from lorafit.lora.inject import wrappers
from lorafit.lora.names import key_matches
from lorafit.training.loop import begin, take_step
from lorafit.training.neftune import noisy
from lorafit.training.optim import make_optimizer
from lorafit.training.rules import RULES, held_still

Tiny = Callable[..., Any]


def adapted(tiny: Tiny, shaken: Tiny, **lora: Any) -> nn.Module:
    model = tiny("llama").double()
    torch.manual_seed(3)
    add_lora(model, LoraConfig(**{"r": 4, "alpha": 8, **lora}))
    return shaken(model)


def twin(tiny: Tiny, ours: nn.Module, **config: Any) -> Any:
    """The same adapter in PEFT."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama").double(), peft.LoraConfig(**config))
    theirs = {plain(name): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs[name].copy_(parameter)
    return model


def plain(name: str) -> str:
    """PEFT's name of a parameter in memory -> lorafit's."""
    name = name.removeprefix("base_model.model.")
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def steps(model: Any, optimizer: Any, tokens: Tensor, count: int = 4) -> dict[str, Tensor]:
    """What training left, after `count` steps of a plain loop."""
    for _ in range(count):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {plain(name): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= bound * tensor.norm(), name


# --- learning rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_plus_is_pefts(variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    ours = adapted(tiny, shaken, variant=variant)
    theirs = twin(tiny, ours, use_dora=variant == "dora")
    config = TrainConfig(lr=1e-3, lora_plus_ratio=16)
    optimizer = make_optimizer(ours, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["share"]
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert_same(steps(ours, optimizer, token_ids()), steps(theirs, other, token_ids()), 1e-9)


def rates(model: nn.Module, **config: Any) -> dict[str, float]:
    """Name -> the rate it is stepped with at the peak, as the loop sets it."""
    config = TrainConfig(**{"lr": 1e-3, **config})
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    return {names[id(p)]: config.lr * group["share"] for group in groups for p in group["params"]}


def test_a_rate_for_every_kind(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, targets=("q_proj", "embed_tokens"), train_modules=("model.norm",), variant="lora"))
    found = rates(model, lora_plus_ratio=8, lr_embeddings=5e-5, lr_modules=2e-5, lr_pattern={"layers.1.*": 7e-4})
    for name, rate in found.items():
        expected = 1e-3
        if "embed_tokens" in name:
            expected = 5e-5
        elif "norm" in name:
            expected = 2e-5
        elif "layers.1" in name:
            expected = 7e-4
        elif "lora_B" in name:
            expected = 8e-3
        assert rate == pytest.approx(expected), name
    assert len(found) == len([p for p in model.parameters() if p.requires_grad])


def test_without_a_rate_of_their_own_embeddings_and_modules_have_lr(tiny: Tiny) -> None:
    """PEFT gives LoRA+'s rate to any vector, so to a norm as well, and 1e-6 to embeddings."""
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, targets=("q_proj", "embed_tokens"), train_modules=("norm",)))
    found = rates(model, lora_plus_ratio=16)
    assert {rate for name, rate in found.items() if "q_proj.lora_B" not in name} == {1e-3}


@pytest.mark.parametrize("pattern", ["q_proj", "lora_B", "q_proj.lora_B", r"layers\.0\..*", "self_attn.q_proj.lora_A"])
def test_a_key_is_a_layer_or_a_tensor_and_the_longest_wins(pattern: str, tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, targets=("q_proj", "v_proj")))
    found = rates(model, lr_pattern={pattern: 0.5, "l.*A": 0.25} if len(pattern) > 4 else {pattern: 0.5})
    for name, rate in found.items():
        layer, _, tensor = name.removesuffix(".weight").rpartition(".")
        hit = key_matches(pattern, layer) or key_matches(pattern, f"{layer}.{tensor}")
        assert rate == (0.5 if hit else 0.25 if tensor == "lora_A" else 1e-3)
    assert 0.5 in found.values()


def test_every_rate_follows_the_schedule(tiny: Tiny, examples: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2))
    run = begin(model, Batches(examples(8), 4), TrainConfig(lr=1e-3, steps=4, lora_plus_ratio=4))
    for _ in range(4):
        run.pending = take_step(run)
        lr = run.complete()["lr"]
        assert [group["lr"] for group in run.optimizer.param_groups] == [lr, 4 * lr]


def test_one_rate_is_one_group(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2))
    assert len(make_optimizer(model, TrainConfig(lr=3e-4)).param_groups) == 1


def test_a_rate_that_nothing_has_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, targets=("q_proj",)))
    for config, said in (
        ({"lr_pattern": {"q_prj": 1e-3}}, r"lr_pattern 'q_prj' \(did you mean 'q_proj'\?\) matches nothing that is"),
        ({"lr_embeddings": 1e-5}, "^lr_embeddings: nothing of that kind is trained"),
        ({"lr_modules": 1e-5}, "^lr_modules: nothing of that kind is trained"),
    ):
        with pytest.raises(UsageError, match=said):
            make_optimizer(model, TrainConfig(**config))
    plain = tiny("llama")
    for config in ({"lora_plus_ratio": 2}, {"rule": "riemannian"}):
        with pytest.raises(UsageError, match=r"lora_plus_ratio: nothing of that|rule riemannian is about A and B"):
            make_optimizer(plain, TrainConfig(**config))
    found = rates(tiny("llama"), lr_embeddings=5e-5)  # a model trained in full
    assert [name for name, rate in found.items() if rate == 5e-5] == ["model.embed_tokens.weight"]


# --- LoRA-FA and the Riemannian rule ----------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_riemannian_rule_is_pefts(variant: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny) -> None:
    ours = adapted(tiny, shaken, variant=variant)
    theirs = twin(tiny, ours, use_dora=variant == "dora")
    optimizer = make_optimizer(ours, TrainConfig(lr=1e-3, rule="riemannian"))
    other = create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    assert_same(steps(ours, optimizer, token_ids()), steps(theirs, other, token_ids()), 1e-9)


def test_lora_fa_is_pefts_but_for_its_bf16(
    tiny: Tiny, shaken: Tiny, token_ids: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    ours = adapted(tiny, shaken, rank_pattern={"q_proj": 2})
    theirs = twin(tiny, ours, rank_pattern={"q_proj": 2})
    before = {name: p.detach().clone() for name, p in ours.named_parameters() if "lora_A" in name}
    optimizer = make_optimizer(ours, TrainConfig(lr=1e-3, rule="lora-fa", eps=1e-12))
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    other.param_groups[0]["eps"] = 1e-12  # PEFT adds it before the bias correction, torch after
    after = steps(ours, optimizer, token_ids())
    assert_same(after, steps(theirs, other, token_ids()), 1e-6)  # PEFT adds 1e-8 to the diagonal
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("r", [2, 5, 9])  # 9 rows of A in 6 dimensions: its Gram matrix has no inverse
def test_lora_fa_projects_the_gradient_of_w(r: int) -> None:
    layer = LoraLinear(nn.Linear(6, 7, bias=False).double(), r=r, alpha=3.0, init="gaussian_both")
    G = gradients(layer)
    A, B = layer.factors
    RULES["lora-fa"](layer)
    rows = torch.linalg.svd(A.detach(), full_matrices=False).Vh[: min(r, 6)]
    torch.testing.assert_close(layer.scale * B.grad @ A, G @ rows.T @ rows)


def test_the_riemannian_rule_does_not_care_how_a_product_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """B·A = (B·M)·(M⁻¹·A): one step of the product is the same, whatever M. Without the rule it is not."""
    monkeypatch.setattr("lorafit.training.rules.DAMPING", 0.0)
    layer = LoraLinear(nn.Linear(6, 7, bias=False).double(), r=3, alpha=3.0, init="gaussian_both")
    M = torch.randn(3, 3, dtype=torch.float64)
    moved = []
    for rule in (RULES["riemannian"], lambda layer: None):
        for _ in range(2):
            A, B = layer.factors
            G = gradients(layer)
            rule(layer)
            moved.append((B.grad @ A + B @ A.grad).detach())
            with torch.no_grad():
                A.copy_(torch.linalg.solve(M, A))
                B.copy_(B @ M)
    torch.testing.assert_close(moved[0], moved[1])
    assert (moved[2] - moved[3]).norm() > 0.1 * moved[2].norm()
    P, Q = (torch.linalg.svd(X.detach()).U[:, :3] for X in (B, A.T))
    torch.testing.assert_close(moved[0], layer.scale * (G @ Q @ Q.T + P @ P.T @ G))  # onto the tangent, one part twice


def gradients(layer: LoraLinear) -> Tensor:
    """Fill the gradients of A and B; returns that of the dense matrix which the layer is."""
    x = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.zero_grad()
    layer(x).square().sum().backward()
    W = layer.merged_weight().detach().requires_grad_()
    (x @ W.T).square().sum().backward()
    assert W.grad is not None
    return W.grad


def test_lora_fa_leaves_a_as_it_was_and_computes_no_gradient_for_it(tiny: Tiny, examples: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2, variant="dora"))
    layers = [layer for _, layer in wrappers(model) if isinstance(layer, LoraLinear)]
    before = [[factor.detach().clone() for factor in layer.factors] for layer in layers]
    seen: list[bool] = []

    def look(record: Any) -> None:
        seen.extend(factor.requires_grad for layer in layers for factor in layer.factors[:1])

    train(model, Batches(examples(8), 4), TrainConfig(rule="lora-fa", steps=3, lr=1e-2), on_step=look)
    assert not any(seen)
    for layer, (A, B) in zip(layers, before, strict=True):
        assert torch.equal(layer.factors[0], A)
        assert not torch.equal(layer.factors[1], B)
        assert all(factor.requires_grad for factor in layer.factors)


def test_lora_fa_keeps_no_input_of_a_layer(tiny: Tiny, examples: Tiny, kept_bytes: Any) -> None:
    """What feeds a down projection is as wide as the MLP and needed by nothing else; the other inputs are outputs of
    norms and of attention, which keep their own."""
    model = tiny("llama", intermediate_size=400).train()
    add_lora(model, LoraConfig(r=2))
    rows = examples(4)
    whole = kept_bytes(model, rows)
    with held_still(model, "lora-fa"):
        less = whole - kept_bytes(model, rows)
    tokens, blocks = sum(len(row.ids) for row in rows), 2
    assert less >= 0.9 * tokens * blocks * 400 * 4


def test_the_frozen_a_is_a_part_of_the_state(tiny: Tiny, examples: Tiny) -> None:
    """On another machine the same seed may make another A."""
    runs = []
    for seed in (1, 2):
        model = tiny("llama")
        torch.manual_seed(seed)
        add_lora(model, LoraConfig(r=2))
        runs.append(begin(model, Batches(examples(8), 4), TrainConfig(rule="lora-fa")))
    with ExitStack() as training:
        for run in runs:
            training.enter_context(held_still(run.model, "lora-fa"))
        runs[1].restore(*runs[0].state())
        one, other = (dict(run.trained()) for run in runs)
    assert one.keys() == other.keys() == {n for n, _ in runs[0].model.named_parameters() if "lora_" in n}
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_lora_fa_where_a_has_to_move_is_refused(tiny: Tiny, examples: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(targets=("embed_tokens", "q_proj")))
    with pytest.raises(UsageError, match=r"lora-fa freezes A, which is 0 in model\.embed_tokens: nothing would be"):
        train(model, Batches(examples(4), 4), TrainConfig(rule="lora-fa"))
    with pytest.raises(UsageError, match="rule lora-fa trains no A"):
        TrainConfig(rule="lora-fa", lora_plus_ratio=4)


# --- NEFTune ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_noise_of_one_row_is_that_of_transformers(family: str, tiny: Tiny, examples: Tiny) -> None:
    model = tiny(family).train()
    batch = collate(examples(1), packed=True)
    torch.manual_seed(4)
    with noisy(model, batch, 5.0):
        ours = model.get_input_embeddings()(batch.input_ids)
    handle = activate_neftune(model, 5.0)
    torch.manual_seed(4)
    theirs = model.get_input_embeddings()(batch.input_ids)
    deactivate_neftune(model, handle)
    torch.testing.assert_close(ours, theirs)
    assert (ours - model.get_input_embeddings()(batch.input_ids)).abs().max() > 0.1


@pytest.mark.parametrize("packed", [True, False])
def test_each_row_has_noise_of_its_own_length(packed: bool, tiny: Tiny, examples: Tiny) -> None:
    model, rows = tiny("llama").double(), sorted(examples(6), key=lambda row: len(row.ids))
    batch = collate(rows, packed=packed)
    embedding = model.get_input_embeddings()
    clean = embedding(batch.input_ids)
    with noisy(model, batch, 5.0):
        noise = embedding(batch.input_ids) - clean
    padded = [row[:length] for row, length in zip(noise, batch.lengths, strict=False)]
    parts = noise[0].split(list(batch.lengths)) if packed else padded
    for part, length in zip(parts, batch.lengths, strict=True):
        bound = 5.0 / (length * clean.shape[-1]) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound  # of 64 numbers and more one comes that near
    assert torch.equal(embedding(batch.input_ids), clean)


def test_evaluation_has_no_noise_and_training_has(tiny: Tiny, examples: Tiny) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=2))
    held_out, losses = Batches(examples(6), 2, shuffle=False), []
    expected = evaluate(model, held_out)
    for alpha in (0.0, 5.0, 5.0):
        config = TrainConfig(lr=1e-30, steps=1, neftune=alpha, keep_best=False)
        result = train(model, Batches(examples(8), 4), config, evaluation=held_out)
        assert result.evaluations[0] == pytest.approx(expected, rel=1e-6)
        losses.append(result.history[0]["loss"])
    assert losses[1] == losses[2] != losses[0]
