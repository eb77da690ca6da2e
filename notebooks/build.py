"""Makes both notebooks of one source, `lesson.md`: prose in English and Chinese, and the code once.

    python notebooks/build.py          # the text anew; outputs stay with the code that made them
    python notebooks/build.py --run    # and everything executed anew, once: the code of the two is the same

In the source a line `<!-- en -->`, `<!-- zh -->` or `<!-- code -->` begins a cell's text.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "lesson.md"
NAMES = {"en": "lora_from_scratch.ipynb", "zh": "lora_from_scratch.zh.ipynb"}
MARK = re.compile(r"^<!-- (en|zh|code) -->\n", re.MULTILINE)


def parts(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each part of the source, in its order."""
    nothing, *rest = MARK.split(text)
    assert not nothing.strip(), "text before the first mark"
    return [(kind, body.strip()) for kind, body in zip(rest[::2], rest[1::2], strict=True)]


def notebook(text: str, language: str) -> Any:
    """The notebook in `language`, without outputs."""
    made = new_notebook(metadata={"language_info": {"name": "python"}, "kernelspec": KERNEL})
    for kind, body in parts(text):
        if kind == "code":
            made.cells.append(new_code_cell(re.sub(r"^```python\n|\n```$", "", body)))
        elif kind == language:
            made.cells.append(new_markdown_cell(body))
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number:03}"
    return made


KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(made: Any) -> None:
    """Run every cell; a cell that fails raises."""
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
    NotebookClient(made, km=kernel, timeout=None, record_timing=False).execute()
    made.metadata = {"language_info": {"name": "python"}, "kernelspec": KERNEL}  # not the machine's


def outputs(made: Any) -> dict[str, tuple[Any, Any]]:
    """What stands under each code cell, by its code."""
    return {cell.source: (cell.execution_count, cell.outputs) for cell in made.cells if cell.cell_type == "code"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="execute the code")
    parser.add_argument("--only", choices=NAMES, help="make the notebook in this language alone")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    asked = parser.parse_args()
    text = SOURCE.read_text(encoding="utf-8")
    known: dict[str, tuple[Any, Any]] = {}
    for language in [asked.only] if asked.only else NAMES:
        made, file = notebook(text, language), asked.out / NAMES[language]
        if asked.run and not known:
            execute(made)
            known = outputs(made)
        elif not known and file.exists():
            known = outputs(nbformat.read(file, as_version=4))
        for cell in made.cells:
            if cell.cell_type == "code" and cell.source in known:
                cell.execution_count, cell.outputs = known[cell.source]
        nbformat.validate(made)
        nbformat.write(made, file)


if __name__ == "__main__":
    main()
