"""A data file in which one row, or a few bytes, are damaged: it is read with all other rows intact, or refused."""

import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from lorafit.data.check import check_rows
from lorafit.data.read import read_examples
from lorafit.errors import DataError

NAME = "rows"
WHAT = "a data file with a damaged row is read with every other row intact, or refused in lines that name the file"
COUNT = 10_000
LONG = 1_000_000
LIMIT = 60.0

KINDS = ("jsonl", "json", "lines.json", "csv", "tsv", "jsonl.gz", "csv.gz", "parquet")
FORMS = ("messages", "conversations", "instruction", "prompt", "text")
VARIANTS = 3  # files of each form and kind
ROWS = 7
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    'the cat sees a red house, and then it\'s over. “Quoted” "text" 3.14 = π x < y & z; naïve café Größe 日本語 👩‍🚀 '
    '<|im_end|> <|im_start|>assistant <think> {"json": [1, 2]} C:\\new\\table `code` def f(x): * | 100% 007 NA null'
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "Looks “it” up, 100%", "parameters": {"type": "object"}},
    }
]
# What damaged values and bytes are made of.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        2.5,
        10**30,
        float("nan"),
        [],
        {},
        [None],
        [[]],
        ["a", "b"],
        json.loads("[" * 300 + "]" * 300),
    ),
    *("", " \n", "\0", "\ud83d", "null", "[]", "{}", "assistant", "usr", "<|im_end|>", "x" * 3000),
    *({"role": "user"}, {"from": "gpt", "value": "?"}),
)
NAMES = (
    *("role", "content", "from", "value", "tool_calls", "tool_call", "text", "messages", "tools", "name"),
    *("outptu", "", "x\ny", "ïd"),
)
PIECES = (
    *(b'"', b'""', b"'", b"\\", b"\n", b"\n\n", b"\r", b"\r\n", b"\t", b",", b":", b"{", b"}", b"[", b"]", b" "),
    *(b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud83d", b"\x1f\x8b", b"PAR1"),
    *(b"},{", b'","', b'"\n"', b"NaN", b"1e999", b"//", b"<"),
)

Example = tuple[list[int], list[int]]


class File(NamedTuple):
    """A file that is right, and what must be read from it."""

    rows: list[Any]
    pieces: list[bytes]
    """The bytes of each row, without what stands between two rows; none in Parquet."""
    raw: bytes
    examples: list[list[Example]]
    """The ids and labels of each row."""


class Damaged(NamedTuple):
    """The bytes of a file after something was done to row `row`, and which rows must be what they were if it is read:
    the others, those before it, all of them, or none.
    """

    raw: bytes
    row: int
    kept: Literal["others", "before", "all", "none"] = "others"


def run(case: int, folder: Path) -> str | None:
    """Damage a file, and read it."""
    draw = random.Random(case)
    form, kind = draw.choice(FORMS), draw.choice(KINDS)
    file = material(form, kind, draw.randrange(VARIANTS))
    damage = draw.choice((damaged_value, damaged_value, damaged_bytes, damaged_bytes, cut_off, damaged_around))
    damaged = damage(draw, file, kind, draw.randrange(ROWS))
    path = folder / f"a.{kind}"
    path.write_bytes(damaged.raw)
    what = f"case {case}: {damage.__name__.replace('_', ' ')}, row {damaged.row} of {form}.{kind}"
    checked, found = outcome_of(check_rows, path), outcome_of(examples_of, path)
    for outcome in (checked, found):
        if wrong := wrong_refusal(outcome, path):
            return f"{what}: {wrong}"
    if isinstance(checked, DataError) and str(checked) != str(found):
        return f"{what}: without a tokenizer it says {str(checked)!r}, with one {str(found)[:300]!r}"
    return None if isinstance(found, DataError) else changed(what, file, damaged, flat(found))


def outcome_of(read: Callable[[Path], Any], path: Path) -> Any:
    """What `read` makes of the file, or what it raised."""
    try:
        return read(path)
    except Exception as error:
        return error


def wrong_refusal(outcome: Any, path: Path) -> str | None:
    """What is wrong with an error, if it is one."""
    if isinstance(outcome, Exception) and not isinstance(outcome, DataError):
        return f"{type(outcome).__name__}: {outcome}"
    lines = str(outcome).split("\n") if isinstance(outcome, DataError) else []
    if not all(line.startswith(f"{path}:") and len(line) < len(str(path)) + 400 for line in lines) or len(lines) > 21:
        return f"it says {str(outcome)[:500]!r}"
    return None


def changed(what: str, file: File, damaged: Damaged, found: list[Example]) -> str | None:
    """Whether a row that was not damaged is read in another way than before."""
    whole, before = flat(file.examples), flat(file.examples[: damaged.row])
    after = flat(file.examples[damaged.row + 1 :]) if damaged.kept == "others" else []
    if damaged.kept == "all":
        return None if found == whole else f"{what}: read, but not as it was"
    kept = found[: len(before)] == before and found[len(found) - len(after) :] == after
    intact = damaged.kept == "none" or (kept and len(found) >= len(before + after))
    return None if intact else f"{what}: another row has changed"


def flat(rows: list[list[Example]]) -> list[Example]:
    return [example for row in rows for example in row]


# --- damage -----------------------------------------------------------------------------------------


def damaged_value(draw: random.Random, file: File, kind: str, row: int) -> Damaged:
    """Some value in the row, or a name, is another one, is gone, or is there twice."""
    value = json.loads(json.dumps(file.rows[row]))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = altered(draw, value)
    if kind != "parquet":
        pieces = list(file.pieces)
        pieces[row] = encoded(draw, value, kind, list(file.rows[row]))
        return Damaged(joined(pieces, kind, list(file.rows[0])), row)
    rows = [*file.rows[:row], value, *file.rows[row + 1 :]]
    try:
        raw = parquet(rows)
        others = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError, AttributeError):  # no table holds it
        return damaged_around(draw, file, kind, row)
    if any(bare(a) != bare(b) for k, (a, b) in enumerate(zip(rows, others, strict=True)) if k != row):
        return damaged_around(draw, file, kind, row)  # the table has changed other rows: 1 to 1.0, say
    return Damaged(raw, row)


def damaged_bytes(draw: random.Random, file: File, kind: str, row: int) -> Damaged:
    """Some bytes of the row are others, are gone, are new, or stand twice."""
    if kind == "parquet":
        return damaged_around(draw, file, kind, row)
    pieces = list(file.pieces)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        pieces[row] = scratched(draw, pieces[row])
    return Damaged(joined(pieces, kind, list(file.rows[0])), row)


def cut_off(draw: random.Random, file: File, kind: str, row: int) -> Damaged:
    """The file ends within the row."""
    if kind == "parquet" or kind.endswith(".gz"):
        return Damaged(file.raw[: draw.randrange(len(file.raw))], row, "all")
    start = file.raw.index(file.pieces[row])
    return Damaged(file.raw[: start + draw.randrange(len(file.pieces[row]))], row, "before")


def damaged_around(draw: random.Random, file: File, kind: str, row: int) -> Damaged:
    """Bytes are damaged that belong to no row: of a packed file (a checksum tells), or of a header."""
    raw = file.raw
    if kind == "parquet" or kind.endswith(".gz"):
        # What a Parquet file says about itself stands at its end, without a checksum.
        end = len(raw) if kind != "parquet" else len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
        if end < len(raw) and draw.random() < 0.5:
            return Damaged(raw[:end] + scratched(draw, raw[end:]), row, "none")
        packed = raw[:end]
        for _ in range(draw.choice((1, 1, 2, 5))):
            packed = scratched(draw, packed)
        return Damaged(packed + raw[end:], row, "all")
    start = raw.index(file.pieces[0])
    if not start:
        return damaged_bytes(draw, file, kind, row)
    at = draw.randrange(start)
    return Damaged(raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :], row, "all")


def altered(draw: random.Random, value: Any) -> Any:
    """`value` with something else in one place of it."""
    if not (isinstance(value, dict | list) and value) or draw.random() < 0.1:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at, items = draw.randrange(len(value)), list(value)
        others: Any = [altered(draw, items[at]), *draw.sample(items, 1)]
        items[at : at + 1] = others[: draw.choice((0, 1, 1, 1, 2))]
        return items
    name = draw.choice(list(value))
    new = draw.choice((name, name, name, draw.choice(NAMES), name.upper(), name + "s", None))
    entries = [(new if key == name else key, altered(draw, old) if key == name else old) for key, old in value.items()]
    return {key: item for key, item in entries if key is not None}


def scratched(draw: random.Random, raw: bytes) -> bytes:
    """`raw` with a few bytes changed."""
    at, end = sorted((draw.randrange(len(raw) + 1), draw.randrange(len(raw) + 1)))
    near = min(at + draw.choice((1, 1, 1, 3, 10)), len(raw))
    return draw.choice(
        (
            raw[:at] + bytes([draw.randrange(256)]) + raw[near:],
            raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :] if at < len(raw) else raw,
            raw[:at] + raw[near:],
            raw[:at] + raw[end:],
            raw[:at] + draw.choice(PIECES) + raw[at:],
            raw[:at] + draw.choice(PIECES) + raw[near:],
            raw[:near] + raw[at:],
            raw[:end] + raw[at:],
        )
    )


# --- files ------------------------------------------------------------------------------------------


@cache
def material(form: str, kind: str, variant: int) -> File:
    """A file that is right, with rows as people write them."""
    draw = random.Random(f"{form} {kind} {variant}")
    rows = [written(draw, form, variant) for _ in range(ROWS)]
    columns = list(rows[0])
    pieces = [] if kind == "parquet" else [encoded(draw, row, kind, columns) for row in rows]
    raw = parquet(rows) if kind == "parquet" else joined(pieces, kind, columns)
    with tempfile.TemporaryDirectory(prefix="soak-rows-") as folder:
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(raw)
        return File(rows, pieces, raw, examples_of(path))


def examples_of(path: Path) -> list[list[Example]]:
    """The ids and labels of each row of a file."""
    examples = read_examples(path, tokenizer(), max_length=10**6, allow_dropped=1.0)
    return [[(e.ids, e.labels) for e in row] for _, row in groupby(examples, key=lambda example: example.source)]


@cache
def tokenizer() -> Any:
    """One token for a byte."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(ALPHABET)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=special, chat_template=TEMPLATE
    )
    return made


def words(draw: random.Random) -> str:
    text = " ".join(draw.choices(TEXT.split(), k=draw.choice((1, 3, 8, 20))))
    return draw.choice((text, text, f"{text}\n\n- {text},\n", f'"{text}"', f"{text}\r\n"))


def written(draw: random.Random, form: str, variant: int) -> Any:
    """A row of a form: bare, with optional columns, or with tools."""
    extra: dict[str, Any] = {"id": f"row-{draw.randrange(10**6)}"} if variant else {}
    calls = variant == 2
    if form == "text":
        return {"text": words(draw), **extra}
    if form == "prompt" and not variant:
        return {"prompt": words(draw), "completion": words(draw)}
    if form == "instruction":
        row = {"instruction": words(draw), "input": draw.choice(("", words(draw))), "output": words(draw), **extra}
        history = {"history": [[words(draw), words(draw)] for _ in range(draw.randrange(1, 3))]} if calls else {}
        return row | ({"system": words(draw)} if variant else {}) | history
    turns = talk(draw, sharegpt=form == "conversations", calls=calls)
    if form == "prompt":
        return {"prompt": turns[:-1], "completion": turns[-1:], **extra}
    return {form: turns, **({"tools": TOOLS} if calls else {}), **extra}


def talk(draw: random.Random, sharegpt: bool, calls: bool) -> list[Any]:
    """A conversation of a few turns, some with a call of a tool."""
    who, says = ("from", "value") if sharegpt else ("role", "content")
    user, assistant, tool = ("human", "gpt", "observation") if sharegpt else ("user", "assistant", "tool")
    turns: list[Any] = []
    for _ in range(draw.randrange(1, 4)):
        turns.append({who: user, says: words(draw)})
        if calls:
            call = {"name": "look_up", "arguments": json.dumps({"what": words(draw), "count": draw.randrange(9)})}
            openai = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
            turns.append({"from": "function_call", "value": json.dumps(call)} if sharegpt else openai)
            turns.append({who: tool, says: words(draw)})
        turns.append({who: assistant, says: words(draw)})
    return turns


def encoded(draw: random.Random, row: Any, kind: str, columns: list[str]) -> bytes:
    """A row as it stands in a text file."""
    if not kind.startswith(("csv", "tsv")):
        return json.dumps(row, ensure_ascii=draw.random() < 0.3).encode("utf-8", "surrogatepass")
    values = [row.get(name) for name in columns] if isinstance(row, dict) else row if isinstance(row, list) else [row]
    cells = ["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
    file = io.StringIO(newline="")
    quoting: Any = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    csv.writer(file, delimiter=mark(kind), quoting=quoting).writerow(cells)
    return file.getvalue().removesuffix("\r\n").encode("utf-8", "surrogatepass")


def joined(pieces: list[bytes], kind: str, columns: list[str]) -> bytes:
    """The text file with these rows."""
    if kind == "json":
        return b"[\n" + b",\n".join(pieces) + b"\n]\n"
    header = [mark(kind).join(columns).encode()] if kind.startswith(("csv", "tsv")) else []
    raw = b"".join(piece + b"\n" for piece in [*header, *pieces])
    return gzip.compress(raw, mtime=0) if kind.endswith(".gz") else raw


def mark(kind: str) -> str:
    return "\t" if kind == "tsv" else ","


def parquet(rows: list[Any]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def bare(value: Any) -> Any:
    """`value` without what is null in it."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if item is not None}
    return [bare(item) for item in value] if isinstance(value, list) else value
