"""A base dealt out over processes trains the same adapter as a whole one, and no process has all of it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit import Batches, LoraConfig, TrainConfig, add_lora, calibrate, evaluate, load_model, lora_disabled, train
from lorafit.adapter.fingerprint import base_fingerprint
from lorafit.adapter.spectrum import updates
from lorafit.data.batches import collate
from lorafit.data.chat import IGNORE, Example
from lorafit.errors import LorafitError, UsageError
from lorafit.lora.inject import adapted_layers, file_state, merge_lora
from lorafit.lora.tokens import enlarge
from lorafit.model import load
from lorafit.model.generate import next_ids
from lorafit.training.distributed import started
from lorafit.training.loss import find_head, summed_loss
from lorafit.training.sharding import is_sharded, shard
from tests.conftest import build, uneven
from tests.processes import run

CPU = torch.device("cpu")
# name: family, changes to it, settings of the adapter, settings of the run
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}, {}),
    "dora": ("llama", {}, {"variant": "dora"}, {"checkpointing": True}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "lora_ga": ("llama", {}, {"init": "lora_ga", "init_rows": 6}, {}),
    "pissa": ("llama", {}, {"init": "pissa"}, {}),
    "gpt2": ("gpt2", {}, {}, {}),
    "rslora, padded": ("llama", {}, {"rslora": True}, {"packing": False}),
    "eva": ("llama", {}, {"init": "eva", "init_rows": 6}, {}),
    "ends adapted": ("llama", {}, {"targets": ("q_proj", "lm_head", "embed_tokens")}, {}),
    "norms in full": ("llama", {}, {"train_modules": ("input_layernorm",)}, {}),
    "experts": ("mixtral", {}, {}, {}),
    "gemma2": ("gemma2", {}, {}, {}),
    "gpt_neox": ("gpt_neox", {}, {"variant": "dora"}, {}),
}
SHORT = {2: ("plain", "dora", "tied", "lora_ga", "gpt2"), 3: ("plain",)}
LONG = {2: tuple(CASES), 3: tuple(name for name in CASES if name != "experts")}  # 4, of which a third would have none
PROMPT = [5, 6, 7]


def trained(folder: str, name: str, sharded: bool) -> dict[str, Any]:
    """What a run of this case gives, as plain data: losses, adapter, fingerprint, and what the model says then."""
    family, _, lora, settings = CASES[name]
    packing = settings.get("packing", True)
    options = {key: value for key, value in settings.items() if key != "packing"}
    # torch's grouped product of experts knows no float64
    model, _ = load_model(folder, dtype="float32" if family == "mixtral" else "float64", shard=sharded)
    assert is_sharded(model) == sharded
    batches = Batches(uneven(9), 4, packing=packing)  # 4, 4, 1 rows: in the last step there is a process without any
    held_out = Batches(uneven(5, seed=3), 3, packing=packing, shuffle=False)
    torch.manual_seed(0)
    plan = add_lora(model, *calibrate(model, LoraConfig(r=4, **lora), batches))
    config = TrainConfig(lr=1e-2, shard=sharded, **options)
    result = train(model, batches, config, evaluation=held_out)
    with lora_disabled(model):
        before = evaluate(model, held_out)
    return {
        "loss": [record["loss"] for record in result.history] + [*result.evaluations.values(), before],
        "adapter": {key: tensor.detach().numpy() for key, tensor in file_state(model).items()},
        "fingerprint": base_fingerprint(model, adapted_layers(model, plan)),
        "shares": [update.share for update in updates(model)],  # of the norm of W
        "answer": [step[0] for step in next_ids(model, [PROMPT], max_new_tokens=4, stop=frozenset())],
        "share": sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters()),
    }


def job(folders: dict[str, str]) -> dict[str, Any]:
    """All cases in one process of several."""
    load.load_tokenizer = lambda *args, **options: None  # type: ignore[assignment]
    with started(CPU):
        return {name: trained(folder, name, True) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, (family, changes, _, _) in CASES.items():
        made[name] = str(tmp_path_factory.mktemp("model"))
        build(family, **changes).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def dealt(folders: dict[str, str]) -> Any:
    @cache
    def find(size: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
        return run(size, job, {name: folders[name] for name in names}, timeout=100)

    return find


def cases() -> list[Any]:
    short = [(size, names, name) for size, names in SHORT.items() for name in names]
    long = [(size, names, name) for size, names in LONG.items() for name in names if name not in SHORT[size]]
    return [*short, *(pytest.param(*case, marks=pytest.mark.slow) for case in long)]


@pytest.mark.parametrize(("size", "names", "name"), cases())
def test_a_sharded_base_trains_the_same_adapter(
    size: int, names: tuple[str, ...], name: str, folders: dict[str, str], dealt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_tokenizer", lambda *args, **options: None)
    whole = trained(folders[name], name, False)
    # The experts are in fp32, where AdamW makes a share of a step (1e-2) of the rounding of a gradient near 0.
    loss, weight = (1e-6, 1e-3) if name == "experts" else (1e-12, 1e-9)
    shares = 0
    for found in dealt(size, names):
        assert not isinstance(found, str), found
        mine = found[name]
        assert mine["loss"] == pytest.approx(whole["loss"], rel=loss)
        assert mine["adapter"].keys() == whole["adapter"].keys()
        for key, tensor in whole["adapter"].items():
            assert mine["adapter"][key] == pytest.approx(tensor, abs=weight), key
        assert mine["fingerprint"] == whole["fingerprint"]
        assert mine["shares"] == pytest.approx(whole["shares"], rel=1e-4)
        assert mine["answer"] == whole["answer"]
        shares += mine["share"]
    assert shares < 1.5 * whole["share"]  # together they hold little more than one of it


def refused(plain: str, experts: str) -> list[str]:
    """What each thing that a sharded base cannot be asked for answers, in one of three processes."""
    load.load_tokenizer = lambda *args, **options: None  # type: ignore[assignment]

    def said(call: Any) -> str:
        with pytest.raises(LorafitError) as error:
            call()
        return f"{type(error.value).__name__}: {error.value}"

    with started(CPU):
        model, _ = load_model(plain, shard=True)
        head = LoraConfig(train_modules=("lm_head",))
        found = [
            said(lambda: load_model(plain, shard=True, storage="int8")),
            said(lambda: load_model(experts, shard=True)),
            said(lambda: enlarge(model, 200)),
            said(lambda: add_lora(model, LoraConfig(train_tokens=(5,)))),
            said(lambda: add_lora(model, head)),
        ]
        add_lora(model, LoraConfig(init="pissa"))
        return [*found, said(lambda: merge_lora(model))]


def test_what_a_sharded_base_cannot_do_is_one_line(folders: dict[str, str]) -> None:
    answers = run(3, refused, folders["plain"], folders["experts"])
    assert answers[0] == answers[1] == answers[2]
    storage, experts, longer, rows, full, merged = answers[0]
    assert storage == "UsageError: storage 'int8' is made of whole layers, and shard has slices: take one or the other"
    assert "of 4 experts not every one of 3 would have one" in experts
    assert longer == rows
    assert "neither added nor trained" in rows
    assert "cannot be trained in full where they are dealt out" in full
    assert "merge" in merged
    assert all("\n" not in answer for answer in answers[0])


def test_one_process_has_nothing_to_deal_out(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"and this is one: torchrun --nproc-per-node"):
        shard(tiny("llama"), CPU)
    with pytest.raises(UsageError, match="compile works on whole blocks"):
        TrainConfig(shard=True, compile=True)


def stopped(folder: str, checkpoints: str, step: int) -> list[str]:
    """A run of which process 1 alone is asked to stop in pass `step`; then the rest of it."""
    load.load_tokenizer = lambda *args, **options: None  # type: ignore[assignment]
    said = []
    with started(CPU) as here:
        for resumed in (False, True):
            model, _ = load_model(folder, dtype="float64", shard=True)
            torch.manual_seed(0)
            add_lora(model, LoraConfig(r=4))
            asked = iter(range(100))

            def stop(resumed: bool = resumed, asked: Any = asked) -> str | None:
                return "SIGTERM" if next(asked) == step and here.rank == 1 and not resumed else None

            keep = {"resume" if resumed else "checkpoints": checkpoints}
            batches = Batches(uneven(9), 4, max_tokens_per_pack=60)
            try:
                result = train(model, batches, TrainConfig(lr=1e-2, shard=True), stop=stop, **keep)  # type: ignore[arg-type]
                said += [str(result.history[-1]["loss"])]
            except LorafitError as error:
                said += [str(error)]
    return said


def test_a_signal_to_one_process_stops_all_in_the_same_pass(folders: dict[str, str], tmp_path: Path) -> None:
    (interrupted, last), other = run(2, stopped, folders["plain"], str(tmp_path / "run"), 3)
    assert "after 1 of 3 steps; saved in" in interrupted
    assert other[1] == last == run(2, stopped, folders["plain"], str(tmp_path / "whole"), 99)[0][0]


def test_a_pass_without_rows_has_no_loss_and_no_gradient(tiny: Any) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, init="gaussian_both"))
    idle = collate([Example(ids=[0, 0], labels=[IGNORE, IGNORE], source="no row")], packed=True)
    loss = summed_loss(model, idle, find_head(model))
    loss.backward()
    assert loss.item() == 0
    assert idle.targets.numel() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)
