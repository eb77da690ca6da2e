"""What holds for every family, dtype and configuration."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafit import (
    INITS,
    VARIANTS,
    Batches,
    LoraConfig,
    add_lora,
    calibrate,
    count_parameters,
    find_targets,
    load_lora,
    lora_disabled,
    merge_lora,
    save_lora,
    unload_lora,
)

Tiny = Callable[..., Any]
WITHOUT_DATA = [name for name, init in INITS.items() if init.statistic is None]
FAMILY = {"Linear": "llama", "Conv1D": "gpt2"}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def in_peft(model: nn.Module, path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(path), autocast_adapter_dtype=False).double().eval()


def digest(model: nn.Module, only: str = "") -> str:
    """Names, flags, identities and every byte of the parameters and buffers whose name holds `only`."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only in name:
            found.update(f"{name} {tensor.requires_grad} {tensor.dtype} {id(tensor)}".encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(
    family: str, variant: str, dtype: torch.dtype, tiny: Tiny, token_ids: Tiny, without_experts: Tiny
) -> None:
    for init in ("kaiming", "pissa"):
        model = tiny(family).to(dtype)
        raw = logits(model, token_ids())
        add_lora(model, LoraConfig(r=4, init=init, variant=variant, dropout=0.1, **without_experts(family)))
        assert torch.equal(logits(model, token_ids()), raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", [*INITS, "pissa_niter_1"])
def test_every_init_in_every_formula(
    init: str, variant: str, kind: str, dtype: torch.dtype, tiny: Tiny, examples: Tiny, token_ids: Tiny, tmp_path: Path
) -> None:
    """The base is its own at step 0 and ever after; what is learned is the dense formula, here and in PEFT."""
    model = tiny(FAMILY[kind]).to(dtype)
    raw, base, rounding = logits(model, token_ids()), values(model), 1e-6 if dtype == torch.float32 else 0.02
    config = LoraConfig(r=4, alpha=6, init=init, variant=variant)
    add_lora(model, *calibrate(model, config, Batches(examples(6), 3)))
    start = logits(model, token_ids())
    if init == "gaussian_both":
        assert not torch.equal(start, raw)
    elif init == "orthogonal":
        assert (start - raw).norm() <= rounding * raw.norm()
    else:
        assert torch.equal(start, raw)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_lora(model, tmp_path)
    learned = logits(model, token_ids())
    with lora_disabled(model):
        assert torch.equal(logits(model, token_ids()), raw)

    exact = tiny(FAMILY[kind]).to(dtype).double()
    load_lora(exact, tmp_path)
    if dtype == torch.float32:  # in float64 all that follows is the same for both
        theirs = in_peft(tiny(FAMILY[kind]).double(), tmp_path)
        torch.testing.assert_close(logits(exact, token_ids()), logits(theirs, token_ids()), rtol=0, atol=1e-12)
    merge_lora(exact)
    dense = logits(exact, token_ids())
    assert (learned - dense).norm() <= rounding * dense.norm()

    unload_lora(model)
    assert torch.equal(logits(model, token_ids()), raw)
    assert all(torch.equal(a, b) for a, b in zip(values(model), base, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_on_everything_is_the_base_bit_for_bit(dtype: torch.dtype, tiny: Tiny, token_ids: Tiny) -> None:
    for family in ("llama", "gemma3_text", "gpt2", "bloom"):
        model = tiny(family).to(dtype)
        raw = logits(model, token_ids())
        plan = add_lora(model, LoraConfig(targets=r".*"))
        assert any(target.shape[1] == 96 for target in plan.targets)  # an embedding is among them
        assert torch.equal(logits(model, token_ids()), raw)


settings.register_profile(
    "models", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONFIGS = st.builds(
    LoraConfig,
    r=st.integers(1, 12),
    alpha=st.floats(0.5, 64),
    dropout=st.sampled_from([0.0, 0.3]),
    targets=st.sampled_from(["all-linear", ("k_proj", "down_proj"), r".*layers\.1\..*", ("lm_head", "o_proj")]),
    layers=st.sampled_from([None, (1,)]),
    init=st.sampled_from(WITHOUT_DATA),
    variant=st.sampled_from(list(VARIANTS)),
    rslora=st.booleans(),
    rank_pattern=st.sampled_from([{}, {r".*": 5}]),
    train_modules=st.sampled_from([(), ("norm",), ("layers.0.mlp",), ("embed_tokens", "norm")]),
).filter(lambda config: config.layers is None or config.targets != ("lm_head", "o_proj"))


@settings(settings.get_profile("models"))
@given(config=CONFIGS, flags=st.integers(0, 2**10), training=st.booleans(), tied=st.booleans())
def test_adding_and_unloading_is_nothing(
    config: LoraConfig, flags: int, training: bool, tied: bool, tiny: Tiny
) -> None:
    model = tiny("llama", tie_word_embeddings=tied).train(training)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(flags >> number % 10 & 1))
    before, modules = digest(model), [type(module) for module in model.modules()]
    expected = find_targets(model, config)
    plan = add_lora(model, config)
    assert plan == expected
    assert (plan.trainable, plan.total) == (count_parameters(model).trainable, count_parameters(model).total)
    unload_lora(model)
    assert digest(model) == before
    assert [type(module) for module in model.modules()] == modules


@settings(settings.get_profile("models"), max_examples=12)
@given(config=CONFIGS, tied=st.booleans(), seed=st.integers(0, 99))
def test_saved_loaded_disabled_and_merged(
    config: LoraConfig,
    tied: bool,
    seed: int,
    tiny: Tiny,
    shaken: Tiny,
    token_ids: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path: Path = tmp_path_factory.mktemp("adapter")
    model = tiny("llama", tie_word_embeddings=tied)
    raw = logits(model, token_ids())
    add_lora(model, config)
    adapted = logits(shaken(model, seed), token_ids())
    with lora_disabled(model):
        assert torch.equal(logits(model, token_ids()), raw)
    save_lora(model, path)
    again = tiny("llama", tie_word_embeddings=tied)
    load_lora(again, path)
    assert torch.equal(logits(again, token_ids()), adapted)
    merge_lora(again.double())
    exact = logits(model.double(), token_ids())
    assert (logits(again, token_ids()) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_the_adapter_and_not_one_byte_of_the_base(
    family: str, variant: str, tiny: Tiny, token_ids: Tiny, without_experts: Tiny
) -> None:
    model = tiny(family).train()
    add_lora(model, LoraConfig(r=4, variant=variant, dropout=0.1, **without_experts(family)))
    base, adapter = digest(model, "base_layer"), digest(model, "lora_")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert digest(model, "base_layer") == base
    assert digest(model, "lora_") != adapter


def test_dropout_is_inactive_outside_training(
    family: str, tiny: Tiny, shaken: Tiny, token_ids: Tiny, without_experts: Tiny
) -> None:
    results = []
    for dropout in (0.0, 0.5):
        model = tiny(family)
        torch.manual_seed(0)
        add_lora(model, LoraConfig(r=4, dropout=dropout, **without_experts(family)))
        results.append(logits(shaken(model).eval(), token_ids()))
    assert torch.equal(*results)


def test_the_same_seed_makes_the_same_adapter(tiny: Tiny) -> None:
    made = []
    for seed in (1, 1, 2):
        model = tiny("llama")
        torch.manual_seed(seed)
        add_lora(model)
        made.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
