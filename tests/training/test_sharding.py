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
from lorafit.errors import LorafitError, ModelError, UsageError
from lorafit.lora.inject import adapted_layers, file_state, merge_lora
from lorafit.model import load
from lorafit.model.generate import next_ids
from lorafit.training.distributed import started
from lorafit.training.loss import find_head, summed_loss
from lorafit.training.sharding import is_sharded, shard
from tests.conftest import build, uneven
from tests.processes import run

CPU = torch.device("cpu")
# name: family, changes to it, settings of the adapter, settings of the run, processes
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "plain": ("llama", {}, {}, {}, (2, 3)),
    "rslora, padded": ("llama", {}, {"rslora": True}, {"packing": False}, (2,)),
    "dora": ("llama", {}, {"variant": "dora"}, {"checkpointing": True}, (2, 3)),
    "pissa": ("llama", {}, {"init": "pissa"}, {}, (2,)),
    "eva": ("llama", {}, {"init": "eva", "init_rows": 6}, {}, (2,)),
    "lora_ga": ("llama", {}, {"init": "lora_ga", "init_rows": 6}, {}, (2,)),
    "tied": ("llama", {"tie_word_embeddings": True}, {}, {}, (2, 3)),
    "ends adapted": ("llama", {}, {"targets": ("q_proj", "lm_head", "embed_tokens")}, {}, (2,)),
    "norms in full": ("llama", {}, {"train_modules": ("input_layernorm",)}, {}, (2,)),
    "gpt2": ("gpt2", {}, {}, {}, (2,)),
    "experts": ("mixtral", {}, {}, {}, (2,)),
}
PROMPT = [5, 6, 7]


def trained(folder: str, name: str, sharded: bool) -> dict[str, Any]:
    """What a run of this case gives, as plain data: losses, adapter, fingerprint, and what the model says then."""
    family, _, lora, settings, _ = CASES[name]
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
        "norms": [update.base for update in updates(model)] if hasattr(updates(model)[0], "base") else [],
        "answer": [step[0] for step in next_ids(model, [PROMPT], max_new_tokens=4, stop=frozenset())],
        "share": sum(p.to_local().numel() if sharded and hasattr(p, "to_local") else p.numel() for p in model.parameters()),
    }


def job(folders: dict[str, str]) -> dict[str, Any]:
    """All cases in one process of several."""
    load.load_tokenizer = lambda *args, **options: None  # type: ignore[assignment]
    with started(CPU):
        return {name: trained(folder, name, True) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, (family, changes, *_) in CASES.items():
        made[name] = str(tmp_path_factory.mktemp("model"))
        build(family, **changes).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def dealt(folders: dict[str, str]) -> Any:
    @cache
    def find(size: int) -> list[dict[str, Any]]:
        return run(size, job, {name: folders[name] for name, case in CASES.items() if size in case[4]}, timeout=100)

    return find


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case[4]])
def test_a_sharded_base_trains_the_same_adapter(
    name: str, size: int, folders: dict[str, str], dealt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_tokenizer", lambda *args, **options: None)
    whole = trained(folders[name], name, False)
    loss, weight = (1e-6, 1e-5) if name == "experts" else (1e-12, 1e-9)
    for found in dealt(size):
        assert not isinstance(found, str), found
        mine = found[name]
        assert mine["loss"] == pytest.approx(whole["loss"], rel=loss)
        assert mine["adapter"].keys() == whole["adapter"].keys()
        for key, tensor in whole["adapter"].items():
            assert mine["adapter"][key] == pytest.approx(tensor, abs=weight), key
        assert mine["fingerprint"] == whole["fingerprint"]
        assert mine["norms"] == pytest.approx(whole["norms"])
        assert mine["answer"] == whole["answer"]
    assert sum(found[name]["share"] for found in dealt(size)) < 1.5 * whole["share"]
