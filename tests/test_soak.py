"""The soak itself: it does every case, forgets none when it is stopped, and does not take a crash for a success."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soak import __main__ as soak
from soak import mutants, planted, trial, workers
from soak.__main__ import Display, Part, parts, run_part
from soak.state import State


def part(run: workers.Run, **changes: Any) -> Part:
    made = Part("made", "a promise", count=20, long=40, run=run, share=1.0, limit=60.0, sources=("soak",))
    return replace(made, **changes)


def holds(case: int, folder: Path) -> None:
    assert folder.is_dir()
    assert not list(folder.iterdir())
    (folder / "scratch").touch()


def fails_at_seven(case: int, folder: Path) -> str | None:
    return f"case {case} is broken" if case == 7 else None


def dies_at_seven(case: int, folder: Path) -> None:
    if case == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def raises_at_seven(case: int, folder: Path) -> None:
    if case == 7:
        raise ValueError("no such thing")


def hangs_at_seven(case: int, folder: Path) -> None:
    while case == 7:
        time.sleep(0.1)


def go(tmp_path: Path, made: Part, count: int = 20, jobs: int = 1) -> Any:
    return run_part(made, count, State(tmp_path / "state.json"), jobs, Display())


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_case_is_done_once_in_a_folder_of_its_own(jobs: int, tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def note(case: int, folder: Path) -> None:
        holds(case, folder)
        with seen.open("a") as file:
            file.write(f"{case}\n")

    progress = go(tmp_path, part(note), jobs=jobs)
    assert sorted(map(int, seen.read_text().split())) == list(range(20))
    assert (progress.done, progress.failures) == (20, [])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (fails_at_seven, "case 7 is broken"),
        (dies_at_seven, "case 7: the process died with -9"),
        (raises_at_seven, "case 7: ValueError at test_soak.py"),
        (hangs_at_seven, "case 7: not done after 1 s"),
    ],
)
@pytest.mark.parametrize("jobs", [1, 3])
def test_one_broken_case_is_told_and_the_others_are_done(
    run: workers.Run, words: str, jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = part(run, limit=1.0)
    progress = go(tmp_path, made, jobs=jobs)
    (failure,) = progress.failures
    assert (progress.done, failure.case) == (20, 7)
    assert words in failure.failure
    assert words in capsys.readouterr().out
    assert not made.holds(progress)
    # Where a share is asked for, that many may break; but a case that could not be done is never passed over.
    assert replace(made, share=0.9).holds(progress) is (run is not raises_at_seven)
    assert not replace(made, share=0.96).holds(progress)


def test_stopped_it_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Display):
        def show(self, text: str, final: bool = False) -> None:
            if " 12/20 " in text:
                raise KeyboardInterrupt

    state = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        run_part(part(fails_at_seven), 20, State(state), 1, Stopped())
    assert json.loads(state.read_text())["made"]["done"] == 12

    def only_the_rest(case: int, folder: Path) -> str | None:
        return None if case >= 12 else f"{case} again"

    progress = go(tmp_path, part(only_the_rest))
    assert "goes on behind 12 cases" in capsys.readouterr().out
    assert [outcome.case for outcome in progress.failures] == [7]
    assert progress.done == 20


def test_results_of_another_source_are_not_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path, part(holds))
    monkeypatch.setattr(soak, "source_of", lambda folders: "changed")
    assert go(tmp_path, part(fails_at_seven)).failures
    assert "its 20 cases start anew" in capsys.readouterr().out


def test_the_results_say_what_was_done_and_the_exit_code_whether_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"good": part(holds, name="good"), "bad": part(fails_at_seven, name="bad")}
    monkeypatch.setattr(soak, "parts", lambda: known)
    places = ["--state", str(tmp_path / "state.json"), "--results", str(tmp_path / "results")]
    assert soak.main(["--only", "good", "--count", "5", *places]) == 0
    assert soak.main(["--only", "bad", *places]) == 1
    assert re.search(r"bad +20 +1 .*BROKEN +a promise", capsys.readouterr().out)
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())
    assert found.keys() == {"python", "torch", "transformers", "peft", "processor", "parts"}
    assert found["parts"]["good"]["cases"] == 5  # what an earlier run of the day found stays
    assert found["parts"]["bad"]["failures"] == ["case 7 is broken"]
    assert json.loads((tmp_path / "state.json").read_text()) == {}
    assert soak.main(["--case", "7", *places]) == 1
    assert soak.main(["--only", "good", "--case", "7", *places]) == 0


def test_every_part_says_what_it_tests() -> None:
    found = parts()
    assert {"planted", "mutants"} <= found.keys()
    for name, made in found.items():
        assert 0 < made.count <= made.long, name
        assert made.what, name


# --- test strength --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(planted.COUNT))
def test_every_bug_can_be_planted_and_its_tests_exist(case: int) -> None:
    bug = planted.BUGS[case]
    planted.planted(case)
    assert bug.old != bug.new
    assert all((trial.ROOT / "tests" / name).is_file() for name in bug.tests)


def test_every_bug_has_a_name_of_its_own() -> None:
    assert len({bug.name for bug in planted.BUGS}) == len(planted.BUGS) >= 40


def test_a_bug_whose_place_has_gone_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planted, "BUGS", (planted.BUGS[0]._replace(old="no such line"),))
    assert "is stale: 'no such line' stands 0 times" in str(planted.run(0, tmp_path))


FILE = "src/lorafit/training/optim.py"
TESTS = ["tests/training/test_optim.py"]


@pytest.fixture
def optim() -> str:
    return (trial.ROOT / FILE).read_text()


def test_the_suite_is_run_against_the_copy(optim: str, tmp_path: Path) -> None:
    changes = ("(1 + step)", "(step + 2)", "exec('while 1: 1')")
    harmless, bug, hang = (optim.replace("(step + 1)", change) for change in changes)
    assert len({optim, harmless, bug, hang}) == 4
    for name, text, seconds, found in (("a", harmless, 60, False), ("b", bug, 60, True), ("c", hang, 2, True)):
        (tmp_path / name).mkdir()
        assert trial.suite_fails(tmp_path / name, TESTS, {FILE: text}, seconds) is found, name


def test_tests_that_cannot_be_run_find_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pytest could not run"):
        trial.suite_fails(tmp_path, ["tests/no_such_file.py"], {})


@pytest.fixture
def cosmic_ray() -> None:
    pytest.importorskip("cosmic_ray", reason="mutants need the 'soak' extra")


@pytest.mark.usefixtures("cosmic_ray")
def test_mutants_are_drawn_evenly_and_each_is_another() -> None:
    made = [mutants.drawn(case) for case in range(2 * len(mutants.TESTS))]
    assert len({(mutant.file, mutant.text) for mutant in made}) == len(made)
    assert [mutant.file for mutant in made] == list(mutants.TESTS) * 2
    for mutant in made:
        compile(mutant.text, mutant.file, "exec")
        assert mutant.old != mutant.new
    mutants._draw.cache_clear()
    assert [mutants.drawn(case) for case in range(len(made))] == made


@pytest.mark.usefixtures("cosmic_ray")
def test_annotations_and_error_texts_are_left_alone() -> None:
    source = 'def f(x: int | None) -> int | None:\n    if x > 1:\n        raise ValueError(f"{x + 1}")\n    return x\n'
    assert {site.start[0] for site in mutants._sites(source, "")} == {2}


def test_what_is_explained_still_stands_there() -> None:
    for file in mutants.TESTS:
        for text in mutants.explained(file):
            compile(text, file, "exec")
    assert {entry.file for entry in mutants.EXPLAINED} <= mutants.TESTS.keys()
    assert all(entry.why for entry in mutants.EXPLAINED)
