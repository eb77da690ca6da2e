"""A stranger's safetensors file, read with nothing believed: first the header, and only then the tensors asked for.

    8 bytes: length of the header | JSON: {name: dtype, shape, place} | the values, end to end

Names, shapes and types come from the header alone, so that a file is refused before anything is allocated for it.
The limits are above what adapters need (three matrices in each of 256 experts of 58 layers make 89,000 tensors) and
keep the cost of refusing any file to about a second and a hundred megabytes.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorafit.adapter.untrusted import explained, open_file, parse, plain, shown
from lorafit.errors import AdapterError

LONGEST_HEADER = 16 * 2**20
MOST_TENSORS = 100_000
NAME = re.compile(r"[!-~]{1,500}")  # printable ASCII without blanks
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the header says about one tensor; `begin` and `end` count bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """An open file whose header has been checked from end to end."""

    path: Path
    handle: BinaryIO
    start: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, entry: Entry) -> Tensor:
        """The values of one tensor."""
        values = torch.empty(entry.shape, dtype=entry.dtype)
        if values.numel():
            self.handle.seek(self.start + entry.begin)
            memory: Any = values.view(-1).view(torch.uint8).numpy()
            if self.handle.readinto(memory) != values.nbytes:  # type: ignore[attr-defined]
                raise AdapterError(f"{self.path}: cut short while it was read: try again")
        return values


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """The file with its header read and checked; AdapterError in one line if it is no whole safetensors file."""
    with open_file(path) as handle:
        with explained(path, "a readable safetensors file"):
            start, entries, metadata = _header(handle)
        yield WeightsFile(path, handle, start, entries, metadata)


def _header(handle: BinaryIO) -> tuple[int, dict[str, Entry], dict[str, str]]:
    """Where the values start, the tensors, and the texts kept with them."""
    size = os.fstat(handle.fileno()).st_size
    length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header should have {length:,} bytes, the file has {size:,}")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes; the limit is {LONGEST_HEADER:,}")
    text = handle.read(length)
    if sum(map(text.count, (b"{", b"[", b","))) > 12 * MOST_TENSORS:  # eight a tensor; counted before they are objects
        raise ValueError(f"more than {MOST_TENSORS:,} tensors")
    header = parse(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"more than {MOST_TENSORS:,} tensors")
    entries = {name: _entry(name, raw) for name, raw in header.items()}
    _check_places(entries, size - 8 - length)
    return 8 + length, entries, metadata


def _entry(name: str, raw: Any) -> Entry:
    if not NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{plain(name)}: dtype, shape and data_offsets are expected, not {shown(raw)}")
    dtype, shape, place = (raw[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{plain(name)}: unknown dtype {shown(dtype)}")
    if not _numbers(shape) or len(shape) > 8 or not _numbers(place) or len(place) != 2:
        raise ValueError(f"{plain(name)}: no shape and place are {shown(shape)} and {shown(place)}")
    entry = Entry(DTYPES[dtype], tuple(shape), *place)
    if entry.end - entry.begin != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{plain(name)}: {shown(shape)} of {dtype} does not fill the bytes {shown(place)}")
    return entry


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
    """The tensors lie end to end and fill the file: nothing is read twice, nothing is hidden between them."""
    place = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != place:
            raise ValueError(f"a tensor begins at byte {entry.begin:,} instead of {place:,}")
        place = entry.end
    if place != size:
        raise ValueError(f"its tensors have {place:,} bytes, the file holds {size:,} for them")
