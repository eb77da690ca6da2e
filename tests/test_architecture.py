"""The layout is a promise: imports go down, without a cycle; the command line starts without torch."""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorafit

ROOT = Path(lorafit.__file__).parent
# From the top down; folders in one row do not know each other.
GROUND = ("config", "files", "locks", "hub", "world", "errors")
ROWS = (("app",), ("model",), ("training",), ("adapter",), ("lora", "data"), GROUND)
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "safetensors", "numpy")
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def sources() -> dict[str, Path]:
    """Module name below `lorafit` -> file, without the package's own `__init__` and `__main__`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("lorafit.") in known else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("lorafit.") for name in found if name.startswith("lorafit.")}


def graph() -> dict[str, set[str]]:
    files = sources()
    return {name: imports(path, set(files)) for name, path in files.items()}


def row(module: str) -> int:
    return next(number for number, names in enumerate(ROWS) if module.split(".")[0] in names)


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[0] for name in sources()} <= {name for names in ROWS for name in names}


def test_imports_go_down_only() -> None:
    for module, used in graph().items():
        for other in used:
            inside = module.split(".")[0] == other.split(".")[0]
            ground = row(module) == len(ROWS) - 1
            assert inside or row(other) > row(module) or (ground and row(other) == row(module)), (
                f"{module} imports {other}"
            )


def test_there_is_no_cycle() -> None:
    list(graphlib.TopologicalSorter(graph()).static_order())


def test_nothing_imports_the_package_itself() -> None:
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lorafit":
                assert {alias.name for alias in node.names} <= {"__version__"}, module


def test_the_command_line_starts_without_anything_heavy() -> None:
    program = f"import sys, lorafit.app.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", lorafit.__all__)
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(lorafit, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), name
        assert value.__module__.startswith("lorafit.")


def test_public_names_are_sorted_and_nothing_else_is_public() -> None:
    assert sorted(lorafit.__all__) == sorted(set(lorafit.__all__))
    assert dir(lorafit) == sorted(lorafit.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'add_lore'"):
        lorafit.add_lore  # noqa: B018


@pytest.mark.parametrize("module", sources())
def test_files_and_functions_stay_short_and_say_what_they_are(module: str) -> None:
    text = sources()[module].read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{module}.{node.name}"


def test_the_way_from_train_to_backward_is_under_twenty_lines() -> None:
    """The lines a call runs through: those of `train` up to `take_step`, and those of that up to `backward`."""
    functions = {
        node.name: node
        for node in ast.parse((ROOT / "training/loop.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert lines_until(functions["train"], "take_step") + lines_until(functions["take_step"], "backward") < 20


def lines_until(function: ast.FunctionDef, call: str) -> int:
    """How many lines of `function` hold code, from behind its docstring to the one that calls `call`."""
    body = function.body[1:]
    found = next(
        node.lineno
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == call
    )
    lines = {node.lineno for statement in body for node in ast.walk(statement) if hasattr(node, "lineno")}
    return len([line for line in lines if line <= found])
