"""A folder appears whole, or not at all; a line is appended in one piece."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorafit.errors import DataError, DiskError
from lorafit.files import (
    MANIFEST,
    SYSTEM,
    append_line,
    damaged,
    need_space,
    new_folder,
    read_manifest,
    remove_folder,
    sweep,
    write_json,
    write_tensors,
    write_text,
)


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


def test_text_and_json_are_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "é\n")
    assert (tmp_path / "deep" / "file").read_bytes() == "é\n".encode()
    write_json(tmp_path / "deep" / "file", {"b": 1, "a": ["é"]})
    text = (tmp_path / "deep" / "file").read_text()
    assert json.loads(text) == {"a": ["é"], "b": 1}
    assert "é" in text  # as a person reads it
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


def test_a_line_is_as_a_person_reads_it(tmp_path: Path) -> None:
    append_line(tmp_path / "log", {"row": "é"})
    assert (tmp_path / "log").read_text() == '{"row": "é"}\n'


def test_a_line_that_did_not_fit_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(tmp_path / "log.jsonl", {"step": 0})
    write, calls = os.write, [0]

    def nearly_full(handle: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, bytes(data)[:5])

    monkeypatch.setattr(SYSTEM, "write", nearly_full)
    with pytest.raises(DiskError, match="No space left"):
        append_line(tmp_path / "log.jsonl", {"step": 1})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n'


def test_what_is_no_number_in_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "log.jsonl", {"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", float("inf"))
    assert not list(tmp_path.iterdir())


# --- what is whole, and who may write -----------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "run", about={"torch": "2.13"}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("aaaa")
        (folder / "b").write_text("bbbb")
    return tmp_path / "run"


def test_the_manifest_names_every_file_and_what_it_is_told(sealed: Path) -> None:
    manifest = read_manifest(sealed)
    assert manifest is not None
    assert manifest["torch"] == "2.13"
    assert manifest["files"].keys() == {"sub/a", "b"}
    assert manifest["files"]["b"]["size"] == 4
    assert damaged(sealed) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (f / "b").unlink(), "b is missing"),
        (lambda f: (f / "b").write_text(""), "b has 0 bytes instead of 4"),
        (lambda f: (f / "sub" / "a").write_text("aaab"), "sub/a is not what was written (its sha256 differs)"),
        (lambda f: (f / MANIFEST).write_text("{}"), f"{MANIFEST} is damaged"),
        (lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:-1]), f"{MANIFEST} is damaged"),
        (lambda f: flip_version(f / MANIFEST), f"{MANIFEST} is damaged"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(change: Callable[[Path], object], sentence: str, sealed: Path) -> None:
    change(sealed)
    assert damaged(sealed) == [sentence]


def flip_version(file: Path) -> None:
    file.write_text(file.read_text().replace("2.13", "2.12"))


def test_only_the_files_asked_for_are_looked_at(sealed: Path) -> None:
    (sealed / "b").write_text("edited")
    assert damaged(sealed, ["sub/a"]) == []
    assert damaged(sealed, ["c"]) == ["c is not in manifest.json"]
    (sealed / MANIFEST).unlink()
    assert damaged(sealed) == []


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "run") as folder:
            (folder / "sub").mkdir(mode=0o700)
            os.close(os.open(folder / "file", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run", *(tmp_path / "run").iterdir())}
    assert modes == {"run": 0o750, "sub": 0o750, "file": 0o640, MANIFEST: 0o640}


def test_tensors_and_what_is_said_about_them_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    written = set()
    for number in range(20):
        about = {f"key {k}": "value" for k in (range(9) if number % 2 else reversed(range(9)))}
        write_tensors(tmp_path / "t", tensors, about)
        written.add((tmp_path / "t").read_bytes())
    assert len(written) == 1
    read = safetensors.torch.load_file(tmp_path / "t")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "t", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"} | {f"key {k}": "value" for k in range(9)}


@pytest.mark.parametrize("again", [False, True])
def test_all_of_it_is_forced_to_disk_before_it_gets_its_name_and_the_name_after(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int | str] = []

    def synced(handle: int) -> None:
        calls.append(os.fstat(handle).st_ino)

    def moved(name: str, move: Callable[..., None]) -> Callable[..., None]:
        def call(a: Path, b: Path) -> None:
            calls.append(name)
            move(a, b)

        return call

    if again:
        with new_folder(tmp_path / "run"):
            pass
    monkeypatch.setattr(SYSTEM, "fsync", synced)
    for name in ("rename", "exchange"):
        monkeypatch.setattr(SYSTEM, name, moved(name, getattr(SYSTEM, name)))
    with new_folder(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
    written = {path.stat().st_ino for path in (tmp_path / "run", *(tmp_path / "run").rglob("*"))}
    at = calls.index("exchange" if again else "rename")
    assert written <= set(calls[:at])
    assert tmp_path.stat().st_ino in calls[at:]
    calls.clear()
    write_text(tmp_path / "file", "text")
    assert calls == [(tmp_path / "file").stat().st_ino, "rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("length", range(8))
def test_the_values_of_a_tensor_file_begin_at_a_multiple_of_8_bytes(length: int, tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"a": torch.ones(3)}, {"key": "v" * length})
    assert int.from_bytes((tmp_path / "t").read_bytes()[:8], "little") % 8 == 0


def test_a_folder_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: Path) -> None:
    def refused(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(SYSTEM, "unlink", refused)
    with pytest.raises(DiskError, match="run: cannot be removed: Input/output error"):
        remove_folder(sealed)
    assert not sealed.exists()
    monkeypatch.undo()
    with new_folder(tmp_path / "other"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["other"]  # and the next to write there has swept


def test_nobody_sweeps_away_what_another_is_writing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as first:
        with new_folder(tmp_path / "b"):
            pass
        (first / "file").write_text("x")
    assert tree(tmp_path) == {"a": "/", "a/file": "x", "b": "/"}


def test_room_is_asked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "there", 1)
    with pytest.raises(DiskError, match=r"there: [\d,]+ MiB are needed and [\d,]+ MiB are free"):
        need_space(tmp_path / "not" / "there", 2**62)


def test_what_was_left_behind_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.lorafit-tmp-12").write_text("half")
    (tmp_path / ".adapter.lorafit-tmp-12").mkdir()
    (tmp_path / ".adapter.lorafit-tmp-12" / "half").write_text("half")
    (tmp_path / ".config.yaml.tmp-12").write_text("another program's")
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".config.yaml.tmp-12"]
