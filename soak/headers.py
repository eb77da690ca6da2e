"""Mutations of a safetensors file: of its bytes, and of what its header says."""

import json
import random
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from lorafit.adapter.peft_format import PREFIX, WEIGHTS
from soak.hostile import ours

# --- mutations of bytes ------------------------------------------------------------------------------

Header = list[tuple[str, Any]]
Mutation = Callable[[random.Random, bytes], bytes]
LENGTHS = (0, 1, 7, 2**10, 2**24, 2**25, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "1", [], {},
)  # fmt: skip
DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "C64", "I64", "I32", "I8", "U64", "U8", "BOOL", "f32",
    "F33", "", None, 32,
)  # fmt: skip
STRANGE = (
    "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.lora_A.other.weight",
    "model.layers.0.self_attn.k_proj.lora_A.weight", "model.layers.9.self_attn.q_proj.lora_A.weight",
    "model.norm.trained.weight", "model.norm.base_layer.weight", "_lorafit", "config", "", ".", "..",
    "../../etc/passwd", "/etc/passwd", "a\nb", "a\x1b[2Jb", "\x00", "\u202e", "ä", "\ud800", "x" * 600,
    "__metadata__", "lora_A.weight", ".lora_.lora_A.weight", "module.module.x", "model..norm.weight",
)  # fmt: skip


def span(rng: random.Random, data: bytes) -> tuple[int, int]:
    """A stretch of the data: half of the time in the header, and mostly a short one."""
    end = min(8 + header_length(data), len(data)) if rng.random() < 0.5 else len(data)
    begin = rng.randrange(end) if end else 0
    return begin, min(begin + rng.choice((1, 1, 2, 4, 8, 64, 1024)), len(data))


def header_length(data: bytes) -> int:
    return min(int.from_bytes(data[:8], "little"), max(len(data) - 8, 0))


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        begin, end = span(rng, data)
        if end > begin:
            changed[begin] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    begin, end = span(rng, data)
    size = end - begin
    return data[:begin] + rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size))) + data[end:]


def remove(rng: random.Random, data: bytes) -> bytes:
    begin, end = span(rng, data)
    return data[:begin] + data[end:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    begin, end = span(rng, data)
    place, _ = span(rng, data)
    return data[:place] + data[begin:end] + data[place:]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, span(rng, data)[0], len(data) - 1))]


def grow(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", bytes(4096), rng.randbytes(rng.randrange(1, 100)), b"PK\x03\x04", data))


def length(rng: random.Random, data: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    stated = rng.choice((*LENGTHS, true + rng.choice((-8, -1, 1, 8)), len(data) - 8, len(data))) % 2**64
    return stated.to_bytes(8, "little") + data[8:]


def number(rng: random.Random, data: bytes) -> bytes:
    """A value that is no number, where the values are."""
    start = 8 + header_length(data)
    if len(data) < start + 4:
        return data
    place = start + 4 * rng.randrange((len(data) - start) // 4)
    return (
        data[:place] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4)) + data[place + 4 :]
    )


# --- mutations of headers ----------------------------------------------------------------------------


def header(rng: random.Random, data: bytes) -> bytes:
    """Change what the header says, and write it down again in one of the ways JSON can be written."""
    size = header_length(data)
    try:
        items: Header = list(json.loads(data[8 : 8 + size]).items())
    except (ValueError, AttributeError):
        return flip(rng, data)
    values = data[8 + size :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        items, values = rng.choice(HEADER_EDITS)(rng, items, values)
    text = written(rng, items)
    return len(text).to_bytes(8, "little") + text + values


def written(rng: random.Random, items: Header) -> bytes:
    space = rng.choice(("", "", " ", "\n\t"))
    options: dict[str, Any] = {"separators": ("," + space, ":" + space)}
    parts = (f"{json.dumps(name)}:{space}{json.dumps(value, **options)}" for name, value in items)
    text = "{" + f",{space}".join(parts) + "}"
    if rng.random() < 0.2:  # any letter may be written as its number
        place = rng.randrange(len(text))
        if text[place].isalpha() and text[place - 1] != "\\":
            text = text[:place] + f"\\u{ord(text[place]):04x}" + text[place + 1 :]
    return text.encode() + b" " * rng.choice((0, 0, 1, 8, 5000))


def place_of(rng: random.Random, items: Header) -> int:
    return rng.randrange(len(items)) if items else -1


def edit_field(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    place = place_of(rng, items)
    if place < 0 or not isinstance(items[place][1], dict):
        return items, values
    name, entry = items[place]
    entry, field = dict(entry), rng.choice(("dtype", "shape", "data_offsets", "more"))
    some = entry[field] if isinstance(entry.get(field), list) else []
    if field == "dtype":
        entry[field] = rng.choice(DTYPES)
    elif some and rng.random() < 0.8:
        entry[field] = list(some)
        entry[field][rng.randrange(len(some))] = rng.choice((*NUMBERS, some[0], some[-1]))
    else:
        entry[field] = rng.choice((*NUMBERS, [1] * 9, [0], some[::-1], [*some, 1]))
    if rng.random() < 0.1:
        del entry[rng.choice(list(entry))]
    return [*items[:place], (name, entry), *items[place + 1 :]], values


def rename(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    place = place_of(rng, items)
    if place < 0:
        return items, values
    name, entry = items[place]
    new = rng.choice((strange(rng), strange(rng), rng.choice(items)[0], name.upper(), "module." + name, name + " "))
    return [*items[:place], (new, entry), *items[place + 1 :]], values


def strange(rng: random.Random) -> str:
    return rng.choice(("", PREFIX, "module.", "base_model.model.")) + rng.choice(STRANGE)


def drop(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    place = place_of(rng, items)
    return [item for number, item in enumerate(items) if number != place], values


def twice(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    return ([*items, rng.choice(items)] if items else items), values


def shuffle(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    return rng.sample(items, len(items)), values


def swap(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """Two tensors change names: in one file of ours both may fit."""
    if len(items) < 2:
        return items, values
    a, b = rng.sample(range(len(items)), 2)
    items = list(items)
    items[a], items[b] = (items[a][0], items[b][1]), (items[b][0], items[a][1])
    return items, values


def overlap(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """Two tensors of one size share the place of one of them."""
    known = [(name, entry) for name, entry in items if isinstance(entry, dict) and "data_offsets" in entry]
    places = {name: entry["data_offsets"] for name, entry in known}
    if len(places) < 2:
        return items, values
    a, b = rng.sample(sorted(places), 2)
    return [(name, {**entry, "data_offsets": places[b]} if name == a else entry) for name, entry in items], values


def nothings(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """Tensors without values, which cost a file only their names."""
    place = rng.choice((0, len(values)))
    empty = {"dtype": "F32", "shape": [rng.choice((0, 1)), 0], "data_offsets": [place, place]}
    count = rng.choice((1, 1, 10, 1000))
    return [*items, *((f"{strange(rng)}{number or ''}", empty) for number in range(count))], values


def another_tensor(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """One more tensor, in order in every respect but that nobody asked for it."""
    shape = rng.choice(([32, 16], [16, 16], [16], [2, 16], [1]))
    size = 4
    for length in shape:
        size *= length
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [len(values), len(values) + size]}
    return [*items, (strange(rng), entry)], values + rng.choice((bytes(size), rng.randbytes(size)))


def half(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """The same values in another precision, or cut down to it."""
    tensors = {name: entry for name, entry in items if name != "__metadata__"}
    try:
        raw = safetensors.torch.load(_file(list(tensors.items()), values))
    except Exception:
        return items, values
    dtype = rng.choice(
        (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.float8_e4m3fn, torch.complex64)
    )
    chosen = rng.choice((list(raw), rng.sample(list(raw), min(1, len(raw)))))
    data = safetensors.torch.save({name: t.to(dtype) if name in chosen else t for name, t in raw.items()})
    size = header_length(data)
    notes = [(name, entry) for name, entry in items if name == "__metadata__"]
    return [*notes, *json.loads(data[8 : 8 + size]).items()], data[8 + size :]


def _file(items: Header, values: bytes) -> bytes:
    text = json.dumps(dict(items)).encode()
    return len(text).to_bytes(8, "little") + text + values


def notes(rng: random.Random, items: Header, values: bytes) -> tuple[Header, bytes]:
    """What the file says about itself: taken away, made nonsense, or another file's."""
    others: list[Any] = [json.loads(_header_text(saved.files[WEIGHTS]))["__metadata__"] for saved in ours().values()]
    own: dict[str, Any] = dict(rng.choice(others))
    note = json.loads(own["lorafit"])
    rng.choice(NOTE_EDITS)(rng, note)
    own["lorafit"] = rng.choice(
        (json.dumps(note), own["lorafit"][: rng.randrange(200)], "", "[]", "{" * 5000, "\x1b[2J")
    )
    new: Any = rng.choice((None, own, own, own, {"format": "pt"}, {}, [], {"lorafit": 1}, {"lorafit": {}}, "pt"))
    kept = [(name, entry) for name, entry in items if name != "__metadata__"]
    return (kept if new is None else [("__metadata__", new), *kept]), values


NOTE_EDITS: tuple[Callable[[random.Random, Any], None], ...] = (
    lambda rng, note: None,
    lambda rng, note: note.pop(rng.choice(("base", "config"))),
    lambda rng, note: note.update({rng.choice(("base", "config")): rng.choice(NUMBERS)}),
    lambda rng, note: note["base"].pop(rng.choice(("facts", "values"))),
    lambda rng, note: note["base"].update({rng.choice(("facts", "values")): rng.choice(NUMBERS)}),
    lambda rng, note: note["base"]["facts"].update(hidden_size=rng.choice((*NUMBERS, 10**200, "x" * 10**5))),
    lambda rng, note: note["base"]["values"].update(
        {rng.choice((*note["base"]["values"], "x")): rng.choice(("", "AAAA", "AAAAAAAA", "A" * 2**16, "?", "ä", None))}
    ),
)
HEADER_EDITS: tuple[Callable[[random.Random, Header, bytes], tuple[Header, bytes]], ...] = (
    edit_field, edit_field, edit_field, rename, rename, drop, twice, shuffle, swap, overlap, nothings, another_tensor,
    half, notes,
)  # fmt: skip
BYTE_EDITS: tuple[Mutation, ...] = (
    flip, flip, flip, overwrite, remove, repeat, cut, grow, length, number,
    header, header, header, header, header, header,
)  # fmt: skip


def _header_text(data: bytes) -> bytes:
    return data[8 : 8 + header_length(data)]
