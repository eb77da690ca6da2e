"""Malformed data of every kind, in every format, in the first, a middle and the last row: one line says where and what.

The tables say what is done to a file and what must be said about it; the tests write the files.
"""

import gzip
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

import soak.rows
from lorafit.data import formats
from lorafit.data.check import check_rows
from lorafit.data.read import read_examples
from lorafit.data.rows import find_rows
from lorafit.errors import DataError

ALPACA = [{"instruction": f"Name {k}", "input": "é", "output": f"It is {k}, yes."} for k in range(5)]
SHAREGPT = [{"conversations": [{"from": "human", "value": f"{k}?"}, {"from": "gpt", "value": "é"}]} for k in range(5)]
CHAT = [
    {"messages": [{"role": "user", "content": f"Name {k}"}, {"role": "assistant", "content": "é"}]} for k in range(5)
]
FORMATS = {"jsonl": "a.jsonl", "json": "a.json", "csv": "a.csv", "parquet": "a.parquet", "gz": "a.jsonl.gz"}
POSITIONS = {"first": 0, "middle": 2, "last": 4}
JSON = ("jsonl", "json", "gz")  # formats in which a value can be anything
NESTED = (*JSON, "csv")  # … and in which a list of messages is JSON
ANY = (*NESTED, "parquet")


@cache
def tokenizer_of(make: Callable[[], Any]) -> Any:
    return make()


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> Any:
    return tokenizer_of(byte_tokenizer)


# --- files ----------------------------------------------------------------------------------------------


def encoded(row: Any, kind: str) -> bytes:
    """One row as it stands in a text file, without the line end."""
    if kind != "csv":
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"\xed\xa0\xbd", b"\\ud83d")
    cells = ["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in row.values()]
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells).encode()


def text_file(rows: list[bytes], kind: str, columns: Any) -> bytes:
    """The bytes of a file in which row number k begins on the line that `line_of` says."""
    if kind == "json":
        return b"[\n" + b",\n".join(rows) + b"\n]\n"
    head = [",".join(columns).encode()] if kind == "csv" else []
    raw = b"".join(row + b"\n" for row in [*head, *rows])
    return gzip.compress(raw) if kind == "gz" else raw


def line_of(kind: str, number: int) -> int:
    return number + (2 if kind in ("json", "csv") else 1)


def parquet_file(rows: Any, path: Path, **options: Any) -> None:
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, **options)


def refusal(path: Path, tokenizer: Any) -> str:
    """What is said about the file: the same with and without a tokenizer."""
    with pytest.raises(DataError) as checked:
        check_rows(path)
    with pytest.raises(DataError) as read:
        read_examples(path, tokenizer)
    assert str(read.value) == str(checked.value)
    return str(read.value)


# --- rows that say the wrong thing -----------------------------------------------------------------------


class Wrong(NamedTuple):
    """`change` makes a row wrong, and `says` (a regular expression) must be said about it in each of `formats`."""

    rows: list[Any]
    change: Callable[[Any], Any]
    says: str
    formats: tuple[str, ...] = JSON


def having(**columns: Any) -> Callable[[Any], Any]:
    return lambda row: {**row, **columns}


def said(*messages: Any) -> Callable[[Any], Any]:
    return lambda row: {**row, next(iter(row)): list(messages)}


USER, ANSWER = CHAT[0]["messages"]
DEEP = '{"a": ' * 100_000
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def calling(**function: Any) -> Callable[[Any], Any]:
    return said(USER, {**CALL, "tool_calls": [{"function": {"name": "f", **function}}]})


ROWS = {
    # a row and its columns
    "a list for a row": Wrong(ALPACA, lambda row: list(row.values()), "a row must be an object .* not list"),
    "a text for a row": Wrong(ALPACA, lambda row: "hello", "a row must be an object .* not str"),
    "a number for a row": Wrong(ALPACA, lambda row: 7, "a row must be an object .* not int"),
    "null for a row": Wrong(ALPACA, lambda row: None, "a row must be an object .* not NoneType"),
    "no columns": Wrong(ALPACA, lambda row: {}, "no column 'instruction': the row has none"),
    "a column missing": Wrong(ALPACA, lambda row: {"instruction": "a"}, "no column 'output': the row has instruction$"),
    "a column misspelt": Wrong(
        ALPACA, lambda row: {"instruction": "a", "ouput": "b"}, r"no column 'output' \(did you mean 'ouput'\?\)"
    ),
    "an optional column misspelt": Wrong(
        ALPACA, lambda row: {"instruction": "a", "output": "b", "imput": "c"}, r"'imput' \(did you mean 'input'\?\)"
    ),
    "a row of another form": Wrong(ALPACA, lambda row: {"text": "a"}, "no column 'instruction': the row has text"),
    "a row of no form": Wrong(ALPACA, lambda row: {"q\nuestion": "a"}, "no column 'instruction': .* q\ufffduestion$"),
    "a column with a very long name": Wrong(ALPACA, lambda row: {"x" * 10**6: "a"}, r"the row has x{57}\.\.\.$"),
    "null for text": Wrong(ALPACA, having(output=None), "column 'output' must hold text, not null", (*JSON, "parquet")),
    "a number for text": Wrong(ALPACA, having(output=42), r"column 'output' must hold text, not 42 \(int\)"),
    "a truth value for text": Wrong(ALPACA, having(output=True), r"'output' must hold text, not True \(bool\)"),
    "a list for text": Wrong(ALPACA, having(instruction=["a"]), r"must hold text, not \['a'\] \(list\)"),
    "an object for text": Wrong(
        ALPACA, having(input={"a": 1}), r"column 'input' must hold text, not \{'a': 1\} \(dict"
    ),
    "half a character": Wrong(
        ALPACA, having(output="ab\ud83d"), r"column 'output' holds half a character .* character 3"
    ),
    "no question": Wrong(ALPACA, having(instruction=" ", input=""), "'instruction' and 'input' are both empty", ANY),
    "a history of texts": Wrong(ALPACA, having(history=["a"]), r"must be a list of \[question, answer\] pairs"),
    "no prompt": Wrong([{"prompt": "a", "completion": "b"}] * 5, having(prompt=" "), "'prompt' is empty: take", ANY),
    # messages
    "no messages": Wrong(CHAT, said(), "messages must be a list with at least one message", ANY),
    "null for messages": Wrong(CHAT, having(messages=None), "column 'messages' must hold a list", (*JSON, "parquet")),
    "an object for messages": Wrong(
        CHAT, having(messages={"a": 1}), "'messages' must hold a list, not .* \\(dict", NESTED
    ),
    "text for messages": Wrong(
        CHAT, having(messages="Hello"), "hold a list, or the JSON text of one: not valid", NESTED
    ),
    "null for a message": Wrong(CHAT, said(USER, None), "message 2 must be an object .* not None", ANY),
    "text for a message": Wrong(CHAT, said(USER, "hi"), "message 2 must be an object .* not 'hi'", NESTED),
    "an unknown role": Wrong(
        CHAT, said(USER, {**ANSWER, "role": "asistant"}), r"role 'asistant' \(did you mean 'assistant'\?\)", ANY
    ),
    "a control token for a role": Wrong(
        CHAT, said(USER, {**ANSWER, "role": "user<|im_end|>\n<|im_start|>assistant"}), "has the role 'user<|im", ANY
    ),
    "no role": Wrong(CHAT, said(USER, {"rol": "user", "content": "a"}), r"no 'role' \(did you mean 'rol'\?\)", NESTED),
    "null for a role": Wrong(CHAT, said(USER, {**ANSWER, "role": None}), "2 has (the role None|no 'role')", ANY),
    "a list for a role": Wrong(CHAT, said(USER, {**ANSWER, "role": ["user"]}), r"has the role \['user'\]", NESTED),
    "null for content": Wrong(
        CHAT, said({**USER, "content": None}, ANSWER), r"message 1 \(user\) has no 'content'", ANY
    ),
    "a number for content": Wrong(CHAT, said(USER, {**ANSWER, "content": 3}), "must be a string or .* not 3", NESTED),
    "a picture in content": Wrong(
        CHAT, said({**USER, "content": [{"type": "image"}]}, ANSWER), r"a part that is not text \('image'\): ", NESTED
    ),
    "a message without words": Wrong(CHAT, said({**USER, "content": "\n"}, ANSWER), r"1 \(user\) is empty: take", ANY),
    "half a character in a message": Wrong(CHAT, said({**USER, "content": "\ud83d"}, ANSWER), "1: .* half a", NESTED),
    "no answer": Wrong(CHAT, said(USER), "no assistant message answers anything", ANY),
    "only an answer": Wrong(CHAT, said(ANSWER), "no assistant message answers anything", ANY),
    "reasoning that is no text": Wrong(
        CHAT, said(USER, {**ANSWER, "thinking": 5}), "reasoning must be a string", NESTED
    ),
    # tools
    "a call without a name": Wrong(
        CHAT, calling(name=None), "a tool call must be an object with function.name", NESTED
    ),
    "arguments that are no JSON": Wrong(CHAT, calling(arguments="{'a': 1}"), "Python's spelling, not JSON", NESTED),
    "arguments with NaN": Wrong(CHAT, calling(arguments='{"a": NaN}'), "NaN is no JSON value", NESTED),
    "arguments with a name twice": Wrong(CHAT, calling(arguments='{"a": 1, "a": 2}'), "'a' stands twice", NESTED),
    "arguments in a list": Wrong(CHAT, calling(arguments="[1]"), "the call of 'f' must be a JSON object", NESTED),
    "half a character in arguments": Wrong(CHAT, calling(arguments='{"a": "\\ud83d"}'), "call holds half a", NESTED),
    "a call in the old way": Wrong(CHAT, said(USER, {**ANSWER, "function_call": {}}), "mean 'tool_calls'", NESTED),
    "calls under a wrong key": Wrong(CHAT, said(USER, {**ANSWER, "tool_call": []}), "mean 'tool_calls'", NESTED),
    "calls of a user": Wrong(CHAT, said({**CALL, "role": "user"}, ANSWER), "tool_calls must be .* assistant", NESTED),
    "tools that are no list": Wrong(CHAT, having(tools=3), r"column 'tools' must hold a list, not 3 \(int\)"),
    "a tool without a name": Wrong(CHAT, having(tools=[{}]), "a tool must be an object with function.name, not {}"),
    # ShareGPT
    "an unknown speaker": Wrong(
        SHAREGPT, said({"from": "humn", "value": "a"}), r"message 1 is from 'humn' \(did you mean 'human'\?\)", ANY
    ),
    "a speaker without words": Wrong(
        SHAREGPT, said({"from": "human", "valu": "a"}), "no text in 'value' .*'valu'", NESTED
    ),
    "a call that is no JSON": Wrong(
        SHAREGPT,
        said({"from": "function_call", "value": "f()"}),
        r"\(from 'function_call'\) must hold a JSON object",
        ANY,
    ),
}
ROW_CASES = [(name, kind) for name, wrong in ROWS.items() for kind in wrong.formats]


@pytest.mark.parametrize(("name", "kind"), ROW_CASES)
def test_a_row_that_says_the_wrong_thing_is_named(name: str, kind: str, tmp_path: Path, tokenizer: Any) -> None:
    wrong, path = ROWS[name], tmp_path / FORMATS[kind]
    for number in POSITIONS.values():
        rows = [wrong.change(row) if k == number else row for k, row in enumerate(wrong.rows)]
        if kind == "parquet":
            parquet_file(rows, path)
        else:
            path.write_bytes(text_file([encoded(row, kind) for row in rows], kind, wrong.rows[0]))
        said = refusal(path, tokenizer)
        assert said.startswith(f"{path}:{line_of(kind, number)}: "), said
        assert re.search(wrong.says, said), said
        assert len(said.splitlines()) == 1
        assert len(said) < len(str(path)) + 250


# --- rows that are written wrongly -----------------------------------------------------------------------


class Broken(NamedTuple):
    """`change` breaks the bytes of a row; `says` must be said, about the column where what was `put` there begins."""

    change: Callable[[bytes], bytes]
    at: bytes | None
    says: str
    formats: tuple[str, ...] = JSON


def put(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda row: row.replace(old, new, 1)


LINED = ("jsonl", "gz")
VALUE = b'"\xc3\xa9"'
BROKEN = {
    # JSON
    "a row cut off in a text": Broken(lambda row: row[:-9], b'"It is', r"\(Unterminated string .* cut off\?", LINED),
    "a row cut off behind a name": Broken(lambda row: row[: row.index(b'"It')], None, r"\(Expecting value\): ", LINED),
    "a comma too many": Broken(put(b'yes."}', b'yes.",}'), None, "not valid JSON .* comma"),
    "a comma missing": Broken(
        put(b'", "output"', b'" "output"'), b'"output"', r"\(Expecting ',' .* a comma is missing"
    ),
    "a colon missing": Broken(put(b'"output":', b'"output"'), b'"It is', r"\(Expecting ':' delimiter\): put a colon"),
    "no value": Broken(put(VALUE, b""), b', "output"', r"\(Expecting value\): here belongs an object, .* null$"),
    "NaN": Broken(put(VALUE, b"NaN"), None, r"\(NaN is no JSON value: write null"),
    "Infinity": Broken(put(VALUE, b"-Infinity"), None, r"\(-Infinity is no JSON value: write null"),
    "a number too large": Broken(put(VALUE, b"1e999"), None, r"\(the number 1e999 is too large: write it as text"),
    "a number too long": Broken(put(VALUE, b"7" * 5000), None, r"\(a number of 5000 digits: write it as text"),
    "a name twice": Broken(put(b'"input": ', b'"output": "x", "input": '), None, r"\(the name 'output' stands twice"),
    "Python, not JSON": Broken(lambda row: row.replace(b'"', b"'"), b"'instruction'", r"\): this is Python's spelling"),
    "None, not null": Broken(put(VALUE, b"None"), b"None", r"\(Expecting value\): this is Python's spelling"),
    "a comment": Broken(put(b'"input"', b'/* why */ "input"'), b"/*", r"\): JSON has no comments: remove it"),
    "a commented line": Broken(lambda row: b"// " + row, b"//", r"\): JSON has no comments: remove it"),
    "a tab in a text": Broken(put(b"It is", b"It\tis"), b"\tis", r"\(Invalid control character\): .* a tab as \\t"),
    "an unknown escape": Broken(put(b"It is", b"It\\xis"), b"\\xis", r"\(Invalid \\escape\): write a backslash as"),
    "half an escape": Broken(put(b"It is", b"It\\u12 is"), None, r"\(Invalid \\uXXXX escape\): behind \\u belong four"),
    "a quote in a text": Broken(put(b"It is", b'It "is"'), b'is"', r'\(Expecting .*, or a " in the text before is not'),
    "two rows on a line": Broken(lambda row: row + row, b'{"', r"\(Extra data\): nothing may stand behind", LINED),
    "a comma behind a row": Broken(lambda row: row + b",", b",", r"\(Extra data\): nothing may stand behind", LINED),
    "no comma between rows": Broken(
        lambda row: row + row, b'{"', r"\(Expecting ',' or '\]' after a row\): put", ("json",)
    ),
    "nested too deeply": Broken(put(VALUE, DEEP.encode()), None, "nested too deeply"),
    "garbage": Broken(lambda row: b"lorem ipsum", b"lorem", r"\(Expecting value\): here belongs an object"),
    "a web page": Broken(lambda row: b"  <p>Not found</p>", None, ": .* a web page"),
    "an open bracket": Broken(
        lambda row: b"{", None, r"\(Expecting property name enclosed in double quotes\): ", LINED
    ),
    # bytes
    "a byte 0": Broken(put(b"yes", b"y\0s"), b"\0s", "a byte 0, which no text has: save the file as UTF-8$", NESTED),
    "Latin-1": Broken(put(b"\xc3\xa9", b"\xe9"), b"\xe9", "byte 0xe9 is not UTF-8: save the file as UTF-8$", NESTED),
    "an overlong encoding": Broken(put(b"\xc3\xa9", b"\xc0\x80"), b"\xc0", "byte 0xc0 is not UTF-8", NESTED),
    "half a character": Broken(put(b"\xc3\xa9", b"\xed\xa0\xbd"), b"\xed", "byte 0xed is not UTF-8", NESTED),
    "UTF-16": Broken(lambda row: row.decode().encode("utf-16-le"), None, "byte 0|UTF-16 or UTF-32: save", NESTED),
    "a byte order mark": Broken(
        lambda row: b"\xef\xbb\xbf" * 2 + row, None, "a byte order mark inside the file", NESTED
    ),
    # CSV
    "a field too many": Broken(lambda row: row + b",x", None, "4 fields where the header names 3: put", ("csv",)),
    "a field too few": Broken(put(b"," + VALUE, b""), None, "2 fields where the header names 3: put", ("csv",)),
    "a quote not closed": Broken(lambda row: row[:-1], b'"It is', r"\(text follows|this quoted", ("csv",)),
    "a quote in a quoted field": Broken(put(b"It is", b'It "is"'), b'"It "', r"\(text follows on the clos", ("csv",)),
    "a quote in a bare field": Broken(put(VALUE, b'a"b'), b'"b', r"\(a quote inside a field that is not", ("csv",)),
    "a carriage return": Broken(put(VALUE, b"a\rb"), b"\rb", r"\(a carriage return alone\): save it with", ("csv",)),
    "the header again": Broken(lambda row: b"instruction,input,output", None, "the header stands here again", ("csv",)),
}
BROKEN_CASES = [(name, kind) for name, broken in BROKEN.items() for kind in broken.formats]


@pytest.mark.parametrize(("name", "kind"), BROKEN_CASES)
def test_a_row_that_is_written_wrongly_is_named(name: str, kind: str, tmp_path: Path, tokenizer: Any) -> None:
    broken, path = BROKEN[name], tmp_path / FORMATS[kind]
    for number in POSITIONS.values():
        rows = [encoded(row, kind) for row in ALPACA]
        rows[number] = row = broken.change(rows[number])
        path.write_bytes(text_file(rows, kind, ALPACA[0]))
        said = refusal(path, tokenizer)
        column = r"(:\d+)?" if broken.at is None else f":{len(row[: row.rindex(broken.at)].decode()) + 1}"
        assert re.match(rf"{re.escape(str(path))}:{line_of(kind, number)}{column}: ", said), said
        assert re.search(broken.says, said), said
        assert len(said.splitlines()) == 1
        assert len(said) < len(str(path)) + 250


# --- files that are not what they should be --------------------------------------------------------------

LINES = text_file([encoded(row, "jsonl") for row in ALPACA], "jsonl", ())
LIST = text_file([encoded(row, "json") for row in ALPACA], "json", ())
TABLE = text_file([encoded(row, "csv") for row in ALPACA], "csv", ALPACA[0])
PACKED = gzip.compress(LINES)


@cache
def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), file, write_page_checksum=True, compression="none")
    return file.getvalue()


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


FILES: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty": ("a.jsonl", b"", ": there are no rows in it$"),
    "empty CSV": ("a.csv", b"", ": there are no rows in it$"),
    "an empty list": ("a.json", b"[]", ": there are no rows in it$"),
    "only white space": ("a.jsonl", b" \n\r\n\t\n", ": there are no rows in it$"),
    "only a byte order mark": ("a.json", b"\xef\xbb\xbf", ": there are no rows in it$"),
    "only a header": ("a.csv", b"instruction,output\n", ": there are no rows in it$"),
    "an empty file for gzip": ("a.jsonl.gz", b"", ": there are no rows in it$"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), ":1: this is UTF-16 or UTF-32: save the file as UTF-8$"),
    "UTF-16 without a mark": ("a.csv", TABLE.decode().encode("utf-16-be"), ":1: this is UTF-16 or UTF-32: save"),
    "UTF-32": ("a.json", LIST.decode().encode("utf-32"), ":1: this is UTF-16 or UTF-32: save the file as UTF-8$"),
    # another kind of file
    "a web page": ("a.jsonl", b"<!DOCTYPE html>\n<title>404", ":1: this is a web page or XML, not data: "),
    "a web page as CSV": ("a.csv", b"\n <html>\n", ":1: this is a web page or XML, not data: "),
    "a pointer of Git LFS": ("a.parquet", b"version https://git-lfs.github.com/spec/v1", ":1: .* run git lfs pull$"),
    "a zip archive": ("a.csv", b"PK\3\4" + b"\0" * 99, ":1: this is a zip archive or an Excel sheet: unpack it"),
    "gzip under a bare name": ("a.jsonl", PACKED, ":1: this is compressed with gzip: end its name in .gz$"),
    "a bare file named gz": ("a.jsonl.gz", LINES, ": not compressed with gzip: take .gz off its name$"),
    "Parquet named JSON": ("a.jsonl", parquet_bytes, ":1: this is a Parquet file: end its name in .parquet$"),
    "JSON named Parquet": ("a.parquet", LINES, ": not a Parquet file: name it for what it is"),
    "a list named jsonl": ("a.jsonl", LIST, ":1: this is a list, not one object a line: end its name in .json$"),
    "JSON named CSV": ("a.csv", LINES, ":1: this is JSON, not CSV: end the file's name in .jsonl or .json$"),
    "CSV named JSON": ("a.json", TABLE, ":1: a .json file must hold a list of objects"),
    "semicolons": ("a.csv", b"instruction;output\na;b\n", ":1: the header is separated by ';': save the file with ','"),
    "a CSV named TSV": ("a.tsv", b"instruction,output\na,b\n", ":1: the header is separated by ',': save the file"),
    "no extension": ("rows", LINES, ": unknown kind of file: known are .jsonl, "),
    "Parquet in gzip": ("a.parquet.gz", PACKED, ": unknown kind of file: known are .jsonl, .*, .parquet$"),
    # its shape
    "rows spread over lines": (
        "a.jsonl",
        b"\n".join(json.dumps(row, indent=1).encode() for row in ALPACA),
        ":1: .*over several lines: write",
    ),
    "spread rows named JSON": ("a.json", b'{\n"text":\n"a"}\n{\n"text":\n"b"}', ":1: .* over several lines: write"),
    "one object named JSON": ("a.json", b'{"rows":\n[]}', ":1: a .json file must hold a list of objects"),
    "a list not closed": ("a.json", LIST[:-3], r":6:67: .*Expecting ',' or '\]' after a row\): put a comma"),
    "a list cut off": ("a.json", LIST[:-12], r":6:51: .*Unterminated string"),
    "a comma behind the last row": ("a.json", LIST[:-3] + b",\n]", r":7:1: .*Expecting value\): a value is missing"),
    "two lists": ("a.json", LIST + LIST, r":8:1: .*Extra data after the list\): nothing may"),
    "a column twice": ("a.csv", b"text,text\na,b\n", ":1: column names in the header must be there, and each once"),
    "a column without a name": ("a.csv", b"text,\na,b\n", ":1: column names in the header must be there, and each"),
    # gzip
    "gzip cut off": ("a.jsonl.gz", PACKED[:-20], r": cannot be read \(.*ended before.*\): is it whole\?$"),
    "gzip cut off in its head": ("a.jsonl.gz", PACKED[:5], r": cannot be read \(.*\): is it whole\?$"),
    "gzip with a wrong checksum": ("a.jsonl.gz", flipped(PACKED, -7), r": cannot be read \(CRC check failed.*whole"),
    "gzip with a flipped bit": ("a.jsonl.gz", flipped(PACKED, 40), r": cannot be read \(.*\): is it whole\?$"),
    "gzip with garbage behind it": ("a.jsonl.gz", PACKED + b"garbage", r": cannot be read \(Not a gzipped file"),
    # Parquet
    "Parquet cut off": (
        "a.parquet",
        lambda: parquet_bytes()[:-9],
        r": not a Parquet file that can be read \(.* it again$",
    ),
    "Parquet's first bytes": ("a.parquet", b"PAR1", r": not a Parquet file that can be read \(.*\): is it whole\?"),
    "Parquet with a flipped bit": (
        "a.parquet",
        lambda: flipped(parquet_bytes(), parquet_bytes().index(b"Name 1")),
        r": not a Parquet file that can be read \(.* checksum",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_what_it_should_be_is_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    path, content, says = tmp_path / FILES[name][0], FILES[name][1], FILES[name][2]
    path.write_bytes(content if isinstance(content, bytes) else content())
    (said,) = refusal(path, tokenizer).splitlines()
    assert re.match(re.escape(str(path)) + says, said), said
    assert len(said) < len(str(path)) + 250


@pytest.mark.parametrize("where", POSITIONS)
def test_parquet_text_in_another_encoding_is_named(where: str, tmp_path: Path, tokenizer: Any) -> None:
    number, path = POSITIONS[where], tmp_path / "a.parquet"
    words = [b"a", b"b", b"c", b"d", b"e"]
    words[number] = b"\xe9"
    texts = pyarrow.array(words, pyarrow.binary()).view(pyarrow.string())
    parquet_file(pyarrow.table({"instruction": texts, "output": ["a"] * 5}), path)
    said = f"{path}:{number + 1}: text that is not UTF-8 (byte 0xe9): write it as UTF-8"
    assert refusal(path, tokenizer) == said


def test_parquet_columns_of_a_wrong_type_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    for column, shown in (([1, 2], "1 (int)"), ([b"a", b"b"], "b'a' (bytes)"), ([["a"], []], "['a'] (list)")):
        parquet_file(pyarrow.table({"text": column}), path)
        assert refusal(path, tokenizer).startswith(f"{path}:1: column 'text' must hold text, not {shown}\n{path}:2: ")


def test_parquet_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "UNPACKS_ANYWAY", 2**20)
    path = tmp_path / "a.parquet"
    long = pyarrow.array(["x" * 10**5]).dictionary_encode()
    many = pyarrow.DictionaryArray.from_arrays([0] * 100, long.dictionary)
    for texts in (long, pyarrow.concat_arrays([long] * 2)):  # what is long, but not too long, is read
        parquet_file(pyarrow.table({"text": texts}), path)
        assert len(read_examples(path, tokenizer)) == len(texts)
    for texts in (many, many.dictionary_decode(), pyarrow.nulls(20_000, pyarrow.string()), ["x" * 2**21]):
        parquet_file(pyarrow.table({"text": texts}), path, compression="zstd")
        assert path.stat().st_size < 2**12
        assert refusal(path, tokenizer).startswith(f"{path}: unpacks to more than 1,048,576 bytes")


def test_parquet_with_any_byte_damaged_is_what_it_was_or_refused(tmp_path: Path) -> None:
    """With checksums in its pages, as here; there is none over what the file says about itself."""
    path, rows = tmp_path / "a.parquet", [{"text": f"a {k}"} for k in range(5)]
    parquet_file(rows, path, write_page_checksum=True)
    raw, read = path.read_bytes(), 0
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 4]) + raw[at + 1 :])
        with suppress(DataError):
            assert check_rows(path).rows == len(rows)
            assert [row for _, row in find_rows(path)] == rows
            read += 1
    assert read < len(raw) / 2


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array(["a"])] * 2
    parquet_file(pyarrow.Table.from_arrays(columns, names=["text", "text"]), path)
    assert refusal(path, tokenizer) == f"{path}: the column 'text' stands twice: keep one of the two"


def test_a_gzip_bomb_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "UNPACKS_ANYWAY", 2**16)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}'.ljust(2**16)))
    assert len(read_examples(path, tokenizer)) == 1
    path.write_bytes(gzip.compress(b'{"text": "a"}'.ljust(2**16 + 1)))
    assert refusal(path, tokenizer).startswith(f"{path}: unpacks to more than 65,536 bytes")
    path.write_bytes(gzip.compress(b'{"text": "a"}'.ljust(2**16 + 1), compresslevel=0))
    assert len(read_examples(path, tokenizer)) == 1
    monkeypatch.setattr(formats, "memory", lambda: 2**18)
    assert refusal(path, tokenizer).startswith(f"{path}: unpacks to more than 65,536 bytes")


# --- what is not malformed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [ALPACA, CHAT, SHAREGPT], ids=["alpaca", "messages", "sharegpt"])
def test_the_same_files_unbroken_are_read(rows: list[Any], kind: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / FORMATS[kind]
    if kind == "parquet":
        parquet_file(rows, path)
    else:
        path.write_bytes(text_file([encoded(row, kind) for row in rows], kind, rows[0]))
    examples = read_examples(path, tokenizer)
    assert [example.source for example in examples] == [f"{path}:{line_of(kind, k)}" for k in range(5)]
    assert check_rows(path).rows == 5


# --- damage at random ------------------------------------------------------------------------------------


def test_damaged_files_are_read_around_the_damage_or_refused(tmp_path: Path) -> None:
    """A few of the cases that `python -m soak --only rows` does by the thousand."""
    assert [broken for case in range(150) if (broken := soak.rows.run(case, tmp_path))] == []


def test_the_kinds_are_as_many_as_the_page_on_data_says() -> None:
    assert len(ROWS) + len(BROKEN) > 90
    assert len(POSITIONS) * (len(ROW_CASES) + len(BROKEN_CASES)) > 900
