"""README and docs: their Python runs, their commands do what is shown, their links lead somewhere.

```python   is run, in a folder that holds a model under the name it has on the hub, and rows
```console  is run line by line (`$ command`), and prints and returns what stands there
```sh       is read: each `lorafit …` has a verb, flags and values that there are; so has each one in the text
```json     is a row of a data file, or another text in JSON
"""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = re.compile(r"<!-- speed -->.*?<!-- /speed -->", re.DOTALL)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what README's examples name: the model under its hub name, and rows."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = CHATML
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pages(text: str) -> list[Any]:
    """The pages that contain `text`, each a case of its own. What README.zh-CN.md runs is what README.md runs."""
    return [
        pytest.param(page, id=page.name)
        for page in PAGES
        if page != CHINESE and text in page.read_text(encoding="utf-8")
    ]


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- what is run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages("```python"))
def test_python_blocks_run(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorafit import INITS, VARIANTS
    from lorafit.app.trackers import TRACKERS

    with patch.dict(INITS), patch.dict(VARIANTS), patch.dict(TRACKERS):  # what a page registers goes with it
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), {})
    if page == README:
        assert "loss per epoch" in capsys.readouterr().out
        assert (workplace / "adapter" / "adapter_model.safetensors").is_file()
        assert (workplace / "merged" / "model.safetensors").is_file()


def commands(block: str) -> Iterator[tuple[str, list[str], int]]:
    """(command, the lines it prints, its exit code) of a console block; `(exit code 2)` is the last of its lines."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *lines = part.replace("\\\n", " ").splitlines()
        code = re.fullmatch(r"\(exit code (\d+)\)", lines[-1]) if lines else None
        yield command, lines[:-1] if code else lines, int(code[1]) if code else 0


def shown(lines: list[str]) -> re.Pattern[str]:
    """What a command has to print: `…` stands for anything in a line, and alone in a line for any lines."""
    parts = ["(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*?") + "[ ]*\n" for line in lines]
    return re.compile("".join(parts))


@pytest.mark.parametrize("page", pages("```console"))
def test_consoles_show_what_is_printed(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorafit.app import cli

    capsys.readouterr()
    for block in blocks(page, "console"):
        for command, lines, code in commands(block):
            verb, *words = shlex.split(command)
            if verb == "lorafit":
                answered = cli.main(words)
                said = capsys.readouterr()
                printed = said.out + said.err
            else:
                done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
                answered, printed = done.returncode, done.stdout + done.stderr
            assert (answered, printed) == (code, printed), command
            assert shown(lines).fullmatch(printed), f"{page.name}: {command}\n{printed}"


# --- what is read ------------------------------------------------------------------------------------


@each_page
def test_commands_are_understood(page: Path) -> None:
    """Every `lorafit …` line has a known verb, known flags and values of the right kind."""
    from lorafit.app import cli, options

    known = {key for verb in cli.VERBS.values() for key in options.names(verb)}
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(lorafit \w[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
        if words[:1] == ["torchrun"]:
            words = words[words.index("lorafit") :]
        if words[:1] == ["make"]:
            assert f"\n{words[-1]}:" in (ROOT / "Makefile").read_text(), line
        if script := re.search(r"\bpython (benchmarks/\w+\.py)", line):
            assert (ROOT / script[1]).is_file(), line
        if words[:1] == ["lorafit"] and words[1:] and not {"--help", "--version"} & {*words}:
            assert words[1] in cli.VERBS, line
            options.read(words[1], cli.VERBS[words[1]], words[2:], known)


@each_page
def test_json_is_json(page: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, a heading that is in it, and a `file.py::name` that is defined in it."""
    for text, target in re.findall(r"\[([^][]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in slugs(file), f"{page.name} links to {target}"
        for wanted in re.findall(r"::(\w+)", text):
            assert wanted in definitions(file), f"{page.name} links to {text}"


@each_page
def test_files_that_are_spoken_of_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:tests|soak|src|benchmarks|docs)/[\w/.-]+\.\w+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name} speaks of {name}"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", title).lower()).replace(" ", "-") for title in titles}


def definitions(file: Path) -> set[str]:
    """The names that a Python file defines, at the top or in a class."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AnnAssign) for t in ast.walk(n)]
    return named | {t.id for t in targets if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}


# --- README, in two languages ------------------------------------------------------------------------


def test_the_readme_example_has_twelve_lines() -> None:
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_both_readmes_have_the_same_code_links_and_figures() -> None:
    """Comments in code, link texts and words differ; what is done, where it leads and what was measured does not.

    The tables that the benchmarks write stand in the English one alone.
    """
    english, chinese = (GENERATED.sub("", file.read_text(encoding="utf-8")) for file in (README, CHINESE))
    assert GENERATED.search(README.read_text(encoding="utf-8"))

    def code(text: str) -> list[list[str]]:
        bare = (re.sub(r"\s+#.*", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
        return [[line.rstrip() for line in block.splitlines() if line.strip()] for block in bare]

    def links(text: str) -> list[str]:
        there = re.findall(r"\]\(([^)]+)\)", text)
        return sorted(link for link in there if link not in (README.name, CHINESE.name))

    def figures(text: str) -> list[str]:
        words = re.sub(r"```.*?```|\]\([^)]+\)|^\d+\. ", "", text, flags=re.DOTALL | re.MULTILINE)
        return sorted(re.findall(r"\d[\d.,/e-]*\d|\d", words))

    assert code(english) == code(chinese)
    assert links(english) == links(chinese)
    assert figures(english) == figures(chinese)


def test_the_readme_names_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"}


def test_the_readmes_figures_are_those_that_were_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    text = README.read_text(encoding="utf-8")
    runs = json.loads((results / "demo.json").read_text())["runs"]
    for row, name in (
        ("base model", "base model"),
        ("with adapter", "with adapter"),
        ("merged model", "merged model"),
        ("with adapter, in sentence patterns never trained on", "adapter, new patterns"),
    ):
        right = ", ".join("{exact}/{rows}".format_map(run["scores"][name]) for run in runs)
        assert f"| {row} | {right} |" in text
    run = json.loads((results / "bioinstruct.json").read_text())
    ours, theirs = run["lorafit"]["epochs"], run["peft"]["epochs"]
    for n in range(len(ours)):
        cells = [ours[n], theirs[n], *(sum(losses[: n + 1]) / (n + 1) for losses in (ours, theirs))]
        assert f"| {n + 1} | {' | '.join(f'{cell:.4f}' for cell in cells)} |" in text
    assert f"{run['largest_loss_difference']:.1e}" in text


# --- single pages ------------------------------------------------------------------------------------


def test_the_files_beside_data_md_are_read(workplace: Path) -> None:
    """Each is linked and becomes examples; the rows on the page are in them; alpaca is one in all kinds of file."""
    from lorafit import load_model, read_examples

    page = ROOT / "docs" / "data.md"
    _, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    files = sorted((page.parent / "examples").iterdir())
    assert {file.name for file in files} == set(re.findall(r"\(examples/([^)]+)\)", page.read_text(encoding="utf-8")))
    ids: dict[str, list[list[int]]] = {}
    for file in files:
        examples = read_examples(str(file), tokenizer)
        assert len(examples) >= 2
        assert all(any(label >= 0 for label in example.labels) for example in examples)
        ids.setdefault(file.stem, [example.ids for example in examples])
        assert ids[file.stem] == [example.ids for example in examples]
    texts = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".jsonl"]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    on_page = [json.loads(block) for block in blocks(page, "json")]
    assert len(on_page) == len(ids) == 5
    assert [row for row in on_page if row not in rows] == []


def test_errors_md_has_every_error() -> None:
    from lorafit import errors

    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    family = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.LorafitError)]
    expected = {(cls.__name__, str(cls.exit_code), (cls.__doc__ or "").strip()) for cls in family}
    assert set(rows) == {(name, code, " ".join(doc.split())) for name, code, doc in expected}


def test_file_format_md_has_every_field() -> None:
    """Those that are needed, those that are read, those that are history, those that have to be off."""
    from lorafit.adapter import peft_config

    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", (ROOT / "docs" / "file-format.md").read_text(), re.MULTILINE)
    known = peft_config.DEFAULTS
    said = {name: what for cell, what in rows for name in re.findall(r"`(\w+)`", cell) if name in known}
    assert said.keys() == known.keys()
    for name, what in said.items():
        assert what.startswith("needed") == (name in peft_config.NEEDED), name
        assert what.startswith("how it was made") == (name in peft_config.HISTORY), name
        assert what.startswith("has to be off") == (name in peft_config.UNSUPPORTED), name


def test_moving_from_peft_names_what_there_is() -> None:
    """Left of the line: a field of peft, trl or transformers; right of it: a flag, a setting or a function of ours."""
    import lorafit
    from lorafit.app import cli, options

    ours = {f.name for cls in ("DataConfig", "LoraConfig", "ModelConfig", "TrainConfig") for f in _fields(cls)}
    ours |= {*lorafit.__all__, *lorafit.INITS, *lorafit.VARIANTS}
    ours |= {name for function in ("load_lora", "save_lora", "train") for name in _parameters(function)}
    flags = {f"--{name.rstrip('_').replace('_', '-')}" for verb in cli.VERBS.values() for name in options.names(verb)}
    sources = {package: "".join(path.read_text() for path in _sources(package)) for package in ("peft", "trl")}
    table = re.findall(
        r"^\| (.*`.*) \| (.+) \|$", (ROOT / "docs" / "moving-from-peft.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(table) > 30
    for theirs, here in table:
        for code in re.findall(r"`([^`]+)`", theirs):
            name = re.match(r"\w+", code.strip('"').removeprefix("peft.").removeprefix("model."))
            assert name, code
            known = any(re.search(rf"\b{name[0]}\b", text) for text in sources.values())
            assert known, f"{code} is nowhere in PEFT or TRL"
        for code in re.findall(r"`([^`]+)`", re.sub(r"\[[^]]*\]\([^)]*\)", "", here)):  # links have a test of their own
            if code.startswith("lorafit "):
                continue  # test_commands_are_understood
            word = code.partition(" ")[0] if code.startswith("--") else re.split(r"[(=]", code)[0]
            assert word in (flags if code.startswith("--") else ours), f"{code} is nothing of lorafit's"


def _fields(cls: str) -> tuple[Any, ...]:
    import lorafit

    return dataclasses.fields(getattr(lorafit, cls))


def _parameters(function: str) -> list[str]:
    import lorafit

    return list(inspect.signature(getattr(lorafit, function)).parameters)


def _sources(package: str) -> Iterator[Path]:
    """The files in which PEFT's and TRL's settings are declared."""
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    if package == "peft":
        yield from (folder / name for name in ("peft_model.py", "tuners/lora/config.py", "tuners/lora/model.py"))
        yield from (folder / "mapping_func.py", folder / "tuners" / "tuners_utils.py", folder / "__init__.py")
    else:
        transformers = find_spec("transformers")
        assert transformers is not None
        assert transformers.origin is not None
        yield folder / "trainer" / "sft_config.py"
        yield folder / "trainer" / "sft_trainer.py"
        yield Path(transformers.origin).parent / "training_args.py"
