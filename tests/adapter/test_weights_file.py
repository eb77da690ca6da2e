"""The header of a stranger's file: what is no whole safetensors file is one line, quickly, and costs no memory."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.adapter.weights_file import DTYPES, MOST_TENSORS, open_weights
from lorafit.errors import AdapterError
from lorafit.files import write_tensors

Header = dict[str, Any]
A: Header = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
JSON_A = json.dumps(A).encode()


def write(path: Path, header: Any, values: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


# --- what is read ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc.XYZ_-/:", min_size=1, max_size=12), st.lists(st.integers(0, 4), max_size=4), max_size=6
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]),
    note=st.text(max_size=20),
)
def test_what_is_written_is_read(
    shapes: dict[str, list[int]], dtype: torch.dtype, note: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {name: (100 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    write_tensors(path, tensors, {"note": note})
    with open_weights(path) as file:
        assert file.metadata == {"format": "pt", "note": note}
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert file.entries[name].shape == tuple(tensor.shape)
            assert torch.equal(file.read(file.entries[name]), tensor)


def test_every_type_is_what_safetensors_calls_so(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        data = bytes(range(dtype.itemsize))
        path = write(tmp_path / "a", {"x": {"dtype": name, "shape": [1], "data_offsets": [0, dtype.itemsize]}}, data)
        (theirs,) = safetensors.torch.load(path.read_bytes()).values()
        with open_weights(path) as file:
            ours = file.read(file.entries["x"])
        assert ours.dtype == theirs.dtype == dtype
        assert ours.view(torch.uint8).tolist() == theirs.view(torch.uint8).tolist() == list(data)


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "blob", {"a": A})
    (tmp_path / "link").symlink_to("blob")
    with open_weights(tmp_path / "link") as file:
        assert list(file.entries) == ["a"]


def test_the_tensors_are_of_the_file_that_was_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"a": A})
    with open_weights(path) as file:
        write(tmp_path / "b", {"a": A, "__metadata__": {"longer": "header"}}, b"\x7f" * 24)
        os.replace(tmp_path / "b", path)
        assert torch.equal(file.read(file.entries["a"]), torch.zeros(2, 3))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"a": A | {"shape": [6, 2**16], "data_offsets": [0, 24 * 2**16]}}, bytes(24 * 2**16))
    with open_weights(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(AdapterError, match="cut short while it was read"):
            file.read(file.entries["a"])


# --- what is refused ------------------------------------------------------------------------------


def entry(**changes: Any) -> Header:
    return {"a": A | changes}


HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{'a': 1}", "Expecting property name"),
    "no text": (b'{"\xff": 1}', "can't decode byte"),
    "UTF-16": (json.dumps({"a": A}).encode("utf-16"), "can't decode byte"),
    "a list": ([A], "no JSON object"),
    "a number": (b"7", "no JSON object"),
    "a tower": (b'{"a":' * 15_000, "recursion"),
    "a low tower": (b'{"a":' * 30 + b"1" + b"}" * 30, "nested deeper than 20 levels"),
    "one name twice": (b'{"a":%s,"a":%s}' % (JSON_A, JSON_A), "'a' stands there twice"),
    "one name twice in disguise": (b'{"a":%s,"\\u0061":%s}' % (JSON_A, JSON_A), "'a' stands there twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},"a":%s}' % JSON_A, "stands there twice"),
    "one shape twice": (json.dumps({"a": A}).replace("}}", ', "shape": [6]}}').encode(), "'shape' stands there twice"),
    "a list of metadata": ({"__metadata__": [], "a": A}, "its metadata are no texts"),
    "numbers as metadata": ({"__metadata__": {"format": 1}, "a": A}, "its metadata are no texts"),
    "no name": ({"": A}, "'' is no name of a tensor"),
    "a name of several lines": ({"a\nb": A}, r"'a\\nb' is no name of a tensor"),
    "a name that moves the cursor": ({"\x1b[2J": A}, r"'\\x1b\[2J' is no name of a tensor"),
    "a name that turns the line round": ({"\u202eabc": A}, r"is no name of a tensor"),
    "a long name": ({"a" * 501: A}, "is no name of a tensor"),
    "half a surrogate": (b'{"\\ud800":%s}' % JSON_A, r"'\\ud800' is no name"),
    "an entry that is a number": ({"a": 1}, "dtype, shape and data_offsets are expected, not 1"),
    "an entry too small": ({"a": {"dtype": "F32", "shape": [6]}}, "dtype, shape and data_offsets are expected"),
    "an entry too large": (entry(more=1), "dtype, shape and data_offsets are expected"),
    "an unknown dtype": (entry(dtype="F33"), "unknown dtype 'F33'"),
    "a dtype that is a list": (entry(dtype=["F32"]), r"unknown dtype \['F32'\]"),
    "a negative dimension": (entry(shape=[-2, -3]), "no shape and place"),
    "a dimension that is a fraction": (entry(shape=[2.0, 3]), "no shape and place"),
    "a dimension that is true": (entry(shape=[True, 6]), "no shape and place"),
    "a shape that is a number": (entry(shape=6), "no shape and place"),
    "too many dimensions": (entry(shape=[1] * 9, data_offsets=[0, 4]), "no shape and place"),
    "a dimension beyond everything": (entry(shape=[2**63]), "no shape and place"),
    "a product that overflows": (entry(shape=[2**62, 2**62]), "does not fill the bytes"),
    "another shape": (entry(shape=[2, 4]), "does not fill the bytes"),
    "another dtype": (entry(dtype="F16"), "does not fill the bytes"),
    "NaN as a place": (b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,NaN]}}', "no shape and place"),
    "a place with three ends": (entry(data_offsets=[0, 24, 24]), "no shape and place"),
    "a place that runs backwards": (entry(data_offsets=[24, 0]), "does not fill the bytes"),
    "a place before the values": (entry(data_offsets=[-24, 0]), "no shape and place"),
    "a place behind the file": (entry(data_offsets=[24, 48]), "begins at byte 24 instead of 0"),
    "two tensors in one place": ({"a": A, "b": A}, "begins at byte 0 instead of 24"),
    "a hole": ({"a": A | {"shape": [2], "data_offsets": [16, 24]}}, "begins at byte 16 instead of 0"),
    "bytes behind the last tensor": (entry(shape=[2, 2], data_offsets=[0, 16]), "have 16 bytes, the file holds 24"),
    "a terabyte": (entry(shape=[2**38], data_offsets=[0, 2**40]), "have 1,099,511,627,776 bytes, the file holds 24"),
    "a number of many digits": (b'{"a":%s}' % (b"9" * 5000), "not a readable safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_does_not_hold_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    header, words = HEADERS[case]
    with pytest.raises(AdapterError, match=words) as caught, open_weights(write(tmp_path / "a", header)):
        pass
    assert "a: not a readable safetensors file" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("length", range(9))
def test_a_file_too_short_for_a_length_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(length))
    with pytest.raises(AdapterError, match="not a readable safetensors file"), open_weights(tmp_path / "a"):
        pass


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [folder, pipe, broken_link, link_to_itself, device])
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"no a\.safetensors here"), open_weights(tmp_path / "a.safetensors"):
        pass


def a_terabyte_of_nothing(path: Path) -> None:
    write(path, {"a": A}, b"")
    os.truncate(path, 2**40)


def a_header_of_a_terabyte(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little"))
    os.truncate(path, 2**41)


def a_quarter_million_tensors(path: Path) -> None:
    one = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(one % number for number in range(250_000)) + b"}"
    write(path, text, b"")


def one_tensor_too_many(path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write(path, {str(number): empty for number in range(MOST_TENSORS + 1)}, b"")


def lists_upon_lists(path: Path) -> None:
    write(path, b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", b"")


def a_number_of_millions_of_digits(path: Path) -> None:
    write(path, b'{"a":' + b"9" * 15_000_000 + b"}", b"")


@pytest.mark.parametrize(
    "make",
    [
        a_terabyte_of_nothing, a_header_of_a_terabyte, a_quarter_million_tensors, one_tensor_too_many,
        lists_upon_lists, a_number_of_millions_of_digits,
    ],
)  # fmt: skip
def test_no_file_takes_memory_without_end(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        with pytest.raises(AdapterError, match="not a readable safetensors file"), open_weights(tmp_path / "a"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
