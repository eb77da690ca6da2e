"""The verbs about adapters as files, from the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from lorafit.app import options
from lorafit.app.cli import VERBS, main

Tiny = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """`base` and `tuned`, models without a tokenizer; `a`, `b` and `dora`, adapters."""
    from tests.conftest import shake

    root = tmp_path_factory.mktemp("folders")
    tiny("llama").save_pretrained(root / "base")
    for seed, (name, config) in enumerate({"a": {}, "b": {"rslora": True}, "dora": {"variant": "dora"}}.items()):
        model = tiny("llama")
        add_lora(model, LoraConfig(r=4, **config))
        save_lora(shake(model, seed), root / name, base_model=str(root / "base"))
    merge_lora(model).save_pretrained(root / "tuned")
    return root


@pytest.fixture
def run(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`run("verb …")`: exit code and all that was printed; A, B, D, M, T and O stand for the folders and a new one."""
    names = {"A": "a", "B": "b", "D": "dora", "M": "base", "T": "tuned"}

    def call(line: str) -> tuple[int, str]:
        places = {letter: str(folders / name) for letter, name in names.items()} | {"O": str(tmp_path / "out")}
        code = main([places.get(word, word) for word in line.split()])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_combine(run: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    code, said = run("combine A B --weights 0.7,0.3 --out O")
    assert (code, "14 layers, rank 8, exact" in said) == (0, True)
    load_lora(tiny("llama"), tmp_path / "out")
    code, said = run("combine --adapters A --method ties --rank 2 --out O")
    assert (code, "rank 2, relative error of the update" in said) == (0, True)
    assert run("combine A B --weights 1 --out O")[0] == 2
    assert run("combine --out O") == (2, "lorafit: combine needs --adapters (lorafit combine --help)\n")
    assert run("combine A D --out O")[0] == 5


def test_resize_and_diff(run: Tiny, tmp_path: Path) -> None:
    code, said = run("resize A --rank 2 --out O")
    assert (code, "rank 2, relative error" in said) == (0, True)
    code, said = run("diff A O")
    assert (code, "relative difference of the updates: 0." in said) == (0, True)
    assert run("diff A A")[1] == "relative difference of the updates: 0\n"
    assert run("diff A")[1].startswith("lorafit: diff needs --other")
    assert "resize needs a rank or an energy" in run("resize A --out O")[1]
    assert "belongs to no flag" in run("diff A B D")[1]


def test_extract(run: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    code, said = run("extract --model M --tuned T --energy 0.999 --out O")
    assert (code, "14 layers" in said) == (0, True)
    load_lora(tiny("llama"), tmp_path / "out")
    assert "no such file or folder" in run("extract --model M --tuned ./nowhere --out O")[1]


def test_export_and_check(run: Tiny, tmp_path: Path) -> None:
    code, said = run("check B --for llama.cpp")
    assert code == 5
    assert "ignores: use_rslora" in said
    assert "would not run it as trained (1 findings)" in said
    assert run("check A --for vllm")[0] == 0
    code, said = run("export B --to vllm --out O")
    assert (code, "vllm serve" in said) == (0, True)
    assert run("check O --for llama.cpp")[1].endswith("llama.cpp takes it\n")
    assert run("export A --to gguf --out O")[0] == 8  # a folder that holds another export
    assert run("check A --for vlm")[0] == 2
    assert run("check A") == (2, "lorafit: check needs --for (lorafit check --help)\n")


def test_export_of_dora(run: Tiny, tmp_path: Path) -> None:
    code, said = run("export D --to vllm --out O")
    assert (code, "--rank 32 --model BASE" in said) == (5, True)
    code, said = run("export D --to vllm --rank 16 --model M --out O")
    assert (code, "relative error of the update" in said) == (0, True)
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"].endswith("base")
    assert run("check O --for sglang")[0] == 0


def test_words_without_a_flag_are_the_options_a_verb_names(tmp_path: Path) -> None:
    known = [key for verb in VERBS.values() for key in options.names(verb)]
    read = options.read("combine", VERBS["combine"], ["x", "y", "--out", "z"], known)
    assert read["what"].adapters == ("x", "y")
    assert options.read("check", VERBS["check"], ["--for=tgi", "x"], known)["program"].for_ == "tgi"
    (tmp_path / "c.yaml").write_text("for: peft\nadapter: x\n")
    read = options.read("check", VERBS["check"], ["--config", str(tmp_path / "c.yaml")], known)
    assert (read["program"].for_, read["adapter"].adapter) == ("peft", "x")
    with pytest.raises(options.UsageError, match="'y' belongs to no flag"):
        options.read("check", VERBS["check"], ["x", "y"], known)
    with pytest.raises(options.UsageError, match="'y' belongs to no flag"):
        options.read("check", VERBS["check"], ["--adapter", "x", "y"], known)
