"""Memory: the estimate against what autograd keeps, what is free, passes that are cut to it, and what if not."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.speed import measure
from lorafit import Batches, LoraConfig, TrainConfig, add_lora, evaluate, train
from lorafit.data.batches import Batch, collate
from lorafit.data.chat import Example
from lorafit.errors import Interrupted, OutOfMemory
from lorafit.training import memory
from lorafit.training.backoff import PassLimit, PassTooLarge, out_of_memory
from lorafit.training.loop import begin, plan_passes, take_step
from lorafit.training.loss import find_head
from lorafit.training.memory import Need, automatic_limit, free_memory, need
from lorafit.training.run import Passes

Tiny = Callable[..., nn.Module]
CPU = torch.device("cpu")
ERRORS = {
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
}
SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "vocab_size": 500}


def adapted(tiny: Tiny, family: str = "llama", dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    model = tiny(family, **sizes).to(dtype)
    torch.manual_seed(3)
    add_lora(model, LoraConfig(r=4, init="gaussian_both"))
    return model


def row(length: int) -> Example:
    return Example(ids=[5] * length, labels=[5] * length, source=f"row of {length}")


# --- the estimate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 120])
@pytest.mark.parametrize(("family", "low", "high"), [("llama", 0.7, 1.3), ("gpt2", 0.4, 1.1), ("mixtral", 0.7, 1.5)])
def test_the_estimate_is_about_what_autograd_keeps(
    family: str, low: float, high: float, length: int, dtype: torch.dtype, tiny: Tiny, kept_bytes: Any
) -> None:
    sizes = {"n_embd": 128, "n_layer": 3, "vocab_size": 500} if family == "gpt2" else {**SIZES, "head_dim": 32}
    model = adapted(tiny, family, dtype, **sizes).train()
    measured = kept_bytes(model, [row(length)] * 4) / (4 * length)
    assert low <= need(model).token / measured <= high


@pytest.mark.skipif(not measure.forget_peak(), reason="the system does not say how much memory was needed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_made_whole_are_counted_whole(dtype: torch.dtype, tiny: Tiny) -> None:
    """LoRA on the head: by what the process takes while the loss goes forward and back."""
    vocab, n = 45_000, 400  # in both precisions above 32 MiB, which the allocator gives back at once
    model = tiny(vocab_size=vocab, family="llama").to(dtype)
    tiled = need(model.requires_grad_(False)).logits
    add_lora(model, LoraConfig(r=2, targets=("lm_head",)))
    assert tiled == memory.LOGIT * memory.TILE < need(model).logits
    head, hidden = find_head(model), torch.randn(n, 32).to(dtype).requires_grad_()
    assert head is not None
    targets = torch.randint(vocab, (n,))
    peaks = []
    for _ in range(2):  # the second time, what a first call loads is there
        measure.forget_peak()
        before = measure.memory("VmRSS")
        logits = head.logits(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        del logits
        loss.backward()
        peaks.append(measure.memory("VmHWM") - before)
    assert 0.6 <= need(model).logits * n / peaks[1] <= 1.4


def test_tokens_are_the_most_that_activations_allow() -> None:
    what = Need(base=0, adapter=0, token=100, logits=40)
    most = what.tokens(10**5)
    assert what.activations(most) <= 10**5 < what.activations(most + 1)
    assert what.tokens(-5) == 1


def test_checkpointing_is_part_of_the_estimate(tiny: Tiny) -> None:
    model = adapted(tiny, num_hidden_layers=8)
    assert need(model, checkpointing=True).token < 0.3 * need(model).token


# --- what is free ------------------------------------------------------------------------------------


def test_something_is_free_here() -> None:
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts_and_its_cache_is_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, line = (tmp_path, "0::/a/b") if version == 2 else (tmp_path / "memory", "4:cpu:/x\n7:memory:/a/b")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    for folder, limit, used in (
        ("a/b", "max" if version == 2 else str(2**62), 10),
        ("a", "1000", 900),
        (".", "5000", 0),
    ):
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / names[0]).write_text(f"{limit}\n")
        (top / folder / names[1]).write_text(f"{used}\n")
        (top / folder / "memory.stat").write_text(f"anon 5\n{key} 50\n")
    membership = tmp_path / "cgroup"
    membership.write_text(line + "\n")
    assert min(memory._left_in_groups(membership, tmp_path)) == 150
    assert not list(memory._left_in_groups(tmp_path / "none", tmp_path))


# --- the limit ---------------------------------------------------------------------------------------


def test_with_plenty_of_memory_nothing_is_cut_and_with_little_everything_fits(
    tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = adapted(tiny), examples(16)
    batches = Batches(rows, 16)
    monkeypatch.setattr("lorafit.training.memory.free_memory", lambda device: 2**36)
    assert len(plan_passes(model, batches).window(batches, 0)) == 1
    what, longest = need(model), max(len(example.ids) for example in rows)
    little = int((what.token + what.logits) * 2 * longest / memory.USED + what.adapter)
    monkeypatch.setattr("lorafit.training.memory.free_memory", lambda device: little)
    passes = plan_passes(model, batches)
    cut = passes.window(batches, 0)
    assert passes.limit.tokens is not None
    assert 1 < len(cut) < 16
    assert all(batch.input_ids.numel() <= passes.limit.tokens for batch in cut)
    assert what.adapter * 3 / 4 + what.activations(max(batch.input_ids.numel() for batch in cut)) < 0.9 * little
    assert len(plan_passes(model, batches, checkpointing=True).window(batches, 0)) < len(cut)
    assert automatic_limit(model, Batches(rows, 16, max_tokens_per_pack=70)) is None  # what is asked for is done


def test_where_nobody_says_what_is_free_nothing_is_cut(
    tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.training.memory.free_memory", lambda device: None)
    assert automatic_limit(adapted(tiny), Batches(examples(3))) is None


def test_a_resumed_run_cuts_as_it_began(
    tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bit for bit, although the memory that is free has changed in between."""

    def run(free: int, **options: Any) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("lorafit.training.memory.free_memory", lambda device: free)
        model = adapted(tiny, dtype=torch.float32)
        train(model, Batches(examples(16), 8), TrainConfig(lr=1e-2, epochs=2, save_every=0), **options)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    little = int(adapter_and(70, adapted(tiny, dtype=torch.float32)))
    whole, uncut = run(little), run(2**40)
    assert any(not torch.equal(whole[name], uncut[name]) for name in whole)  # else this test would show nothing
    polls = iter(range(4))
    with pytest.raises(Interrupted):
        run(little, checkpoints=tmp_path, stop=lambda: None if next(polls, None) is not None else "SIGTEST")
    resumed = run(2**40, resume=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def adapter_and(tokens: int, model: nn.Module) -> float:
    what = need(model)
    return what.adapter + what.activations(tokens) / memory.USED


# --- backing off -------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, numbers: set[int], error: Exception, *, late: bool = False) -> list[int]:
    """Passes with these numbers run out of memory, forward or (`late`) backward; returns all sizes."""
    sizes: list[int] = []
    plain = Passes.loss

    def loss(passes: Passes, model: nn.Module, batch: Batch, divide_by: int) -> torch.Tensor:
        sizes.append(batch.input_ids.numel())
        value = plain(passes, model, batch, divide_by)
        if len(sizes) - 1 not in numbers:
            return value
        if not late:
            raise error

        def fail(gradient: torch.Tensor) -> None:
            raise error

        inner = value * 1.0
        inner.register_hook(fail)
        return inner * 1.0

    monkeypatch.setattr(Passes, "loss", loss)
    return sizes


def gradients(model: nn.Module, batches: Batches, notes: list[str]) -> dict[str, torch.Tensor]:
    """What one step of gradient descent moves by."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    once = begin(model, batches, TrainConfig(lr=1.0, warmup=0, schedule="constant", max_grad_norm=None))
    once.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    take_step(once, on_note=notes.append)
    return {n: before[n] - p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("numbers", [{0}, {1}, {1, 4}])
def test_a_step_that_did_not_fit_is_done_again_with_the_same_gradient(
    numbers: set[int], error: str, late: bool, tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    batches = Batches(examples(16), 8, 2)
    expected = gradients(adapted(tiny), batches, notes)
    assert notes == []
    sizes = failing(monkeypatch, numbers, ERRORS[error], late=late)
    again = gradients(adapted(tiny), batches, notes)
    assert len(notes) == len(numbers)
    assert all(note.startswith("out of memory with ") and "\n" not in note for note in notes)
    assert max(sizes[max(numbers) + 1 :]) <= max(sizes) / 2 ** len(numbers) + 60
    for name, gradient in expected.items():
        assert (gradient - again[name]).norm() <= 1e-12 * gradient.norm()


def test_the_limit_stays_for_the_rest_of_the_run_and_is_kept_with_it(
    tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = adapted(tiny), Batches(examples(16), 8)
    run = begin(model, batches, TrainConfig())
    largest = max(batch.input_ids.numel() for batch in batches.window(0))
    failing(monkeypatch, {0}, ERRORS["cpu"])
    run.pending = take_step(run)
    assert run.passes.limit.tokens == largest // 2
    other = begin(adapted(tiny), batches, TrainConfig())
    other.restore(*run.state())
    assert other.passes.limit.tokens == largest // 2


def test_an_evaluation_that_did_not_fit_is_done_again(
    tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = adapted(tiny), Batches(examples(16), 8, shuffle=False)
    expected = evaluate(model, batches)
    sizes, notes = failing(monkeypatch, {1}, ERRORS["cuda"]), list[str]()
    assert evaluate(model, batches, on_note=notes.append) == pytest.approx(expected, rel=1e-12)
    assert len(notes) == 1
    assert max(sizes[2:]) < max(sizes[:2])


@pytest.mark.parametrize("error", ERRORS)
def test_a_single_row_that_does_not_fit_is_one_line(
    error: str, tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, set(range(100)), ERRORS[error])
    model = adapted(tiny)
    with pytest.raises(OutOfMemory, match=r"^row \d+: a single row of \d+ tokens .* lower max_length") as caught:
        train(model, Batches(examples(8), 8), TrainConfig())
    assert caught.value.exit_code == 10


def test_other_errors_are_not_taken_for_it(tiny: Tiny, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {0}, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(adapted(tiny), Batches(examples(8), 8), TrainConfig())
    assert not out_of_memory(ValueError("no"))


def test_nothing_of_the_failed_pass_is_held_when_it_is_done_again() -> None:
    """The error holds the frames and they the tensors: they have to be gone before the next attempt."""
    import weakref

    batch = collate([row(3), row(4)], packed=True)
    held: list[Any] = []

    def attempt(limit: PassLimit) -> str:
        if held:
            assert held[0]() is None
            return "done"
        large = torch.ones(3)
        held.append(weakref.ref(large))
        with limit.fits(batch):
            raise RuntimeError(str(ERRORS["cpu"]))  # a new one: it keeps its frames as long as it lives

    limit = PassLimit()
    assert limit.within(lambda: attempt(limit), lambda note: None) == "done"
    assert limit.tokens == 3


def test_the_error_of_one_pass_is_that_of_the_pass() -> None:
    limit = PassLimit()
    with pytest.raises(PassTooLarge), limit.fits(collate([row(3), row(4)], packed=True)):
        raise ERRORS["cpu"]
    assert limit.largest == 7


PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.conftest import build
from lorafit import Batches, LoraConfig, TrainConfig, add_lora, train
from lorafit.data.chat import Example

model = build("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=512)
add_lora(model, LoraConfig(r=4))
rows = [Example([5 + k % 80] * 100, [5] * 100, f"row {k}") for k in range(64)]
train(model, Batches(rows[:1]), TrainConfig(steps=1))
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 400 * 2**20,) * 2)
result = train(model, Batches(rows, 64, max_tokens_per_pack=10**6), TrainConfig(steps=2), on_note=print)
print("steps", len(result.history))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's limit on a process's memory")
@pytest.mark.slow
def test_a_process_that_may_not_have_more_memory_finishes() -> None:
    """For real: a pass of 6,400 tokens keeps over a gigabyte, and 400 MiB may be had."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"},
    )
    assert done.stdout.strip().endswith("steps 2"), done.stderr[-800:]
    assert "out of memory with 6,400 tokens in a pass: from here on at most 3,200" in done.stdout
