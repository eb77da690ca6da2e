"""Bugs made by a machine: cosmic-ray changes one operator, number or condition; does the test suite notice?"""

import ast
import importlib
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from soak.state import ROOT
from soak.trial import check_untouched, suite_fails

NAME = "mutants"
WHAT = "a change of one operator, number or condition in the core is noticed by the tests that mirror its file"
COUNT = 200
LONG = 1000
PASS = 0.85
LIMIT = 3600.0
SOURCES = ("src", "soak", "tests")

# The tests of each file, the quickest to find something first.
TESTS = {
    "lora/layers.py": ("lora/test_layers.py", "test_properties.py", "lora/test_fused.py", "lora/test_inject.py"),
    "lora/fused.py": ("lora/test_fused.py", "lora/test_layers.py"),
    "training/loss.py": ("training/test_loss.py",),
    "data/chat.py": ("data/test_chat.py", "data/test_templates.py"),
    "data/batches.py": ("data/test_batches.py",),
    "files.py": ("test_files.py", "test_reliability.py"),
    "adapter/peft_format.py": ("adapter/test_peft_format.py", "test_peft_parity.py"),
    "adapter/peft_config.py": ("adapter/test_peft_config.py", "adapter/test_peft_format.py", "test_peft_parity.py"),
    "adapter/weights_file.py": ("adapter/test_weights_file.py", "adapter/test_peft_format.py"),
}


class Explained(NamedTuple):
    """No test can notice `new` in place of `old`, which stands once in `file`; and why."""

    file: str
    old: str
    new: str
    why: str


EXPLAINED = (
    Explained("lora/fused.py", "    @staticmethod\n    def forward", "    def forward",
        "torch calls it through the class, where it is a plain function either way"),
    Explained("lora/fused.py", "    @staticmethod\n    @once_differentiable", "    @once_differentiable",
        "torch calls it through the class, where it is a plain function either way"),
    Explained("training/loss.py", "    @staticmethod\n    def forward", "    def forward",
        "torch calls it through the class, where it is a plain function either way"),
    Explained("training/loss.py", "    @staticmethod\n    @once_differentiable", "    @once_differentiable",
        "torch calls it through the class, where it is a plain function either way"),
    Explained("training/loss.py", "logits.shape == expected.shape", "logits.shape <= expected.shape",
        "where the shapes differ, so do the vocabularies, and the subtraction behind it is refused all the same"),
    Explained("training/loss.py", "use_cache=False).logits[0]", "use_cache=False).logits[-1]",
        "the hook has made it a batch of one"),
    Explained("adapter/peft_format.py", "else dtype == self.dtype", "else dtype is self.dtype",
        "torch has one object for each type"),
    *(Explained("training/loss.py", "TILE = 4096", f"TILE = {size}",
        "the size of a tile is a matter of memory and speed")
      for size in (4095, 4097)),
)  # fmt: skip
# These want to be told which names they may change.
NEED_ARGUMENTS = ("VariableReplacer", "VariableInserter")


class Mutant(NamedTuple):
    """`file` (below src/lorafit) with one line changed by an operator of cosmic-ray's."""

    file: str
    operator: str
    line: int
    old: str
    new: str
    text: str


class _Site(NamedTuple):
    """The n-th place where an operator can change a file."""

    operator: str
    occurrence: int
    start: tuple[int, int]


def drawn(case: int) -> Mutant:
    """Mutant number `case`: the files take turns; within one every place comes once before any comes twice."""
    found, more = _draw()
    while len(found) <= case:
        found.append(next(more))
    return found[case]


@cache
def _draw() -> tuple[list[Mutant], Iterator[Mutant]]:
    """Those made so far, and the others: each is made when it is asked for."""
    turns = zip_longest(*map(mutants_of, TESTS))
    return [], (mutant for turn in turns for mutant in turn if mutant is not None)


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every mutant of one file, in the order they are drawn."""
    mutate = importlib.import_module("cosmic_ray.mutating").mutate_code
    source = (ROOT / "src/lorafit" / file).read_text(encoding="utf-8")
    known = {ast.dump(ast.parse(text)) for text in (source, *explained(file))}
    for site in _sites(source, file):
        try:
            text = mutate(source, _operators()[site.operator](), site.occurrence)
            if text is None or ast.dump(ast.parse(text)) in known:
                continue
            compile(text, file, "exec")
        except (SyntaxError, AttributeError):  # no Python; or an exception with a dot in its name, beyond cosmic-ray
            continue
        lines = zip(source.splitlines(), text.splitlines(), strict=False)
        number, old, new = next((n, a, b) for n, (a, b) in enumerate(lines, 1) if a != b)
        yield Mutant(file, site.operator, number, old.strip(), new.strip(), text)


def explained(file: str) -> list[str]:
    """The texts of `file` with each change that is explained. LookupError when one has gone stale."""
    source = (ROOT / "src/lorafit" / file).read_text(encoding="utf-8")
    found = [entry for entry in EXPLAINED if entry.file == file]
    for entry in found:
        if source.count(entry.old) != 1:
            raise LookupError(f"{entry.old!r}, explained in mutants.py, does not stand once in {file}")
    return [source.replace(entry.old, entry.new) for entry in found]


@cache
def _operators() -> dict[str, Any]:
    provider = importlib.import_module("cosmic_ray.operators.provider").OperatorProvider()
    return {name: provider[name] for name in provider if name not in NEED_ARGUMENTS}


def _sites(source: str, seed: str) -> list[_Site]:
    """Every place in `source`, shuffled, and those at one position that differ only in what is put there in turns."""
    tree = importlib.import_module("cosmic_ray.ast")
    nodes = list(tree.ast_nodes(tree.get_ast(source)))
    closed = _closed(source)
    sites = []
    for name, kind in _operators().items():
        operator = kind()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        sites += [
            _Site(name, occurrence, start)
            for occurrence, start in enumerate(starts)
            if not any(low <= start < high for low, high in closed)
        ]
    random.Random(seed).shuffle(sites)
    seen: Counter[tuple[str, tuple[int, int]]] = Counter()
    turns = []
    for site in sites:
        key = (site.operator.split("_")[0], site.start)
        turns.append((seen[key], site))
        seen[key] += 1
    return [site for _, site in sorted(turns, key=lambda turn: turn[0])]


def _closed(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change changes nothing that a test is about: annotations, and what an error says."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        inner: list[ast.expr | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            inner = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            inner = [node.returns]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            inner = [*node.exc.args]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "listing":
            inner = [*node.args]  # for a message, too
        for part in inner:
            if part is not None:
                assert part.end_lineno is not None and part.end_col_offset is not None  # noqa: PT018
                spans.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return spans


def run(case: int, folder: Path) -> str | None:
    mutant = drawn(case)
    tests = [f"tests/{name}" for name in TESTS[mutant.file]]
    for test in tests:
        check_untouched(test)
    if suite_fails(folder, tests, {f"src/lorafit/{mutant.file}": mutant.text}):
        return None
    return (
        f"mutant {case} survives {', '.join(tests)}: {mutant.file}:{mutant.line} ({mutant.operator}) "
        f"-{mutant.old} +{mutant.new}"
    )
