"""The notebooks: both are what their source says, they say the same, their outputs are there, and they run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lorafit.app import demo_model
from lorafit.errors import ModelError
from notebooks import build

LANGUAGES = list(build.NAMES)
NUMBER = re.compile(r"(?<![\w.])[−-]?\d+(?:[.,]\d+)*")


def read(language: str) -> Any:
    return nbformat.read(build.HERE / build.NAMES[language], as_version=4)


def code(made: Any) -> list[Any]:
    return [cell for cell in made.cells if cell.cell_type == "code"]


def prose(made: Any) -> list[str]:
    return [cell.source for cell in made.cells if cell.cell_type == "markdown"]


def numbers(text: str) -> list[str]:
    return sorted(NUMBER.findall(text))


def shown(cell: Any) -> Iterator[str]:
    """Every text under a cell."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_notebook_is_what_its_source_says(language: str) -> None:
    made = build.notebook(build.SOURCE.read_text(encoding="utf-8"), language)
    kept = read(language)
    assert [(c.id, c.cell_type, c.source) for c in kept.cells] == [(c.id, c.cell_type, c.source) for c in made.cells]


def test_both_have_the_same_code_numbers_and_outputs() -> None:
    english, chinese = read("en"), read("zh")
    assert [c.source for c in code(english)] == [c.source for c in code(chinese)]
    assert [c.outputs for c in code(english)] == [c.outputs for c in code(chinese)]
    for ours, theirs in zip_longest(prose(english), prose(chinese), fillvalue=""):
        assert numbers(ours) == numbers(theirs), theirs
        assert re.findall(r"\]\((.+?)\)", ours) == re.findall(r"\]\((.+?)\)", theirs)
        assert sorted(re.findall(r"(?<!`)`[^`]+`", ours)) == sorted(re.findall(r"(?<!`)`[^`]+`", theirs))
        assert re.search(r"[\u4e00-\u9fff]", theirs)
        assert not re.search(r"[\u4e00-\u9fff]", ours)


@pytest.mark.parametrize("language", LANGUAGES)
def test_outputs_are_there_and_nothing_of_this_machine_in_them(language: str) -> None:
    made = read(language)
    assert [cell.execution_count for cell in code(made)] == list(range(1, len(code(made)) + 1))
    assert "full run" in "".join(shown(code(made)[0]))
    for cell in code(made):
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        assert sum("image/png" in output.get("data", {}) for output in cell.outputs) >= ("plt.show()" in cell.source)
        for text in shown(cell):
            assert not re.search(r"(?<![\w.:/])/(?:\w+/)+\w+|[A-Z]:\\|https?://(?!huggingface\.co)", text), text


def test_every_figure_in_the_prose_has_been_computed() -> None:
    """A number with decimals or thousands stands in the code, or in what came out of it."""
    made = read("en")
    computed = "\n".join(text for cell in code(made) for text in (cell.source, *shown(cell))).replace("_", "")
    for text in prose(made):
        plain = re.sub(r"\]\(.+?\)|arXiv:[\d.]+|Qwen1\.5-0\.5B|PyTorch [\d.]+|^#+ [\d.]+", "", text, flags=re.MULTILINE)
        for number in numbers(plain):
            if re.search(r"[.,]", number):
                assert number.replace(",", "") in computed.replace(",", ""), number


def run(language: str, folder: Path, **environment: str) -> Any:
    try:
        demo_model.find_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    command = [sys.executable, str(build.__file__), "--run", "--only", language, "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / build.NAMES[language], as_version=4)


def test_it_runs_with_small_settings(tmp_path: Path) -> None:
    made = run("en", tmp_path, LORAFIT_NOTEBOOK="quick")
    assert "quick run" in "".join(shown(code(made)[0]))
    assert all(cell.execution_count for cell in code(made))


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_it_runs_in_full(language: str, tmp_path: Path) -> None:
    made = run(language, tmp_path, LORAFIT_NOTEBOOK="")
    assert "full run" in "".join(shown(code(made)[0]))
