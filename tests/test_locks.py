"""A folder is held by one process at a time, and never by one that is gone."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from lorafit.errors import BusyError
from lorafit.files import new_folder
from lorafit.locks import LOCK, lock


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner["pid"] == os.getpid()
        with pytest.raises(BusyError, match=rf"run is in use by process {os.getpid()} on this machine"):
            lock(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()  # it held nothing but the lock
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        pass
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["", "{half", '{"pid": 1, "host": "here", "boot": "another start"}'])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "here")
    (tmp_path / LOCK).write_text(left)
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"pid": 7, "host": "elsewhere", "boot": "another"}')
    with pytest.raises(BusyError, match=r"in use by process 7 on elsewhere \(if that run is gone, remove .*lock\)"):
        lock(tmp_path).__enter__()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(("pid", "held"), [(1, True), (2**30, False)])
def test_on_a_disk_without_locks_the_name_decides(
    pid: int, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unknown)
    with new_folder(tmp_path / "other"):
        pass
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / LOCK).write_text(json.dumps({"pid": pid, "host": "here", "boot": boot}))
    with pytest.raises(BusyError, match="in use by process 1") if held else nullcontext(), lock(tmp_path):
        pass


def test_of_many_that_want_a_folder_one_gets_it(tmp_path: Path) -> None:
    """Twenty races of four processes that begin together, each after a holder that was killed."""
    program = (
        "import sys; from pathlib import Path\n"
        "from lorafit.locks import lock; from lorafit.errors import BusyError\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        with lock(Path(line.strip())): print('got', flush=True); sys.stdin.readline()\n"
        "    except BusyError: print('busy', flush=True); sys.stdin.readline()\n"
        "    print('out', flush=True)\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]

    def all_told(line: str) -> list[str]:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{line}\n")
            racer.stdin.flush()
        return [racer.stdout.readline().strip() for racer in racers]  # type: ignore[union-attr]

    try:
        assert [racer.stdout.readline().strip() for racer in racers] == ["ready"] * 4  # type: ignore[union-attr]
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / LOCK).write_text("left behind")
            assert sorted(all_told(str(folder))) == ["busy", "busy", "busy", "got"]
            assert all_told("on") == ["out"] * 4
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
