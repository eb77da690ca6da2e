"""A folder appears whole, or not at all; a line is appended in one piece."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.errors import DataError, DiskError
from lorafit.files import MANIFEST, SYSTEM, append_line, new_folder, write_json, write_text


def tree(folder: Path) -> dict[str, str]:
    """Everything in `folder` but the manifests."""
    paths = [p for p in folder.rglob("*") if p.name != MANIFEST]
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "/" for p in paths}


def test_a_new_folder_with_its_parents(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {"a": "/", "a/b": "/", "a/b/sub": "/", "a/b/sub/file": "x"}


def test_an_old_folder_is_exchanged_whole(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for content in ("old", "new"):
        with new_folder(target) as folder:
            (folder / content).write_text(content)
            assert tree(target) == ({} if content == "old" else {"old": "old"})
    assert tree(tmp_path) == {"run": "/", "run/new": "new"}


def half_way(folder: Path, error: type[BaseException]) -> None:
    (folder / "half").write_text("half")
    raise error("stop")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, DataError])
def test_an_error_inside_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(error), new_folder(tmp_path / "run") as folder:
        half_way(folder, error)
    assert tree(tmp_path) == before


def test_killed_in_the_middle_the_old_folder_is_there_and_the_next_run_succeeds(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    program = (
        "import os, sys; from lorafit.files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False).returncode == -9
    assert tree(tmp_path / "run") == {"old": "old"}
    with new_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path / "run") == {"new": "new"}


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    before = tree(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SYSTEM, "fsync", full)
    with (
        pytest.raises(DiskError, match=r"run: cannot be written: No space left on device$"),
        new_folder(tmp_path / "run") as folder,
    ):
        (folder / "new").write_text("new")
    with pytest.raises(DiskError, match="No space left"):
        write_text(tmp_path / "run" / "old", "new")
    assert tree(tmp_path) == before


def test_where_folders_cannot_be_exchanged_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    monkeypatch.setattr("lorafit.files.ctypes.CDLL", lambda *given, **options: object())
    with pytest.raises(DiskError, match="cannot replace a folder in one step"), new_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path) == {"run": "/", "run/old": "old"}


def test_only_what_may_be_replaced_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with new_folder(target, replaces=()) as folder:  # an empty folder always may
        (folder / "model.safetensors").write_text("1")
    with new_folder(target, replaces=("*.safetensors",)) as folder:
        (folder / "model.safetensors").write_text("2")
    (target / "notes.txt").write_text("mine")
    with (
        pytest.raises(DiskError, match=r"holds other files \(notes\.txt\)"),
        new_folder(target, replaces=("*.safetensors",)),
    ):
        pytest.fail("the block must not run")
    assert tree(target) == {"model.safetensors": "2", "notes.txt": "mine"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="is a file: choose another folder"), new_folder(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(DiskError, match="cannot be written"), new_folder(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"file": "x"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "run").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "run"]
    assert tree(tmp_path / "disk") == {"new": "new"}


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with new_folder(tmp_path / "run") as folder:
            (folder / "file").write_text("x")
            (folder / "file").chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "run" / "file").stat().st_mode & 0o777 == 0o640


def test_text_and_json_are_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "é\n")
    assert (tmp_path / "deep" / "file").read_bytes() == "é\n".encode()
    write_json(tmp_path / "deep" / "file", {"b": 1, "a": ["é"]})
    text = (tmp_path / "deep" / "file").read_text()
    assert json.loads(text) == {"a": ["é"], "b": 1}
    assert text.index('"a"') < text.index('"b"')
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]
    with pytest.raises(DiskError, match="cannot be written"):
        write_text(tmp_path / "deep", "a folder is in the way")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_lines_are_appended(tmp_path: Path) -> None:
    for number in range(3):
        append_line(tmp_path / "log.jsonl", {"step": number, "text": "zwei\nZeilen é"})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    with pytest.raises(DiskError, match="cannot be written"):
        append_line(tmp_path / "nowhere" / "log.jsonl", {})
