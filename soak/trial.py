"""Does the test suite find a bug? Some of its files, run against a changed copy of the tree in a forked child.

The child is forked from a process in which torch, transformers, PEFT, pytest and hypothesis are loaded, so a trial
costs what the tests themselves cost. Only lorafit and the tests are loaded anew, from the copy.
"""

import importlib
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from soak.state import ROOT
from soak.workers import fork

TREE = ("src", "soak", "tests", "docs", "README.md", "pyproject.toml")
OURS = ("lorafit", "soak", "tests")
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon",
    "mixtral", "cohere", "granite", "mamba",
)  # fmt: skip
FOUND = (1, 2)  # pytest's exit codes when a test failed, and when a file could not be imported
WRONG_TREE = 70
WAIT = 5  # times as long as the processor's time, on a machine that has other things to do


def suite_fails(folder: Path, tests: Sequence[str], changes: Mapping[str, str], seconds: float = 120) -> bool:
    """Whether one of `tests` (paths) fails, crashes or computes for more than `seconds` when `changes` {path: text} are
    made."""
    return _outcome(folder, tests, changes, seconds) != 0


@cache
def check_untouched(test: str, seconds: float = 300) -> None:
    """The file `test` passes on a copy that nothing was done to: what it finds in another copy is the change."""
    with tempfile.TemporaryDirectory(prefix="soak-untouched-", ignore_cleanup_errors=True) as folder:
        code = _outcome(Path(folder), [test], {}, seconds)
        if code != 0:
            raise RuntimeError(f"{test} fails on the untouched tree ({code}): {_last_words(Path(folder))}")


def _outcome(folder: Path, tests: Sequence[str], changes: Mapping[str, str], seconds: float) -> int:
    """pytest's exit code; negative when the child had to be ended or ended itself by a signal."""
    _warm()
    tree = folder / "tree"
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.json"))
        else:
            shutil.copy(ROOT / name, tree / name)
    for path, text in changes.items():
        (tree / path).write_text(text, encoding="utf-8")
    child = fork(_test, tree, list(tests), folder / "output", seconds)
    child.join(WAIT * seconds)
    if child.is_alive():
        child.kill()
        child.join()
    code = child.exitcode
    assert code is not None
    if code > 0 and code not in FOUND:
        raise RuntimeError(f"pytest could not run {' '.join(tests)} ({code}): {_last_words(folder)}")
    return code


def _last_words(folder: Path) -> str:
    lines = (folder / "output").read_text(encoding="utf-8", errors="replace").split("\n")
    return " | ".join(line.strip() for line in lines[-12:] if line.strip())[-600:]


@cache
def _warm() -> None:
    """Import what the tests import, here instead of in every child."""
    import torch

    torch.set_num_threads(1)
    for name in ("peft", "torch._dynamo", "trl"):
        importlib.import_module(name)
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _test(tree: Path, tests: list[str], output: Path, seconds: float) -> None:
    """The child: never returns."""
    code = WRONG_TREE
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), round(seconds) + 5))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree / "src")  # for the programs that tests start
        sys.path.insert(0, str(tree / "src"))
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        importlib.invalidate_caches()
        lorafit = importlib.import_module("lorafit")
        if Path(str(lorafit.__file__)).is_relative_to(tree.resolve()):
            # Random, but the same every time; and a failure need not be made small.
            phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
            hypothesis.settings.register_profile("trial", hypothesis.settings.get_profile("ci"), phases=phases)
            options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tmp'}"]
            code = int(pytest.main([*options, "--hypothesis-profile=trial", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
