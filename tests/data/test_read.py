"""Files, forms, slices and errors: the same rows give the same examples from everywhere, and bad ones are named."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lorafit.data.check import MAX_ERRORS
from lorafit.data.read import read_examples
from lorafit.data.rows import find_rows, parse_name
from lorafit.errors import DataError, UsageError

ROWS = [{"instruction": f"Do {k}", "input": "x, y" * (k % 2), "output": f'done "{k}"\nyes é {k}'} for k in range(1, 8)]


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> Any:
    return byte_tokenizer()


def pairs(examples: Any) -> list[Any]:
    return [(example.ids, example.labels) for example in examples]


# --- forms -----------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Do it\nnow"}, {"role": "assistant", "content": "done"}]
SAME = {
    "alpaca": {"instruction": " Do it ", "input": "now ", "output": "done\n"},
    "prompt and completion": {"prompt": "Do it\nnow", "completion": "done"},
    "prompt and completion as messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "prompt as messages": {"prompt": MESSAGES[:1], "completion": "done"},
    "messages": {"messages": MESSAGES},
    "messages as JSON text": {"messages": json.dumps(MESSAGES)},
    "messages under another name": {"conversations": MESSAGES},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Do it\nnow"}, {"from": "gpt", "value": "done"}],
        "id": "identity_0",
    },
}


@pytest.mark.parametrize("form", SAME)
def test_all_forms_say_the_same(form: str, tokenizer: Any, show: Any) -> None:
    (example,) = read_examples([SAME[form]], tokenizer)
    assert example.source == "data:1"
    assert show(example, tokenizer) == "<|im_start|>user\nDo it\nnow<|im_end|>\n<|im_start|>assistant\n⟦done<|im_end|>⟧"


def test_text_has_loss_everywhere_and_needs_no_template(byte_tokenizer: Any, show: Any) -> None:
    tokenizer = byte_tokenizer(None)
    (example,) = read_examples([{"text": "hello"}], tokenizer)
    assert show(example, tokenizer) == "⟦hello</s>⟧"
    (example,) = read_examples([{"prompt": "Q:", "completion": " A"}], tokenizer)
    assert show(example, tokenizer) == "Q:⟦ A</s>⟧"
    with pytest.raises(UsageError, match="chat_template"):
        read_examples(ROWS, tokenizer)
    (example,) = read_examples(ROWS[:1], tokenizer, chat_template="plain")
    assert show(example, tokenizer).startswith("<s>### User:\nDo 1\nx, y\n\n### Assistant:\n⟦done")


def test_answers_in_the_prompt_are_context(tokenizer: Any, show: Any) -> None:
    row = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": [{"role": "assistant", "content": "again"}]}
    (example,) = read_examples([row], tokenizer)
    assert show(example, tokenizer).count("⟦") == 1
    assert show(example, tokenizer).endswith("⟦again<|im_end|>⟧")

    greeting = {"prompt": [], "completion": [{"role": "assistant", "content": "Hello"}, *MESSAGES]}
    assert show(read_examples([greeting], tokenizer)[0], tokenizer).count("⟦") == 1


def test_system_and_history_columns(tokenizer: Any, show: Any) -> None:
    row = {"instruction": "Q2", "input": None, "output": "A2", "system": "S", "history": [["Q1", "A1"]]}
    (example,) = read_examples([row], tokenizer)
    turns = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert show(example, tokenizer).replace("⟦", "").replace("⟧", "") == whole.rstrip()
    sharegpt = SAME["sharegpt"] | {"system": "S"}
    assert show(read_examples([sharegpt], tokenizer)[0], tokenizer).startswith("<|im_start|>system\nS<|im_end|>")


def test_tool_calls_in_both_spellings(byte_tokenizer: Any, show: Any) -> None:
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    openai = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "Sunny."},
    ]
    sharegpt = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    a = read_examples([{"messages": openai, "tools": tools}], tokenizer)
    b = read_examples([{"conversations": sharegpt, "tools": json.dumps(tools)}], tokenizer)
    assert pairs(a) == pairs(b)
    assert show(a[0], tokenizer).endswith(
        '<|user|>?<|end|><|assistant|>⟦weather{"city": "Rome"}<|end|>⟧<|tool|>sunny<|end|><|assistant|>⟦Sunny.<|end|>⟧'
    )


# --- files -----------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the name of `path` says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif kind == "json":
        raw = json.dumps(rows, indent=2).encode()
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        raw = path.read_bytes()
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        raw = path.read_bytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


KINDS = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "with:colon.jsonl"]


@pytest.mark.parametrize("name", KINDS)
def test_all_files_say_the_same(name: str, tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / name, ROWS)
    examples = read_examples(path, tokenizer)
    assert pairs(examples) == pairs(read_examples(ROWS, tokenizer))
    assert pairs(read_examples(f"{path}:[2:4]", tokenizer)) == pairs(examples[2:4])
    # The line named is the line where the row begins (for parquet: its number).
    opened = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, example in enumerate(examples, 1):
        file, _, line = example.source.rpartition(":")
        assert file == str(path)
        if path.suffix == ".parquet":
            assert int(line) == number
        else:
            here = b"\n".join(opened.split(b"\n")[int(line) - 1 :]).decode()
            assert re.match(rf'[\s{{"instruction:]*Do {number}\b', here)


def test_a_bom_blank_lines_and_windows_line_ends_are_fine(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert pairs(read_examples(path, tokenizer)) == pairs(read_examples(ROWS, tokenizer))
    assert [row[0].rpartition(":")[2] for row in find_rows(path)] == ["1", "3", "5", "7", "9", "11", "13"]
    as_json = path.rename(tmp_path / "lines.json")
    assert pairs(read_examples(as_json, tokenizer)) == pairs(read_examples(ROWS, tokenizer))


def test_csv_keeps_text_as_it_is(tmp_path: Path, tokenizer: Any, show: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"instruction,input,output\nNA,,007\nlong,,{'z' * 200_000}\n")
    first, second = read_examples(path, tokenizer, max_length=300_000)
    assert "user\nNA<" in show(first, tokenizer)
    assert "⟦007<|im_end|>⟧" in show(first, tokenizer)
    assert len(second.ids) > 200_000


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("owner/name", ("owner/name", "", "")),
        ("owner/name:train", ("owner/name", "train", "")),
        ("owner/name:train[:1%]", ("owner/name", "train", ":1%")),
        ("a.jsonl:[:100]", ("a.jsonl", "", ":100")),
        ("b:c.jsonl:[-5:]", ("b:c.jsonl", "", "-5:")),
        ("b:c.jsonl", ("b:c.jsonl", "", "")),
        ("a.jsonl:", ("a.jsonl:", "", "")),
    ],
)
def test_names_with_split_and_slice(data: str, parts: tuple[str, str, str]) -> None:
    assert parse_name(data) == parts


def test_a_folder_whose_own_name_has_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "rows:train"
    assert parse_name(str(folder)) == (str(tmp_path / "rows"), "train", "")
    folder.mkdir()
    assert parse_name(str(folder)) == (str(folder), "", "")


@given(start=st.one_of(st.none(), st.integers(-12, 12)), stop=st.one_of(st.none(), st.integers(-12, 12)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_those_of_python(tmp_path: Path, start: int | None, stop: int | None) -> None:
    path = tmp_path / "a.jsonl"
    path.exists() or write(path, ROWS)
    expected = ROWS[start:stop]
    text = f"{path}:[{'' if start is None else start}:{'' if stop is None else stop}]"
    if expected:
        assert [row for _, row in find_rows(text)] == expected
    else:
        with pytest.raises(DataError, match=r"selects none of its 7 rows"):
            find_rows(text)


def test_percent_slices_are_those_of_datasets(tmp_path: Path) -> None:
    import datasets

    path = write(tmp_path / "a.jsonl", ROWS)
    for percent in (":50%", "10%:60%", "-30%:", ":99%"):
        said = datasets.ReadInstruction.from_spec(f"train[{percent}]").to_absolute({"train": len(ROWS)})[0]
        assert [row for _, row in find_rows(f"{path}:train[{percent}]")] == ROWS[said.from_ : said.to]


def test_the_hub_is_asked_for_split_and_configuration(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load_dataset(path: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, configuration, split))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    examples = read_examples("owner/name:train[:1%]", tokenizer)
    assert examples[2].source == "owner/name:3"
    read_examples("name", tokenizer)
    read_examples("owner/name/main:test", tokenizer)
    read_examples(str(tmp_path), tokenizer)
    assert asked == [
        ("owner/name", None, "train[:1%]"),
        ("name", None, "train"),
        ("owner/name", "main", "test"),
        (str(tmp_path), None, "train"),
    ]

    def fails(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such dataset\nat all")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(DataError, match=r"^owner/nam: neither a file here nor .* \(no such dataset\)$"):
        read_examples("owner/nam", tokenizer)


# --- errors ----------------------------------------------------------------------------------------------

GOOD = json.dumps({"instruction": "Do", "output": "done"})
BAD_LINES = {
    '{"instruction": "Do", "output": }': r"a\.jsonl:2:33: not valid JSON \(Expecting value\): a value is missing, or a",
    '{"instruction": "Do", "output": "do': r"a\.jsonl:2:33: not valid JSON \(Unterminated string st.* cut off\?$",
    '{"instruction": "Do", "output": "d"} x': r"a\.jsonl:2:38: not valid JSON \(Extra data\): nothing may stand behind",
    '{"instruction": "Do", "output": NaN}': r"a\.jsonl:2: not valid JSON \(NaN is no JSON value: write null",
    '{"instruction": "Do", "output": "a", "output": "b"}': r"a\.jsonl:2: .*'output' stands twice",
    '["Do", "done"]': r"a\.jsonl:2: a row must be an object with named columns, not list$",
    "null": r"a\.jsonl:2: a row must be an object",
    "[" * 100_000: r"a\.jsonl:2: not valid JSON \(nested too deeply\)",
    '{"instruction": "Do", "output": ' + "9" * 5000 + "}": r"a\.jsonl:2: not valid JSON",
    "{}": r"a\.jsonl:2: no column 'instruction': the row has none$",
    '{"instruction": "Do"}': r"a\.jsonl:2: no column 'output': the row has instruction$",
    '{"instruction": "Do", "outptu": "d"}': r"a\.jsonl:2: no column 'output' \(did you mean 'outptu'\?\): the row has",
    '{"instruction": "Do", "inputs": "x", "output": "d"}': r"unknown column 'inputs' \(did you mean 'input'\?\)",
    '{"instruction": "Do", "output": null}': r"a\.jsonl:2: column 'output' must hold text, not null$",
    '{"instruction": "Do", "output": 42}': r"a\.jsonl:2: column 'output' must hold text, not 42 \(int\)$",
    '{"instruction": " ", "output": "d"}': r"a\.jsonl:2: columns 'instruction' and 'input' are both empty: ",
    '{"instruction": "Do", "output": "a\\ud83d"}': r"a\.jsonl:2: column 'output' holds half a .*, character 2",
    '{"instruction": "Do", "output": "d", "history": [1]}': r"'history' must be a list of \[question, answer\] pairs, ",
    '{"text": "Do"}': r"a\.jsonl:2: no column 'instruction'",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:40])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_line_is_named(bad: str, position: int, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    lines = [GOOD, GOOD, GOOD]
    lines[position] = bad
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_examples(path, tokenizer)
    (message,) = str(caught.value).splitlines()
    assert re.search(BAD_LINES[bad].replace(":2", f":{position + 1}"), message), message
    assert len(message) < 400


def test_bad_bytes_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + '{"instruction": "é", "output": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl:2:18: byte 0xe9 is not UTF-8: save the file as UTF-8"):
        read_examples(path, tokenizer)
    path.write_text(GOOD, encoding="utf-16")
    with pytest.raises(DataError, match=r"a\.jsonl:1: this is UTF-16"):
        read_examples(path, tokenizer)
    for name in ("a.json", "a.csv"):
        (tmp_path / name).write_bytes(b'"instruction",\n"\xc3\xa9\xe9"')
        with pytest.raises(DataError, match=rf"{name}:2:3: byte 0xe9 is not UTF-8"):
            read_examples(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no rows in it"),
        ("[]", "there are no rows in it"),
        (f"[{GOOD}\n,\n{GOOD[:-5]}]", r"a\.json:3:33: not valid JSON"),
        (f"[{GOOD}\n{GOOD}]", r"a\.json:2:1: not valid JSON \(Expecting ',' or '\]'"),
        (f"[{GOOD},", r"a\.json:1:\d+: not valid JSON"),
        (f"[{GOOD}] x", r"a\.json:1:\d+: not valid JSON \(Extra data"),
        (f"[\n{GOOD}, 3]", r"a\.json:2: a row must be an object"),
        ("{\n}", r"a\.json:1: a \.json file must hold a list of objects"),
        ('"hello"', r"a\.json:1: a \.json file must hold a list of objects"),
        ("[" * 100_000, r"a\.json:1: not valid JSON \(nested too deeply\)"),
    ],
)
def test_bad_json_files(text: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(path, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no rows in it"),
        ("instruction,output\n", "there are no rows in it"),
        ("instruction,output\na,b\na,b,c\n", r'a\.csv:3: 3 fields where the header names 2: put "quotes" around'),
        ('instruction,output\n"a\nb",c\nd\n', r"a\.csv:4: 1 fields"),
        ('instruction,output\na,"b', r"a\.csv:2:3: not valid CSV \(this quoted field does not end\)"),
        ('instruction,output\na,"b" c', r"a\.csv:2:3: not valid CSV \(text follows on the closing quote"),
        ('instruction,output\na,b" c', r"a\.csv:2:4: not valid CSV \(a quote inside a field that is not quoted\)"),
        ("instruction,instruction\na,b", r"a\.csv:1: column names in the header"),
        ("instruction,outptu\na,b", r"a\.csv:2: no column 'output' \(did you mean 'outptu'\?\)"),
    ],
)
def test_bad_csv_files(text: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": 1, "mesages": 2}, r"columns question, mesages make no known form \(did you mean 'messages'"),
        ({"messages": None}, "column 'messages' must hold a list, not null"),
        ({"messages": "hello"}, "column 'messages' must hold a list, or the JSON text of one"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"message 1 has the role 'usr' \(did you mean 'user'\?\)"),
        ({"messages": MESSAGES[:1]}, "no assistant message answers anything"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, r"is from 'humn' \(did you mean 'human'\?\): speakers"),
        ({"conversations": [{"from": "human", "vale": "x"}]}, r"no text in 'value' \(did you mean 'vale'\?\)"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "must hold a JSON object with name"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "no column 'completion': the row has prompt, chosen"),
        ({"messages": MESSAGES, "tools": "x"}, "column 'tools' must hold a list"),
        ([1], "a row must be an object with named columns, not list"),
    ],
)
def test_bad_rows(row: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"^data:1: .*{message}"):
        read_examples([row], tokenizer)


def test_errors_come_together_up_to_a_limit(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD, "{", GOOD, '{"instruction": 1, "output": "x"}', GOOD]))
    with pytest.raises(DataError) as caught:
        read_examples(path, tokenizer)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2:2: ")
    assert second.startswith(f"{path}:4: ")
    path.write_text("{\n" * 50)
    with pytest.raises(DataError) as caught:
        read_examples(path, tokenizer)
    *errors, last = str(caught.value).splitlines()
    assert len(errors) == MAX_ERRORS == 20
    assert last == f"{path}: stopped after 20 errors"


def test_rows_outside_a_slice_do_not_matter(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{{\n")
    assert len(read_examples(f"{path}:[:1]", tokenizer)) == 1
    with pytest.raises(UsageError, match=r"\[%:1\] is no slice"):
        read_examples(f"{path}:[%:1]", tokenizer)
    with pytest.raises(DataError, match="a file has no split 'test'"):
        read_examples(f"{path}:test", tokenizer)


def test_files_that_are_not_there_or_not_known(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"tran\.jsonl: no such file \(did you mean 'train\.jsonl'\?\)$"):
        read_examples(tmp_path / "tran.jsonl", tokenizer)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt: unknown kind of file: known are \.jsonl"):
        read_examples(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        read_examples(tmp_path / "a.jsonl.gz", tokenizer)
    (tmp_path / "b.jsonl.gz").write_text(GOOD)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: not compressed with gzip: take \.gz off its name"):
        read_examples(tmp_path / "b.jsonl.gz", tokenizer)
    (tmp_path / "a.parquet").write_text(GOOD)
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file: "):
        read_examples(tmp_path / "a.parquet", tokenizer)
    with pytest.raises(UsageError, match="loss_on must be"):
        read_examples(ROWS, tokenizer, loss_on="answers")


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_damaged_files_load_or_are_refused(
    name: str, tmp_path: Path, tokenizer: Any, at: int, byte: int, cut: bool
) -> None:
    whole = tmp_path / f"whole-{name}"
    raw = bytearray((whole if whole.exists() else write(whole, ROWS)).read_bytes())
    at %= len(raw)
    raw[at] = byte
    (tmp_path / name).write_bytes(raw[:at] if cut else raw)
    try:
        read_examples(tmp_path / name, tokenizer)
    except DataError as refusal:
        lines = str(refusal).splitlines()
    else:
        lines = []
    assert all(line.startswith(str(tmp_path / name)) for line in lines)


# --- what does not fit -----------------------------------------------------------------------------------


def rows_of(*lengths: int) -> list[dict[str, str]]:
    return [{"prompt": "q" * length, "completion": "a" * 8} for length in lengths]


def test_long_rows_are_cut_and_dropped_without_an_answer(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(None)
    notes: list[str] = []
    # Without a template a row is its bytes and EOS: prompts of 20 leave no room, one of 16 leaves room for half.
    rows = rows_of(5, 20, 16, 5, 20, 19)
    examples = read_examples(rows, tokenizer, max_length=20, allow_dropped=0.5, on_note=notes.append)
    assert [example.source for example in examples] == ["data:1", "data:3", "data:4", "data:6"]
    assert [len(example.ids) for example in examples] == [14, 20, 14, 20]
    assert [sum(label >= 0 for label in example.labels) for example in examples] == [9, 4, 9, 1]
    assert notes == [
        "dropped: data: 2 of 6 rows have no answer, or none within max_length=20 (lines 2, 5)",
        "cut: data: 2 of 4 examples end at max_length=20 tokens",
    ]


def test_too_many_dropped_rows_are_refused(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(None)
    rows = rows_of(*[5] * 19, 20)
    assert len(read_examples(rows, tokenizer, max_length=20)) == 19  # one in twenty is just allowed
    with pytest.raises(DataError, match=r"^data: 1 of 19 rows .* \(lines 19\): raise max_length, or allow_dropped"):
        read_examples(rows[1:], tokenizer, max_length=20)
    assert len(read_examples(rows[1:], tokenizer, max_length=20, allow_dropped=0.1)) == 18
    with pytest.raises(DataError, match="data: 1 of 1 rows"):
        read_examples(rows[-1:], tokenizer, max_length=20, allow_dropped=1.0)


def test_empty_answers_are_dropped(tokenizer: Any) -> None:
    notes: list[str] = []
    rows = [*ROWS, {"instruction": "Do", "output": ""}]
    assert len(read_examples(rows, tokenizer, allow_dropped=0.2, on_note=notes.append)) == len(ROWS)
    assert "(lines 8)" in notes[0]


def test_a_lonely_first_token_is_no_answer(byte_tokenizer: Any) -> None:
    """Nothing predicts the first token of a row: a row of one token teaches nothing."""
    with pytest.raises(DataError, match="1 of 1 rows have no answer"):
        read_examples([{"text": ""}], byte_tokenizer(None))


def test_progress_is_reported(tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    read_examples(ROWS, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, len(ROWS)) for k in range(1, len(ROWS) + 1)]


# --- real data -------------------------------------------------------------------------------------------


def test_real_conversations_in_both_spellings(shared: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen1_5"))
    folder = shared("data/chat")
    messages = read_examples(folder / "multiturn_messages.jsonl", tokenizer, max_length=4096)
    sharegpt = read_examples(folder / "multiturn_sharegpt.jsonl", tokenizer, max_length=4096)
    assert len(messages) == 214
    assert pairs(messages) == pairs(sharegpt)


def test_real_instructions(shared: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen1_5"))
    path = shared("data/bioinstruct") / "train.jsonl"
    examples = read_examples(f"{path}:train[:10%]", tokenizer, max_length=512)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {int(example.source.rpartition(":")[2]): example for example in examples}
    assert len(by_line) == 225
    for line, example in by_line.items():
        learned = tokenizer.decode([label for label in example.labels if label >= 0])
        assert f"{records[line - 1]['output'].strip()}<|im_end|>".startswith(learned)
