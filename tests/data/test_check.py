"""A file without a model: what is right is read and summed up, and what is no file is refused without waiting."""

import csv
import gzip
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafit.data.check import check_rows
from lorafit.data.rows import find_rows
from lorafit.errors import DataError

ROWS = [{"instruction": f"Name {k}", "input": "é", "output": f"It is {k}, yes."} for k in range(5)]
USER, ANSWER = {"role": "user", "content": "Name"}, {"role": "assistant", "content": "é"}


def lines(rows: object) -> str:
    return "\n".join(map(json.dumps, rows))  # type: ignore[call-overload]


def refusal(data: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        check_rows(data)
    return str(caught.value)


def test_a_file_that_is_right_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*ROWS, {"instruction": "Say", "output": " ", "id": 3}, {"instruction": "a" * 50, "output": "b", "id": 4}]
    path.write_text(lines(rows))
    seen: list[tuple[int, int]] = []
    found = check_rows(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 7) for k in range(1, 8)]
    assert (found.rows, found.form, found.turns) == (7, "instruction", {"user": 7, "assistant": 7})
    assert found.columns == {"instruction": 7, "input": 5, "output": 7, "id": 2}
    assert (found.characters, found.longest, found.unanswered) == (5 * 21 + 3 + 51, (51, f"{path}:7"), (f"{path}:6",))
    assert str(found).splitlines() == [
        f"{path}: 7 rows, nothing wrong with them",
        "columns: instruction, output, input (in 5 rows); not used: id",
        "messages: 7 user, 7 assistant",
        f"characters: 159, 51 of them in the longest row ({path}:7)",
        "without an answer, to be dropped: 1 rows (lines 6)",
    ]


def test_text_and_greetings_are_summed_up_too() -> None:
    assert str(check_rows([{"text": "abc"}])).splitlines()[1:] == [
        "columns: text",
        "characters: 3, 3 of them in the longest row (data:1)",
    ]
    greeting = {"messages": [ANSWER, USER, {**ANSWER, "content": ""}]}
    assert check_rows([greeting]).unanswered == ("data:1",)
    assert check_rows([{"text": ""}]).unanswered == ("data:1",)


def test_checking_needs_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    heavy = "torch", "transformers", "numpy", "datasets", "pyarrow"
    program = "import sys; from lorafit.data.check import check_rows; print(check_rows(sys.argv[1]).rows, "
    program += f"[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.jsonl"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("5 []\n", "")


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=3, max_size=3)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_csv_is_what_pythons_csv_writes(tmp_path: Path, quoting: int, rows: list[list[str]]) -> None:
    header = ["text", "a", "b"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([header, *rows])  # type: ignore[arg-type]
    found = [(source.rpartition(":")[2], row) for source, row in find_rows(tmp_path / "a.csv")]
    breaks = [sum(cell.count("\n") for row in rows[:k] for cell in row) for k in range(len(rows))]
    if all(row != header and row[0][:1] != "\ufeff" for row in rows):
        assert [row for _, row in found] == [dict(zip(header, row, strict=True)) for row in rows]
        assert [line for line, _ in found] == [str(2 + k + before) for k, before in enumerate(breaks)]


def test_objects_in_parquet_have_no_keys_of_their_neighbours(tmp_path: Path) -> None:
    calls = [{"role": "assistant", "tool_calls": [{"name": name, "arguments": {name: 1}}]} for name in ("f", "g")]
    rows = [{"messages": [USER, call], "id": None} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in find_rows(tmp_path / "a.parquet")] == rows


def test_odd_but_right_files_are_read(tmp_path: Path) -> None:
    def first(name: str, raw: bytes) -> str:
        (tmp_path / name).write_bytes(raw)
        return str(next(iter(find_rows(tmp_path / name)))[1]["text"])

    assert first("a.csv", b'text\r\n"a ""b""\r\n,\xef\xbb\xbf"\r\n\r\n') == 'a "b"\r\n,\ufeff'
    assert first("a.csv", b"text,id\na b,") == "a b"
    assert first("a.tsv", b'text\tid\na, b\t"\t"\n') == "a, b"
    assert first("a.json", b' [ {"text" : "[]"}\n ,\r\n{"text":"b"} ] \n') == "[]"
    assert first("a.jsonl", b'{"text": "\\ud83d\\ude00 \\u0000", "id": 18446744073709551616, "x": 1.5e300}') == "😀 \0"
    assert first("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}')) == "a"


# --- what is no file at all ------------------------------------------------------------------------------


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.jsonl", "pipe"):
        os.mkfifo(tmp_path / name)
        assert ": this is a pipe or a device, not a file: " in refusal(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.csv"))
        assert ": this is a pipe or a device, not a file: " in refusal(tmp_path / "socket.csv")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for endless in (Path("/dev/zero"), Path("/dev/stdin"), tmp_path / "zero.jsonl"):
        assert ": this is a pipe or a device, not a file: " in refusal(endless)
    (tmp_path / "folder.jsonl").mkdir()
    assert ": this is a folder, not a file: " in refusal(tmp_path / "folder.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert ": no such file" in refusal(tmp_path / "loop.jsonl")
    (tmp_path / "empty.gz").write_bytes(b"")
    assert ": unknown kind of file" in refusal(tmp_path / "empty.gz")


def test_names_that_cannot_be_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    for name in ("x" * 10_000, "a\0b", '{"text": "a"}\n{"text": "b"}', "a" * 300 + ".jsonl"):
        (said,) = refusal(name).splitlines()
        assert re.search("neither a file here nor a dataset|no such file", said)
        assert len(said) < 500


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(2**43)  # a hole: nothing is written
    assert ": 8,796,093,022,208 bytes are too many for " in refusal(path)
