"""The command line: what it refuses, how settings come together, and each verb from end to end on a tiny model."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tokenizers
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers

from lorafit.app import options, rows, runs
from lorafit.app.cli import VERBS, FollowConfig, TokensConfig, main
from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, as_dict
from lorafit.errors import UsageError
from lorafit.locks import lock
from lorafit.lora.inits import INITS
from lorafit.lora.inject import lora_disabled
from lorafit.model.generate import generate
from lorafit.model.load import load_model
from tests import processes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    """A tiny chat model as a folder, as it would come from the hub."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What comes after {n}?", "completion": f"{n + 1} comes."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """What `lorafit train` leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    line = f"train --model {model_folder} --data {data_file} --out {folder} --dtype float32 --device cpu --r 4"
    assert main(f"{line} --lr 1e-2 --epochs 2 --eval-rows 4 --batch_size 4 --init gaussian".split()) == 0
    return folder


# --- what is refused ---------------------------------------------------------------------------------

FILES = {
    "typo.yaml": "lrr: 1e-4\n",
    "typo.toml": "targts = ['q_proj']\n",
    "value.toml": "r = 'many'\n",
    "list.yaml": "- r\n- 8\n",
    "nested.yaml": "lora:\n  r: 8\n",
    "broken.toml": "r = = 8\n",
    "broken.yaml": "r: [8\n",
    "float.yaml": "r: 8.5\n",
    "truth.json": '{"batch_size": true}\n',
    "short.toml": "betas = [0.9]\n",
    "run.ini": "[lora]\nr=8\n",
}
# A command line, its exit code, and what its one line must name. M, D and O stand for a model, data and a new folder.
WRONG = [
    ("trian", 2, "did you mean 'train'"),
    ("--model M", 2, "unknown verb '--model'"),
    ("train --max-lenght 8", 2, "did you mean '--max-length'"),
    ("train --max_lenght=8", 2, "did you mean '--max-length'"),
    ("train --max-len 8", 2, "did you mean '--max-length'"),  # no abbreviations
    ("train -r 8", 2, "unknown flag '-r'"),
    ("train --lora-r 8", 2, "unknown flag '--lora-r'"),
    ("train 8", 2, "'8' belongs to no flag"),
    ("train --r", 2, "--r: expected one argument"),
    ("train --r many", 2, "--r must be a whole number, not 'many'"),
    ("train --r 8.5", 2, "--r must be a whole number, not '8.5'"),
    ("train --r -1", 2, "r must be a number greater than 0"),
    ("train --lr fast", 2, "--lr must be a number, not 'fast'"),
    ("train --lr nan", 2, "--lr must be a number, not 'nan'"),
    ("train --lr inf", 2, "--lr must be a number, not 'inf'"),
    ("train --lr 0", 2, "lr must be a number greater than 0"),
    ("train --dropout 1", 2, "dropout must be at least 0 and below 1"),
    ("train --betas 0.9", 2, "--betas must be 2 numbers with commas between them"),
    ("train --betas 0.9,x", 2, "--betas must be 2 numbers"),
    ("train --layers 0,one", 2, "--layers must be whole numbers with commas between them or none"),
    ("train --schedule cosin", 2, "did you mean 'cosine'"),
    ("train --loss-on answers", 2, "--loss-on must be one of assistant, last, all"),
    ("train --rslora maybe", 2, "--rslora must be true or false, not 'maybe'"),
    ("train --rank-pattern q_proj", 2, "--rank-pattern must be name=number pairs"),
    ("train --rank-pattern q_proj=x", 2, "--rank-pattern must be name=number pairs"),
    ("train --rank-pattern q_proj=0", 2, "rank_pattern['q_proj'] must be a number greater than 0"),
    ("train --eval-rows -1", 2, "eval_rows must not be negative"),
    ("train --config typo.yaml", 2, "typo.yaml: unknown key 'lrr' (did you mean 'lr'?)"),
    ("train --config typo.toml", 2, "typo.toml: unknown key 'targts' (did you mean 'targets'?)"),
    ("train --config value.toml", 2, "value.toml: r must be a whole number, not 'many'"),
    ("train --config list.yaml", 2, "list.yaml: a config file holds 'name: value' lines, not a list"),
    ("train --config nested.yaml", 2, "nested.yaml: unknown key 'lora'"),
    ("train --config broken.toml", 2, "broken.toml: not TOML"),
    ("train --config broken.yaml", 2, "broken.yaml:2:1: not YAML"),
    ("train --config float.yaml", 2, "float.yaml: r must be a whole number, not 8.5"),
    ("train --config truth.json", 2, "truth.json: batch_size must be a whole number, not True"),
    ("train --config short.toml", 2, "short.toml: betas must be 2 numbers"),
    ("train --config run.ini", 2, "run.ini: a config file ends in .toml, .yaml, .yml or .json"),
    ("train --config none.toml", 2, "none.toml: config file cannot be read: No such file"),
    ("train", 2, "train needs --model"),
    ("train --model M", 2, "train needs --data"),
    ("train --model M --data D", 2, "train needs --out"),
    ("eval --model M", 2, "eval needs --data"),
    ("merge --model M --out O", 2, "merge needs --adapter"),
    ("chat", 2, "chat needs --model"),
    ("chat --lr 1", 2, "unknown flag '--lr'"),
    ("inspect --model M --targets q_porj", 2, "q_proj"),
    ("inspect --model M --variant dorra", 2, "dorra"),
    ("inspect --model ./nowhere", 4, "no such file or folder: ./nowhere"),
    ("inspect --model M --dtype float8", 2, "--dtype must be one of auto, bfloat16"),
    ("chat --model M --adapter ./nowhere", 5, "nowhere"),
    ("merge --model M --adapter M --out O", 5, "give the folder that holds an adapter"),
    ("inspect --model M --data ./none.jsonl", 3, "none.jsonl"),
    ("inspect --model M --init kaimign", 2, "did you mean 'kaiming'"),
    ("train --model M --data D --out O --eval-rows 20", 2, "eval_rows"),
    ("train --model M --data D --out O --adapter A --r 2", 2, "leave the LoRA flags out"),
]


@pytest.mark.parametrize(("line", "code", "named"), WRONG, ids=[line for line, _, _ in WRONG])
def test_a_wrong_command_line_is_one_line_with_the_right_name(
    line: str,
    code: int,
    named: str,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    stands_for = {"M": str(model_folder), "D": str(data_file), "O": "new"}
    assert main([stands_for.get(word, word) for word in line.split()]) == code
    printed, said = capsys.readouterr()
    assert said.startswith("lorafit: ")
    assert said.count("\n") == 1, said
    assert named in said
    assert "Traceback" not in printed + said
    assert not (tmp_path / "new").exists()


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "fast", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        """Fail."""
        raise KeyError("some\nthing")

    monkeypatch.setitem(VERBS, "broken", broken)
    assert main(["broken"]) == 1
    assert capsys.readouterr().err == "lorafit: unexpected KeyError: 'some\\nthing' (--debug shows where)\n"


@pytest.mark.parametrize("line", [["--help"], ["help"], [], *([verb, "--help"] for verb in VERBS)], ids=str)
def test_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 0
    printed = " ".join(capsys.readouterr().out.split())
    verb = VERBS.get(line[0]) if line else None
    for cls in options.configs(verb).values() if verb else ():
        for field in dataclasses.fields(cls):
            assert f"--{field.name.rstrip('_').replace('_', '-')}" in printed
            assert " ".join(field.metadata["help"].split()[:4]) in printed
    if verb is None:
        assert all(name in printed for name in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorafit {version('lorafit')}\n"


def test_help_starts_in_half_a_second_without_torch() -> None:
    import subprocess
    import sys

    began = time.perf_counter()
    code = "import sys, lorafit.app.cli as c; c.main(['--help']); print([m for m in sys.modules if m in sys.argv])"
    heavy = ["torch", "transformers", "datasets", "matplotlib", "rich", "yaml"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert time.perf_counter() - began < 2.5, "half a second on a quiet machine"


# --- how settings come together ----------------------------------------------------------------------


def resolved(line: str, verb: str = "train") -> dict[str, Any]:
    known = {key for function in VERBS.values() for key in options.names(function)}
    return as_dict(*options.read(verb, VERBS[verb], line.split(), known).values())


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    defaults = as_dict(ModelConfig(), LoraConfig(), TokensConfig(), DataConfig(), TrainConfig(), FollowConfig())
    defaults |= {"out": "", "resume": False}
    assert resolved("") == defaults
    (tmp_path / "c.toml").write_text("r = 4\nlr = 1e-3\ntargets = ['q_proj']\n[rank_pattern]\nq_proj = 2\n")
    line = f"--config {tmp_path / 'c.toml'} --lr 5e-4"
    changed = {"r": 4, "lr": 5e-4, "targets": ["q_proj"], "rank_pattern": {"q_proj": 2}}
    assert resolved(line) == defaults | changed
    (tmp_path / "c.yaml").write_text(
        "max-length: 8\nlr: 1e-3\ntrain_modules: norm,lm_head\n"
    )  # YAML reads 1e-3 as text
    changed = {"max_length": 8, "lr": 1e-3, "train_modules": ["norm", "lm_head"]}
    assert resolved(f"--config {tmp_path / 'c.yaml'}") == defaults | changed


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--max-length 8", "max_length", 8),
        ("--max_length 8", "max_length", 8),
        ("--max_length=8", "max_length", 8),
        ("--targets all-linear", "targets", "all-linear"),
        ("--targets q_proj,v_proj", "targets", "q_proj,v_proj"),
        (r"--targets .*\.(q|v)_proj", "targets", r".*\.(q|v)_proj"),
        (r"--targets .*\.\d{1,2}\.q_proj", "targets", r".*\.\d{1,2}\.q_proj"),
        ("--layers 0,2", "layers", [0, 2]),
        ("--layers none", "layers", None),
        ("--train-modules norm", "train_modules", ["norm"]),
        ("--rank-pattern q_proj=8,v_proj=4", "rank_pattern", {"q_proj": 8, "v_proj": 4}),
        ("--alpha-pattern q_proj=0.5", "alpha_pattern", {"q_proj": 0.5}),
        ("--betas 0.9,0.95", "betas", [0.9, 0.95]),
        ("--max-grad-norm none", "max_grad_norm", None),
        ("--rslora", "rslora", True),
        ("--rslora --r 8", "rslora", True),
        ("--packing false", "packing", False),
        ("--no-packing", "packing", False),
        ("--packing off", "packing", False),
        ("--lr 1e-4", "lr", 1e-4),
        ("--chat-template plain", "chat_template", "plain"),
        ("--data some/name:train[:1%]", "data", "some/name:train[:1%]"),
    ],
)
def test_a_flag_is_read_as_its_type(line: str, name: str, value: Any) -> None:
    assert resolved(line)[name] == value


LINKED = ("init", "init_rho", "token_layers", "lora_plus_ratio", "compile")  # not every value fits those of others


def a_config(cls: Any) -> st.SearchStrategy[Any]:
    """Any valid settings of one dataclass, a few fields changed."""
    words = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
    made = {
        "int": st.integers(1, 99),
        "float": st.floats(0.001, 0.99),
        "str": words,
        "bool": st.booleans(),
        "Names": st.one_of(st.just("all-linear"), st.lists(words, min_size=1, max_size=3).map(tuple)),
        "tuple[str, ...]": st.lists(words, max_size=3).map(tuple),
        "tuple[int, ...] | None": st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
        "tuple[float, float]": st.tuples(st.floats(0, 1), st.floats(0, 1)),
        "int | None": st.none() | st.integers(1, 99),
        "float | None": st.none() | st.floats(0.001, 99),
    }
    hints = {name: str(field.type) for name, field in cls.__dataclass_fields__.items()}
    hints = {name: kind.removeprefix("<class '").removesuffix("'>") for name, kind in hints.items()}
    return st.builds(cls, **{name: made[kind] for name, kind in hints.items() if kind in made and name not in LINKED})


@settings(deadline=None)
@given(a_config(LoraConfig), a_config(DataConfig), a_config(TrainConfig))
def test_written_settings_are_read_back_the_same(lora: LoraConfig, data: DataConfig, training: TrainConfig) -> None:
    flat = as_dict(lora, data, training)
    read = yaml.safe_load(yaml.safe_dump(flat))
    for config in (lora, data, training):
        hints = get_type_hints(type(config))
        again = type(config)(**{name: options.convert(read[name], hint, name) for name, hint in hints.items()})
        assert again == config


def test_every_option_of_every_verb_has_a_sentence_and_a_readable_type() -> None:
    for verb in VERBS.values():
        assert verb.__doc__
        assert verb.__doc__.count("\n") == 0
        names = options.names(verb)
        assert len(names) == len(set(names))
        for cls in options.configs(verb).values():
            for field in dataclasses.fields(cls):
                assert field.metadata["help"]
            for name, hint in get_type_hints(cls).items():
                with pytest.raises(UsageError, match=name):
                    options.convert(object(), hint, name)


# --- the verbs ---------------------------------------------------------------------------------------


RUN_FILES = ["about.json", "adapter", "checkpoints", "config.yaml", "log.jsonl", "loss.png"]


def test_train_leaves_an_adapter_its_settings_a_log_and_a_picture(
    run_folder: Path, model_folder: Path, data_file: Path
) -> None:
    assert sorted(p.name for p in run_folder.iterdir()) == RUN_FILES
    records = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(8))  # 16 rows, 4 a step, 2 epochs
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "memory_mb"} <= records[0].keys()
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 7]
    assert records[-1]["loss"] < records[0]["loss"]
    assert (run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    described = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    assert described["r"] == 4
    assert described["base_model_name_or_path"] == str(model_folder)
    written = resolved(f"--config {run_folder / 'config.yaml'}")
    asked = {"model": str(model_folder), "data": str(data_file), "r": 4, "lr": 1e-2, "batch_size": 4, "eval_rows": 4}
    assert asked.items() <= written.items()


def test_train_notes_what_a_report_needs(run_folder: Path, model_folder: Path, data_file: Path) -> None:
    about = json.loads((run_folder / "about.json").read_text())
    model, tokenizer = load_model(model_folder, dtype="float32", device="cpu", adapter=run_folder / "adapter")
    examples, held_out = rows.read_rows(
        ModelConfig(model=str(model_folder)), DataConfig(data=str(data_file), eval_rows=4), tokenizer, seed=0
    )
    assert [about["data"][name] for name in ("rows", "held_out")] == [16, 4]
    assert about["data"]["tokens"] == sum(len(example.ids) for example in examples)
    assert sum(about["data"]["lengths"]["rows"]) == sum(about["data"]["lengths"]["supervised"]) == 16
    assert about["plan"]["trainable"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert len(about["layers"]) == 14  # of two blocks
    asked = [json.loads(line) for line in data_file.read_text().splitlines()]
    assert len(about["samples"]) == 3
    for sample, row in zip(about["samples"], held_out, strict=False):
        number = int(sample["source"].rpartition(":")[2])
        question = asked[number - 1]["prompt"]
        assert (sample["source"], sample["answer"]) == (row.source, asked[number - 1]["completion"])
        assert question in sample["prompt"]
        said = {"after": generate(model, tokenizer, [question], max_new_tokens=64)[0]}
        with lora_disabled(model):
            said["before"] = generate(model, tokenizer, [question], max_new_tokens=64)[0]
        assert {name: sample[name] for name in said} == {name: text.strip() for name, text in said.items()}


def test_a_run_may_keep_no_answers(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    line = f"train --config {run_folder / 'config.yaml'} --out {out} --samples 0 --steps 1"
    assert main(line.split()) == 0
    assert json.loads((out / "about.json").read_text())["samples"] == []
    assert main(["report", str(out)]) == 0
    assert "Not shown: the run kept no answers" in (out / "report.html").read_text()


def test_the_written_settings_make_the_same_adapter_again(run_folder: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(run_folder / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    again, first = (p / "adapter" / "adapter_model.safetensors" for p in (tmp_path / "again", run_folder))
    assert again.read_bytes() == first.read_bytes()


def test_train_does_not_overwrite_an_adapter(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_folder / "log.jsonl").read_bytes()
    assert main(["train", "--config", str(run_folder / "config.yaml")]) == 8
    assert "already holds a trained adapter" in capsys.readouterr().err
    assert (run_folder / "log.jsonl").read_bytes() == before


def test_train_goes_on_from_an_adapter(run_folder: Path, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    line = f"train --model {model_folder} --data {data_file} --adapter {run_folder / 'adapter'} --out {tmp_path / 'on'}"
    assert main([*line.split(), "--steps", "1", "--dtype", "float32", "--device", "cpu"]) == 0
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    start = json.loads((run_folder / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] < start["loss"]


def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def test_a_finished_run_that_is_resumed_stays_as_it_is(run_folder: Path, tmp_path: Path) -> None:
    """Killed after its last step, before its last file: what is missing is made again, from the same bits."""
    run = copied(run_folder, tmp_path)
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    shutil.rmtree(run / "adapter")
    (run / "loss.png").unlink()
    assert main(["train", "--resume", "--out", str(run), "--config", str(copy_settings(run))]) == 0
    after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {Path("config.yaml"), Path("loss.png")}


def copy_settings(run: Path) -> Path:
    """The settings of a copied run name the folder it was copied from."""
    return Path(shutil.copy(run / "config.yaml", run.parent / "settings.yaml"))


def test_resume_takes_its_settings_from_the_run_and_refuses_others(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run_folder, tmp_path)
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert main(["train", "--resume", "--out", str(run), "--lr", "0.5"]) == 6
    assert "lr was 0.01 and is 0.5; give the same, or begin a new run" in capsys.readouterr().err


def test_an_unfinished_run_is_not_begun_anew_by_accident(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run_folder, tmp_path)
    shutil.rmtree(run / "adapter")
    assert main(["train", "--config", str(copy_settings(run)), "--out", str(run)]) == 6
    assert "holds an unfinished run: go on with it by --resume" in capsys.readouterr().err


def test_resume_where_nothing_is_begins(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    line = f"train --resume --model {model_folder} --data {data_file} --steps 1 --out {tmp_path / 'new'}"
    assert main(line.split()) == 0
    assert (tmp_path / "new" / "adapter").is_dir()


def test_two_runs_in_one_folder_are_one_too_many(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock(tmp_path / "run"):
        assert main(["train", "--config", str(run_folder / "config.yaml"), "--out", str(tmp_path / "run")]) == 9
    assert "is in use by process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_signal_while_nothing_can_be_saved_is_one_line_and_leaves_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lorafit.app.rows.read_rows", interrupted)
    assert main(["train", "--config", str(run_folder / "config.yaml"), "--out", str(tmp_path / "run")]) == 75
    assert capsys.readouterr().err == "lorafit: stopped by SIGTERM; nothing half done is left behind\n"
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_training_saves_the_last_step(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the third evaluation batch: after step 4, before its held-out loss is known."""
    from lorafit.training import loop

    calls, evaluate = [0], loop.evaluate

    def interrupted(*given: Any, **options: Any) -> float:
        calls[0] += 1
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(*given, **options)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    out = tmp_path / "run"
    assert main(["train", "--config", str(run_folder / "config.yaml"), "--out", str(out)]) == 75
    said = f"lorafit: stopped by SIGUSR1 after 4 of 8 steps; saved in {out / 'checkpoints'}\n"
    assert capsys.readouterr().err == said
    assert main(["train", "--resume", "--out", str(out)]) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (out / name).read_bytes() == (run_folder / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(8))


@pytest.mark.parametrize("init", ["eva", "lora_one", "pissa"])
def test_a_start_that_takes_long_is_made_once_and_kept(
    init: str,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lorafit.training import loop

    line = f"train --model {model_folder} --data {data_file} --dtype float32 --device cpu --r 4 --lr 1e-2 --epochs 2"
    begin = [*line.split(), "--init", init, "--init-rows", "9", "--eval-rows", "4", "--batch-size", "4", "--rslora"]
    assert main([*begin, "--out", str(tmp_path / "whole")]) == 0
    written = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert (init == "eva") == bool(written["rank_pattern"])

    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: (os.kill(os.getpid(), signal.SIGUSR1), evaluate(*a, **k))[1])
    assert main([*begin, "--out", str(tmp_path / "cut")]) == 75
    monkeypatch.setattr(loop, "evaluate", evaluate)

    def again(*given: Any, **options: Any) -> Any:
        raise AssertionError("what is in the checkpoint is not made again")

    with monkeypatch.context() as patch:
        patch.setitem(INITS, init, dataclasses.replace(INITS[init], function=again))
        assert main([*begin, "--resume", "--out", str(tmp_path / "cut")]) == 0  # as a scheduler requeues it
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_inspect_shows_what_an_init_would_do(
    model_folder: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"inspect --model {model_folder} --dtype float32 --device cpu --r 4"
    assert main([*line.split(), "--init", "pissa"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "init pissa: share of ‖W‖² in s·B·A at the start"
    rows = {row.split()[0]: row.replace(",", "").split() for row in said if " mean " in row}
    name = "model.layers.{0..1}.mlp.up_proj"
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder)
    shares = []
    for layer in model.model.layers:
        energy = torch.linalg.svdvals(layer.mlp.up_proj.weight.double()).square()
        shares.append((energy[:4].sum() / energy.sum()).item())
    assert rows[name][1:] == ["×2", "mean", f"{sum(shares) / 2:.2%}", f"{min(shares):.2%}", "to", f"{max(shares):.2%}"]
    assert f"{name}  ×2   48 × 32   r=4, alpha=32" in "\n".join(said)
    assert main([*line.split(), "--init", "eva"]) == 2
    assert "init 'eva' looks at data: give --data" in capsys.readouterr().err
    assert main([*line.split(), "--init", "eva", "--data", str(data_file)]) == 0
    ranks = {part for part in capsys.readouterr().out.replace(",", "").split() if part.startswith("r=")}
    assert len(ranks) > 2


def test_eval_measures_the_held_out_rows_of_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "--config", str(run_folder / "config.yaml"), "--adapter", str(run_folder / "adapter")]
    assert main(line) == 0
    printed = capsys.readouterr().out
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    best = min(record["eval_loss"] for record in log if "eval_loss" in record)
    assert "4 rows" in printed
    base, adapted = (row.split("│")[2].strip() for row in printed.splitlines() if "model" in row or "adapter" in row)
    assert adapted == f"{best:.4f}"
    assert main(line[:3]) == 0
    alone = capsys.readouterr().out
    assert f" {base} " in alone
    assert "with adapter" not in alone
    assert float(base) > float(adapted)


def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, text: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(line.split()) == 0
    return capsys.readouterr().out


def test_chat_answers_a_pipe_and_switches_in_place(
    run_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"chat --model {model_folder} --adapter {run_folder / 'adapter'} --max-new-tokens 8 --dtype float32"
    ask = "What comes after 3?\n"
    printed = say(monkeypatch, capsys, line, f"{ask}/base\n/reset\n{ask}/adapter\n/reset\n\n{ask}/bse\n/quit\n{ask}")
    _, adapted, to_base, _, base, to_adapter, _, again, unknown = printed.splitlines()
    assert (to_base, to_adapter) == ("now without the adapter", "now with the adapter")
    assert adapted == again != base
    assert unknown == "unknown command /bse (did you mean '/base'?)"
    plain = f"chat --model {model_folder} --max-new-tokens 8 --dtype float32"
    _, without, none = say(monkeypatch, capsys, plain, f"{ask}/adapter\n").splitlines()
    assert without == base
    assert none == "there is no adapter: start with --adapter"


def test_chat_remembers_and_survives_a_full_context(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[list[str]] = []

    def stream(model: Any, tokenizer: Any, messages: Any, **options: Any) -> Any:
        heard.append([m["content"] for m in messages])
        yield from ("one ", "answer")

    with monkeypatch.context() as patch:
        patch.setattr("lorafit.model.generate.stream", stream)
        say(patch, capsys, f"chat --model {model_folder} --system Hm.", "a\nb\n/reset\nc\n")
    assert heard == [["Hm.", "a"], ["Hm.", "a", "one answer", "b"], ["Hm.", "c"]]
    printed = say(monkeypatch, capsys, f"chat --model {model_folder}", "x" * 600 + "\n")
    assert "shorten the conversation with /reset" in printed


def test_merge_saves_a_plain_model_that_answers_like_the_adapter(
    run_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafit.model.load import load_model

    adapter, out = run_folder / "adapter", tmp_path / "merged"
    line = f"merge --model {model_folder} --adapter {adapter} --out {out} --dtype float32".split()
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "largest logit difference" in printed
    agreeing, positions = printed.split("same greedy token at ")[1].split(" positions")[0].split(" of ")
    assert agreeing == positions
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    adapted, tokenizer = load_model(model_folder, adapter=adapter, dtype="float32", device="cpu")
    ids = torch.tensor([tokenizer("What comes after 5?")["input_ids"]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML
    half = tmp_path / "half"
    assert main([*line[:5], "--out", str(half), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("largest logit difference ")[1].split()[0]) > 1e-4, "one rounding to bfloat16 shows"
    assert transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16
    before = sorted(out.iterdir())
    assert main(line) == 8
    assert "choose a new folder" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_new_tokens_from_train_to_merge(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorafit.model.load import load_model

    rows = tmp_path / "rows.jsonl"
    rows.write_text(data_file.read_text().replace("comes", "<next>"))
    model = f"--model {model_folder} --dtype float32 --device cpu"
    new = "--new-tokens <next>,<last> --train-tokens 65"
    size = len(transformers.AutoTokenizer.from_pretrained(model_folder))
    assert main(f"inspect {model} --data {rows} --rows 1 {new}".split()) == 0
    assert "model.embed_tokens   3 rows trained" in capsys.readouterr().out
    run, out = tmp_path / "run", tmp_path / "merged"
    line = f"train {model} --data {rows} --out {run} --steps 2 {new}".split()
    assert main(line) == 0
    shutil.rmtree(run / "adapter")
    assert main([*line, "--resume"]) == 0
    said = json.loads((run / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == {"model.embed_tokens": [65, size, size + 1], "lm_head": [65, size, size + 1]}
    capsys.readouterr()
    more = f"{model} --adapter {run / 'adapter'}"
    assert main(f"eval {more} --data {rows}".split()) == 0
    assert main(f"inspect {more} --data {rows}".split()) == 0
    assert say(monkeypatch, capsys, f"chat {more} --max-new-tokens 4", "hello\n")
    assert main(f"train {more} --data {rows} --out {tmp_path / 'on'} --steps 1".split()) == 0
    assert (tmp_path / "on" / "adapter" / "tokenizer.json").is_file()
    assert main(f"merge {more} --out {out}".split()) == 0
    merged, tokenizer = load_model(out, dtype="float32", device="cpu")
    assert tokenizer("<next>")["input_ids"] == [size]
    assert merged.get_input_embeddings().weight.shape[0] == size + 2  # type: ignore[operator]
    assert main(f"train {more} --data {rows} --out {tmp_path / 'no'} --new-tokens <x>".split()) == 2
    assert "an adapter brings its own settings" in capsys.readouterr().err
    assert main(f"inspect {model} --train-tokens 9999".split()) == 2
    assert f"model.embed_tokens has {size} rows, and no 9999: add_tokens first" in capsys.readouterr().err


def test_a_base_in_8_bits_from_train_to_merge(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"--model {model_folder} --dtype float32 --device cpu"
    assert main(f"inspect {model} --storage int8".split()) == 0
    assert "model.layers.{0..1}.self_attn.q_proj  ×2   32 × 32" in capsys.readouterr().out
    run, out = tmp_path / "run", tmp_path / "merged"
    assert main(f"train {model} --data {data_file} --out {run} --steps 2 --storage int8".split()) == 0
    capsys.readouterr()
    assert main(f"merge {model} --adapter {run / 'adapter'} --out {out} --storage int8".split()) == 0
    printed = capsys.readouterr().out
    assert "merged into what their storage held, not into the original weights, and dense now: model" in printed
    assert float(printed.split("largest logit difference ")[1].split()[0]) < 1e-4
    assert transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] == set()


@pytest.mark.parametrize(("free", "said"), [(2**40, "a pass may hold "), (2**20, "passes are cut to ")])
def test_inspect_says_how_large_a_pass_may_be(
    free: int,
    said: str,
    model_folder: Path,
    data_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorafit.app.memory.free_memory", lambda device: free)
    line = f"inspect --model {model_folder} --data {data_file} --rows 0 --device cpu --dtype float32"
    assert main(line.split()) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory, estimated"))
    assert f"{free / 2**20:,.0f} MiB are free: {said}" in shown



def test_merge_goes_through_memory_where_the_files_will_not_do(
    run_folder: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A base without safetensors' usual names: the same weights, and why it took memory."""
    line = f"merge --adapter {run_folder / 'adapter'} --dtype float32 --model"
    assert main([*line.split(), str(model_folder), "--out", str(tmp_path / "files")]) == 0
    renamed = tmp_path / "renamed"
    shutil.copytree(model_folder, renamed)
    held = load_file(renamed / "model.safetensors")
    held = {name.removeprefix("model."): value for name, value in held.items()}
    save_file(held, renamed / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    monkeypatch.setattr("lorafit.training.memory.free_memory", lambda device: 1000)
    assert main([*line.split(), str(renamed), "--out", str(tmp_path / "memory")]) == 0
    printed = capsys.readouterr().out
    assert "merged in memory: its files have another name for model.layers.0.self_attn.q_proj.weight" in printed
    assert "not compared: the model has" in printed
    weights = [load_file(tmp_path / way / "model.safetensors") for way in ("files", "memory")]
    plain = {name.removeprefix("model."): value for name, value in weights[0].items()}
    assert plain.keys() == {name.removeprefix("model.") for name in weights[1]}
    assert all(torch.equal(value, plain[name.removeprefix("model.")]) for name, value in weights[1].items())


def test_inspect_shows_the_plan_and_the_tokens_that_carry_loss(
    model_folder: Path,
    run_folder: Path,
    data_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_weights(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("inspect must not read the weights")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", no_weights)
    line = f"inspect --model {model_folder} --data {data_file} --rows 2"
    assert main([*line.split(), "--targets", "q_proj,v_proj", "--r", "4"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0..1}.self_attn.q_proj  ×2" in printed
    assert "trained: " in printed
    assert "MiB" in printed
    tokens = int(printed.split("activations of ")[1].split()[0])
    assert 4 * 80 < tokens < 8 * 120, "the eight rows of the largest batch, not batch_size x max_length"
    assert "20 rows to train on" in printed
    assert "rows.jsonl:1" in printed
    assert "⟦1 comes.<|im_end|>⟧" in printed
    assert "⟦2 comes.<|im_end|>⟧" in printed
    assert "3 comes." not in printed
    assert main(["inspect", "--model", str(model_folder), "--adapter", str(run_folder / "adapter")]) == 0
    assert "r=4" in capsys.readouterr().out


def test_inspect_checks_a_file_without_a_model(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--data", str(data_file)]) == 0
    assert "20 rows" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text(data_file.read_text() + '{"prompt": "What?"}\n')
    assert main(["inspect", "--data", str(tmp_path / "bad.jsonl")]) == 3
    assert "bad.jsonl:21: no column 'completion'" in capsys.readouterr().err
    assert main(["inspect"]) == 2


def test_reading_many_rows_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("lorafit.app.rows.EVERY", 0.0)
    with rows.counted("reading x.jsonl") as progress:
        progress(1_000, 20_000)
    assert capsys.readouterr().out == "reading x.jsonl: 1,000 of 20,000 rows\n"


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    from rich.console import Console

    record = {"epoch": 0, "loss": 1.5, "grad_norm": 0.1, "lr": 1e-4, "tokens_per_second": 9.0, "memory_mb": 100.0}
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
        log = tmp_path / f"{terminal}.jsonl"
        with runs.progress(console, 3, log) as on_step:
            for step in range(3):
                on_step({"step": step, **record} | ({"eval_loss": 1.25} if step == 1 else {}))
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]
        shown[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in shown[True]
    assert "held-out loss 1.2500" in shown[True]
    first, second, last = shown[False].splitlines()
    assert first.startswith("step 1/3  loss 1.5000")
    assert "held-out 1.2500" in second
    assert last.startswith("step 3/3")


def test_the_epochs_table_gives_each_epoch_and_the_mean_since_the_start() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(runs.epochs_table([1.88, 1.26, 0.79], {1: 2.0, 3: 1.5, 5: 1.6}, steps_per_epoch=2))
    rows = [line.split() for line in console.file.getvalue().splitlines() if "." in line]  # type: ignore[attr-defined]
    numbers = [[cell for cell in row if cell[0].isdigit()] for row in rows]
    assert numbers == [
        ["1", "1.8800", "1.8800", "2.0000"],
        ["2", "1.2600", "1.5700", "1.5000"],
        ["3", "0.7900", "1.3100", "1.6000"],
    ]


# --- several processes --------------------------------------------------------------------------------


def in_company(line: str) -> tuple[int, str, str]:
    """One of several processes of a command line: its exit code, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main(line.split()), out.getvalue(), err.getvalue()


@pytest.mark.parametrize("flags", ["", " --shard"])
def test_train_in_two_processes_is_train_in_one(
    flags: str, run_folder: Path, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The settings of `run_folder`; in fp32 and at this learning rate AdamW makes 1e-5 of what rounding differs by."""
    line = f"train --model {model_folder} --data {data_file} --out OUT --dtype float32 --device cpu --r 4"
    line = f"{line} --lr 1e-2 --epochs 2 --eval-rows 4 --batch_size 4 --init gaussian{flags}"
    first, second = processes.run(2, in_company, line.replace("OUT", str(tmp_path / "run")))
    assert (first[0], second) == (0, (0, "", ""))
    assert "16 rows to train on" in first[1]
    assert first[2] == ""
    one, two = (runs.read_run(folder) for folder in (run_folder, tmp_path / "run"))
    assert [r["tokens"] for r in two.records] == [r["tokens"] for r in one.records]
    for name in ("loss", "lr", "grad_norm"):
        assert [r[name] for r in two.records] == pytest.approx([r[name] for r in one.records], rel=1e-3)
    assert list(two.evaluations.values()) == pytest.approx(list(one.evaluations.values()), rel=1e-4)
    assert [layer["layer"] for layer in two.about["layers"]] == [layer["layer"] for layer in one.about["layers"]]
    assert [row["before"] for row in two.about["samples"]] == [row["before"] for row in one.about["samples"]]
    configs = [json.loads((f / "adapter/adapter_config.json").read_bytes()) for f in (tmp_path / "run", run_folder)]
    assert configs[0] == configs[1]
    made, expected = (load_file(f / "adapter/adapter_model.safetensors") for f in (tmp_path / "run", run_folder))
    for name, tensor in expected.items():
        assert torch.allclose(made[name], tensor, atol=1e-3), name
    again = processes.run(2, in_company, line.replace("OUT", str(tmp_path / "run")))
    assert [code for code, _, _ in again] == [8, 8]
    assert "".join(err for _, _, err in again).count("already holds a trained adapter") == 1


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        ("train --model M --data no/such.jsonl --out O --device cpu", 3, "no/such.jsonl"),
        ("train --model no/such/model --data D --out O --device cpu", 4, "no/such/model"),
        ("train --model M --data D --out O --device cuda:1", 2, "cannot all have cuda:1"),
        ("train --lrr 1", 2, "--lrr"),
        ("chat --model M", 2, "chat is for one process, and this is one of 2"),
    ],
)
def test_of_two_processes_one_says_what_is_wrong(
    line: str, code: int, named: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    names = {"M": str(model_folder), "D": str(data_file), "O": str(tmp_path / "out")}
    found = processes.run(2, in_company, " ".join(names.get(word, word) for word in line.split()))
    assert [exit_code for exit_code, _, _ in found] == [code, code]
    said = "".join(err for _, _, err in found)
    assert said.count("\n") == 1
    assert named in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torch.distributed.run", "accelerate.commands.launch"])
def test_torchrun_and_accelerate_start_it(launch: str, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    how = {
        "torch.distributed.run": "--nproc-per-node 2",
        "accelerate.commands.launch": "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no",
    }
    line = f"{sys.executable} -m {launch} {how[launch]} -m lorafit -- train --model {model_folder} --data {data_file}"
    line += f" --out {tmp_path / 'run'} --dtype float32 --device cpu --r 4 --init eva --batch_size 4 --samples 0"
    done = subprocess.run(line.split(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows to train on") == 1
    assert len(runs.read_run(tmp_path / "run").records) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "process of this run"), (signal.SIGTERM, "SIGTERM")])
def test_under_torchrun_the_loss_of_one_ends_all_and_a_signal_saves(
    number: int, said: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """SIGKILL for one of the workers, SIGTERM for torchrun, which passes it on; then the run goes on."""
    begin = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 -m lorafit -- train --out {tmp_path / 'run'}"
    line = f"{begin} --model {model_folder} --data {data_file} --device cpu --epochs 20 --save-every 0 --samples 0"
    with subprocess.Popen(line.split(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        log = tmp_path / "run" / runs.LOG
        for _ in range(1200):
            time.sleep(0.05)
            if log.is_file() and log.read_text().count("\n") >= 3:
                break
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(workers[1]) if number == signal.SIGKILL else running.pid, number)
        _, err = running.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("lorafit: ")]
    assert len(lines) == 1, err
    assert said in lines[0]
    again = subprocess.run([*begin.split(), "--resume"], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout
    assert [record["step"] for record in runs.read_run(tmp_path / "run").records] == list(range(60))
