"""`lorafit push`, and adapters from the hub, against a stand-in for its HTTP API."""

import json
import os
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import yaml
from torch import nn

from lorafit import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from lorafit.app import hub as app_hub
from lorafit.app import upload as app_upload
from lorafit.app.card import Subject, make_card, public_name, vllm
from lorafit.app.cli import main
from lorafit.app.runs import read_run
from lorafit.app.upload import answered
from lorafit.errors import AdapterError
from lorafit.hub import ADAPTER_FILES, adapter_folder
from tests.standin import MANY, Hub, Repo, environment, standin


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own for each test: this process and those it starts talk to it."""
    with standin() as hub:
        for name, value in environment(hub, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        constants = huggingface_hub.constants  # which were read from the environment long ago
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        pages = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., nn.Module]) -> Path:
    """A run as `train` leaves it: an adapter, its settings, a log and a picture."""
    run = tmp_path_factory.mktemp("private") / "run"
    model = tiny("llama")
    add_lora(model, LoraConfig(r=12, rank_pattern={"down_proj": 20}))
    save_lora(shake(model), run / "adapter", base_model=str(run.parent / "models" / "base"))
    settings = {"model": str(run.parent / "models" / "base"), "data": str(run.parent / "patients.jsonl"), "lr": 0.001}
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "schedule": "cosine", "out": str(run)}))
    records = [{"step": n, "loss": 2.0 - n / 4, "tokens": 9, "epoch": 0} for n in range(4)]
    records[1]["eval_loss"], records[3]["eval_loss"] = 1.5, 1.625
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "loss.png").write_bytes(b"\x89PNG the picture")
    return run


def shake(model: nn.Module) -> nn.Module:
    """Other values than at the start, so that an adapter that did not arrive shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def push(*words: str) -> int:
    return main(["push", *words])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sending process does is done in this one, which is there already."""

    def upload(request: dict[str, Any], stall: float) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as there
            return answered(json.loads(json.dumps(request)))

    monkeypatch.setattr(app_hub, "upload", upload)


def put_there(hub: Hub, adapter: Path) -> str:
    """An adapter on the hub, by no code of ours; returns its commit."""
    hub.repos.setdefault("own/er", Repo(private=True))
    return hub.commit("own/er", {name: (adapter / name).read_bytes() for name in ADAPTER_FILES})


# --- there and back ----------------------------------------------------------------------------------


def test_an_adapter_goes_there_and_comes_back_the_same(
    hub: Hub, trained: Path, tiny: Any, token_ids: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(str(trained), "own/er", "--base-model", "meta/llama") == 0
    printed = capsys.readouterr().out
    files = hub.repos["own/er"].revisions["main"]
    assert hub.repos["own/er"].private
    assert files.keys() - {".gitattributes"} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png")
    }
    assert all(f"  {name} " in printed for name in files.keys() - {".gitattributes"})
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "meta/llama"
    model, same = tiny("llama"), tiny("llama")
    load_lora(model, "own/er")
    load_lora(same, trained / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), adapter_folder("own/er"))
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, same(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_revision_is_loaded_where_one_is_named(hub: Hub, trained: Path, tmp_path: Path, tiny: Any) -> None:
    first = put_there(hub, trained / "adapter")
    model = tiny("llama")
    load_lora(model, trained / "adapter")
    save_lora(shake(model), tmp_path / "second")
    put_there(hub, tmp_path / "second")
    weights = "adapter_model.safetensors"
    for name, source in (("own/er", tmp_path / "second"), (f"own/er@{first}", trained / "adapter")):
        assert (adapter_folder(name) / weights).read_bytes() == (source / weights).read_bytes()
    assert adapter_folder("own/er@main") == adapter_folder("own/er")


def test_a_folder_here_goes_before_a_name_on_the_hub(
    hub: Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "adapter", tmp_path / "own" / "er")
    assert adapter_folder("own/er") == Path("own/er")
    assert adapter_folder(Path("own/other")) == Path("own/other")
    assert hub.heard == []


def test_what_was_fetched_once_is_there_without_the_hub(
    hub: Hub, trained: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_there(hub, trained / "adapter")
    folder = adapter_folder("own/er")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("own/er") == folder
    load_lora(tiny("llama"), "own/er")
    with pytest.raises(AdapterError, match=r"^own/other: .* the hub cannot be reached$"):
        load_lora(tiny("llama"), "own/other")


@pytest.mark.usefixtures("in_process")
def test_a_tokenizer_beside_an_adapter_comes_along(hub: Hub, trained: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    (adapter / "manifest.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("{}")
    assert push(str(adapter), "own/er") == 0
    assert {path.name for path in adapter_folder("own/er").iterdir()} == {path.name for path in adapter.iterdir()}


def test_verbs_take_an_adapter_from_the_hub(
    hub: Hub, trained: Path, tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    put_there(hub, trained / "adapter")
    tiny("llama").save_pretrained(tmp_path / "base")
    assert main(["inspect", "--model", str(tmp_path / "base"), "--adapter", "own/er", "--device", "cpu"]) == 0
    assert "r=20" in capsys.readouterr().out
    assert main(["check", "own/er@main", "--for", "vllm"]) == 0
    assert "own/er@main: vllm takes it, given what it needs" in capsys.readouterr().out
    assert main(["export", "own/er", "--to", "vllm", "--out", str(tmp_path / "served")]) == 0
    assert main(["diff", "own/er", str(tmp_path / "served")]) == 0
    assert "relative difference of the updates: 0\n" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_a_merged_model_goes_there_and_comes_back_the_same(
    hub: Hub, trained: Path, tmp_path: Path, tiny: Any, token_ids: Any
) -> None:
    model: Any = tiny("llama")
    load_lora(model, trained / "adapter")
    merge_lora(model).save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("to myself")
    assert push("--to", "own/merged", str(tmp_path / "merged"), "--run", str(trained), "--license", "mit") == 0
    files = hub.repos["own/merged"].revisions["main"]
    assert "notes.txt" not in files
    assert str(tmp_path).encode() not in b"".join(files.values())
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "vllm serve own/merged\n" in card
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained("own/merged")
    ids = token_ids()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


# --- what does not go there --------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_only_the_list_goes_and_no_path_of_this_machine(
    hub: Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for name in ("patients.jsonl", ".env", "adapter_model.bin", "sub/optimizer.safetensors"):
        (run / "adapter" / name).parent.mkdir(exist_ok=True)
        (run / "adapter" / name).write_text("the secret")
    (run / "adapter" / "manifest.json").unlink()  # it names every file, so that these would be noticed
    assert push(str(run / "adapter"), "own/er") == 0
    printed = capsys.readouterr().out
    assert "left here: .env, adapter_model.bin, patients.jsonl, sub/optimizer.safetensors" in printed
    assert "--base-model owner/name" in printed
    sent = b"".join([*hub.repos["own/er"].revisions["main"].values(), *hub.objects.values()])
    assert b"the secret" not in sent
    assert str(tmp_path).encode() not in sent
    assert str(trained.parent).encode() not in sent
    assert b"patients.jsonl" in sent  # the last part of the path: which data it was


def test_a_relative_path_is_one_even_where_it_leads_nowhere(trained: Path, tmp_path: Path) -> None:
    """`models/base` looks like a name on the hub; the run knows that it was a folder."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "manifest.json").unlink()
    config["base_model_name_or_path"] = "models/base"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (run / "config.yaml").write_text("model: models/base\ndata: private/rows\nlr: 0.001\n")
    for about, base in ({}, "models/base"), ({"local": ["model", "data"]}, "base"):
        (run / "about.json").write_text(json.dumps(about))
        parcel = app_hub.pack(run, "own/er")
        assert json.loads(parcel.texts["adapter_config.json"])["base_model_name_or_path"] == base
        assert ("private/" in parcel.texts["README.md"]) == (about == {})
        assert ("--base-model" in str(parcel)) == (base == "base")


def test_nothing_is_sent_in_a_dry_run(hub: Hub, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(str(trained), "own/er", "--dry-run") == 0
    assert "its base model is called base there: --base-model owner/name" in capsys.readouterr().out
    assert push(str(trained), "own/er", "--dry-run", "--base-model", "own/base") == 0
    assert "| last loss per supervised token | 1.2500 |" in capsys.readouterr().out
    assert hub.heard == []


@pytest.mark.usefixtures("in_process")
def test_what_is_public_is_not_written_to_by_accident(
    hub: Hub, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(str(trained), "own/er", "--public") == 0
    assert not hub.repos["own/er"].private
    before = hub.sha("own/er", "main")
    hub.repos["own/er"].revisions["main"] = {".gitattributes": b""}
    hub.repos["own/er"].revisions[before] = hub.repos["own/er"].revisions["main"]
    assert push(str(trained), "own/er") == 11
    assert "is on the hub already, and public: --public" in capsys.readouterr().err
    assert hub.repos["own/er"].revisions["main"].keys() == {".gitattributes"}
    hub.repos["own/er"].private = True
    assert push(str(trained), "own/er", "--public") == 0
    assert "is private and stays so" in capsys.readouterr().out
    assert hub.repos["own/er"].private


def test_a_damaged_adapter_is_not_pushed(
    hub: Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert push(str(adapter), "own/er") == 5
    assert "its sha256 differs" in capsys.readouterr().err
    assert hub.heard == []


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ([], 2, "push needs --adapter"),
        (["RUN"], 2, "push needs --to"),
        (["RUN", "name"], 2, "'name' is no name on the hub: it is owner/name"),
        (["RUN", "own/er", "more"], 2, "'more' belongs to no flag"),
        (["RUN", "own/er", "--stall", "0"], 2, "stall must be greater than 0, not 0"),
        (["./nowhere", "own/er"], 5, "nowhere: neither an adapter, nor a run with one, nor a model folder"),
        (["RUN", "own/er", "--run", "./nowhere"], 2, "nowhere is no run: there is no config.yaml in it"),
    ],
)
def test_a_wrong_push_is_one_line(
    words: list[str], code: int, named: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(*[str(trained) if word == "RUN" else word for word in words]) == code
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


# --- what the hub may answer -------------------------------------------------------------------------

# (what is asked for, how it fails, exit code, the line)
PUSHED = [
    ("create", 401, 11, "the hub does not know you: `hf auth login`, or HF_TOKEN with a token that may write"),
    ("create", 403, 11, "your token may not write there: huggingface.co/settings/tokens, or another owner"),
    ("put", 403, 11, "your token may not write there: huggingface.co/settings/tokens, or another owner"),
    ("create", 404, 11, "the hub knows no such owner, or you may not see it"),
    ("create", 429, 75, "the hub asks to wait, there were too many requests from here: in some minutes AGAIN"),
    ("commit", 503, 75, "the hub has a fault of its own: later AGAIN"),
    ("commit", "drop", 75, "the connection to the hub broke, or there is none: AGAIN"),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("operation", "fault", "code", "line"), PUSHED)
def test_what_the_hub_answers_to_a_push_is_one_line(
    operation: str, fault: Any, code: int, line: str, hub: Hub, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults[operation] = (fault, MANY)
    assert push(str(trained), "own/er") == code
    assert capsys.readouterr().err.splitlines()[-1] == f"lorafit: own/er: {line.replace('AGAIN', app_hub.AGAIN)}"


# The same for loading.
LOADED = [
    ("info", 401, "the hub wants a token, or does not know the one it gets: `hf auth login`"),
    ("info", 403, "the hub does not let you: your token may not read it (huggingface.co/settings/tokens)"),
    ("info", 404, "no such folder here or adapter on the hub (private: `hf auth login` first)"),
    ("info", 429, "the hub asks to wait, there were too many requests from here: try again in some minutes"),
    ("tree", 503, "the hub has a fault of its own: try again later"),
    ("info", "drop", "the connection to the hub broke: try again"),
]


@pytest.mark.parametrize(("operation", "fault", "line"), LOADED)
def test_what_the_hub_answers_to_a_load_is_one_line(
    operation: str,
    fault: Any,
    line: str,
    hub: Hub,
    trained: Path,
    tmp_path: Path,
    tiny: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits before it asks again
    put_there(hub, trained / "adapter")
    tiny("llama").save_pretrained(tmp_path / "base")
    hub.faults[operation] = (fault, MANY)
    capsys.readouterr()
    assert main(["chat", "--model", str(tmp_path / "base"), "--adapter", "own/er"]) == 5
    assert capsys.readouterr().err.splitlines()[-1] == f"lorafit: own/er: {line}"


def test_what_is_not_there_to_be_loaded_is_one_line(hub: Hub, trained: Path, tiny: Any) -> None:
    put_there(hub, trained / "adapter")
    with pytest.raises(AdapterError, match=r"^own/er@v2: the hub has this adapter, but not this revision$"):
        load_lora(tiny("llama"), "own/er@v2")
    hub.repos["own/er"] = Repo(private=True)
    hub.commit("own/er", {"adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterError, match=r"own/er: no adapter_config.json, adapter_model.safetensors there"):
        load_lora(tiny("llama"), "own/er")


def test_a_push_that_was_cut_off_goes_on(hub: Hub, trained: Path) -> None:
    hub.faults["commit"] = ("drop", 1)
    assert push(str(trained), "own/er") == 75
    assert hub.heard.count("put") == 2  # weights and picture
    assert push(str(trained), "own/er") == 0
    assert hub.heard.count("put") == 2
    assert "adapter_model.safetensors" in hub.repos["own/er"].revisions["main"]


def test_bytes_that_move_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import tqdm

    monkeypatch.setattr(tqdm, "update", tqdm.update)  # put back afterwards
    monkeypatch.setattr(app_upload, "TELL_EVERY", 0)
    told: list[bool] = []
    app_upload.count_bytes(lambda: told.append(True))
    for drawn in (True, False):
        with tqdm(total=9, disable=not drawn) as bar:
            bar.update(0)
            assert not told
            bar.update(4)
            assert told.pop()


def test_a_push_without_progress_ends(
    hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client of Xet asks for ever where nobody answers it."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    hub.faults["xet"] = ("silent", MANY)
    assert push(str(trained), "own/er", "--stall", "3") == 75
    assert "xet" in hub.heard
    assert "own/er: not a byte moved for 3 seconds (--stall)" in capsys.readouterr().err
    assert len(hub.repos["own/er"].revisions["main"]) == 1


def test_a_signal_ends_the_sending_process_too(
    hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def stop_it() -> None:
        while "create" not in hub.heard and not hub.over.wait(0.02):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(app_hub.subprocess, "Popen", Popen)
    hub.faults["create"] = ("silent", MANY)
    threading.Thread(target=stop_it, daemon=True).start()
    assert push(str(trained), "own/er") == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert started[0].returncode == -signal.SIGKILL


# --- the card ----------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_was(trained: Path) -> None:
    config = {"r": 12, "lora_alpha": 32, "rank_pattern": {"down_proj": 20}}
    card = make_card(Subject("meta/llama", config), read_run(trained), "own/er", None, picture=True)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "base_model": "meta/llama",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorafit"],
    }
    assert "| data | patients.jsonl |" in card
    assert "| held-out loss after step 2 | 1.5000 (perplexity 4.482), the best |" in card
    assert "![loss of each step](loss.png)" in card
    assert "lorafit chat --model meta/llama --adapter own/er\n" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("meta/llama"), "own/er")' in card
    assert "Not stated yet" in card


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 1}, "--max-lora-rank 1 "),
        ({"r": 8}, "--max-lora-rank 8 "),
        ({"r": 9}, "--max-lora-rank 16 "),
        ({"r": 4, "rank_pattern": {"q_proj": 257}}, "--max-lora-rank 320 "),
        ({"r": 513}, "vLLM does not load it as it is"),
    ],
)
def test_vllm_is_told_the_rank_it_needs(config: dict[str, Any], said: str) -> None:
    assert said in vllm(Subject("base/model", config), "own/er")


@pytest.mark.parametrize("changes", [{"variant": "dora"}, {"train_modules": ("norm",)}])
def test_the_card_says_what_vllm_refuses(changes: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, **changes))
    card = app_hub.pack(save_lora(model, tmp_path / "adapter"), "own/er").texts["README.md"]
    assert "vLLM does not load it as it is (" in card
    assert "--max-lora-rank" not in card


def test_names_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    for name in ("meta/llama", "meta/set:train[:1%]", ""):
        assert public_name(name) == name
    paths = {"a/b": "b", "/home/me/rows.jsonl": "rows.jsonl", "./x/rows.jsonl": "rows.jsonl", "x/y.gguf": "y.gguf"}
    for name, end in paths.items():
        assert public_name(name) == end
    assert public_name("models/base", local=True) == "base"
