"""--compile: the same losses, no compiling without end, and a model that is as before.

All tests but one stop short of machine code, which takes long: what could go wrong with us is in the graphs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.lora.experts import LoraParameter
from lorafit.training import attention, compiling

Tiny = Callable[..., nn.Module]
Compiled = Callable[..., tuple[list[float], list[str], nn.Module]]


class Counting:
    """A compiler that keeps the graphs as they are, and counts how many it is given and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1

        def forward(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return forward


@pytest.fixture(scope="module")
def compiler() -> Iterator[Counting]:
    """One for all tests of this file, so that what one has compiled is there for the next."""
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.fixture
def run(tiny: Tiny, examples: Any, compiler: Counting, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    monkeypatch.setattr(compiling, "BACKEND", compiler)

    def run(family: str = "llama", lora: dict[str, Any] | None = None, **config: Any) -> Any:
        model = tiny(family)
        torch.manual_seed(3)
        add_lora(model, LoraConfig(**{"r": 4, "init": "gaussian_both", **(lora or {})}))
        notes: list[str] = []
        rows = Batches(examples(24), 4, seed=1)
        held_out = Batches(examples(8, seed=4), 4) if "eval_every" in config else None
        config = {"steps": 6, "lr": 1e-3, **config}
        result = train(model, rows, TrainConfig(**config), evaluation=held_out, on_note=notes.append)
        losses = [record["loss"] for record in result.history] + list(result.evaluations.values())
        return losses, notes, model

    return run


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_losses_are_the_same(family: str, checkpointing: bool, run: Compiled) -> None:
    plain, _, _ = run(family)
    losses, notes, _ = run(family, compile=True, checkpointing=checkpointing)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert not [note for note in notes if "compil" in note]


@pytest.mark.slow
def test_dora_too(run: Compiled) -> None:
    lora = {"variant": "dora"}
    assert run(lora=lora, compile=True)[0] == pytest.approx(run(lora=lora)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_too(family: str, run: Compiled, compiler: Counting) -> None:
    """Adapted stacks stand in for a parameter while its module runs; the tokens that an expert meets differ by pass."""
    plain, _, model = run(family, steps=3)
    assert any(isinstance(module, LoraParameter) for module in model.modules())
    graphs = compiler.graphs
    losses, notes, _ = run(family, steps=3, compile=True)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert not [note for note in notes if "compil" in note]
    assert compiler.graphs > graphs


@pytest.mark.slow
def test_with_dropout_it_learns_all_the_same_and_is_a_function_of_the_seed(run: Compiled) -> None:
    one, other = (run(lora={"dropout": 0.3}, compile=True, checkpointing=flag)[0] for flag in (False, True))
    assert one == pytest.approx(other, rel=1e-5)


def test_held_out_losses_are_the_same_and_nothing_is_compiled_for_them(run: Compiled, compiler: Counting) -> None:
    run(compile=True)
    graphs = compiler.graphs
    assert run(compile=True, eval_every=3)[0] == pytest.approx(run(eval_every=3)[0], rel=1e-5)
    assert compiler.graphs == graphs > 0


def test_it_is_not_compiled_again_for_every_length(run: Compiled, compiler: Counting) -> None:
    run(compile=True, steps=3)
    graphs, runs = compiler.graphs, compiler.runs
    run(compile=True, steps=18)
    assert compiler.graphs == graphs > 0
    assert compiler.runs - runs >= 18 * 2 * 2  # steps, blocks, and graphs before and after attention


def test_attention_is_not_compiled(run: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    rows = attention._rows

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return rows(*args)

    monkeypatch.setattr(attention, "_rows", watched)
    run(compile=True)
    assert seen
    assert not any(seen)


def test_the_model_and_the_attention_are_as_before(run: Compiled) -> None:
    _, _, model = run(compile=True)
    assert not any("forward" in vars(module) for module in model.modules())
    assert attention.AttentionInterface()[attention.NAME] is attention.attend
    assert all(parameter.grad is None for parameter in model.parameters())


def test_where_it_fails_one_line_says_so_and_the_run_goes_on(run: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = run()

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    losses, notes, model = run(compile=True)
    assert len(notes) == 1
    assert notes[0].startswith("compiling does not work here (")
    assert notes[0].endswith("the run goes on without")
    assert "\n" not in notes[0]
    assert losses == plain
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_compiler_that_computes_something_else_is_not_used(run: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = run()

    def wrong(forward: Any, **options: Any) -> Any:
        return lambda *args, **kwargs: 1.3 * forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", wrong)
    losses, notes, _ = run(compile=True)
    assert "where" in notes[0]
    assert losses == plain


def test_a_model_without_blocks_is_told() -> None:
    notes: list[str] = []
    with compiling.compiled(nn.Linear(2, 2), lambda batch: torch.zeros(()), True, notes.append):
        pass
    assert notes == ["Linear has no list of blocks: it is trained without compiling"]


@pytest.mark.slow
def test_machine_code_gives_the_same_losses(run: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = run("qwen2")
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    losses, notes, _ = run("qwen2", compile=True)
    assert notes == [] or "does not work here" in notes[0]  # no C++ compiler
    assert losses == pytest.approx(plain, rel=1e-5)
