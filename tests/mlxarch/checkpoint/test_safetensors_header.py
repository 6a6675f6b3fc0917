"""Hostile safetensors files, one by one: what is refused, with which words, and what the format's own library says."""

import json
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError

REMEDY = re.compile(
    r"\. (The file is damaged .*: download it again, or make it again .*|To use it, \w.*)\.$"
)


def tensor(
    dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4), **extra: Any
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


def raw(
    shape: str = "[4]",
    offsets: str = "[0,4]",
    dtype: str = '"U8"',
    name: str = '"w"',
    after: str = "",
) -> bytes:
    return (
        f'{{{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}{after}}}'.encode()
    )


def safetensors(
    header: bytes | dict[str, Any], data: bytes = b"", size: int | None = None
) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@dataclass
class Hostile:
    name: str
    file: bytes | Callable[[], bytes]  # large ones are built when they are needed
    rule: str  # a part of the message
    tensor: str | None = None  # the one at fault
    stricter: bool = False  # the safetensors package accepts it
    hole: int = 0  # sparse bytes after the file


def two(first: Any, second: Any, data: int, **names: Any) -> bytes:
    return safetensors({"a": first, "b": second, **names}, bytes(data))


def copies(nbytes: int) -> bytes:
    one = tensor(shape=[nbytes], offsets=(0, nbytes))
    return safetensors({f"t{i}": one for i in range(20_000)}, bytes(nbytes))


def many() -> bytes:
    return safetensors(
        {f"t{i}": tensor(shape=[300], offsets=(300 * i, 300 * i + 300)) for i in range(200_001)}
    )


W = "'w'"
FOUR = b"\1\2\3\4"
MIB = 1 << 20
DEEP = 3 * 200_000
AGAIN = ',"\\u0077":' + raw("[4]", "[4,8]")[5:-1].decode()  # the same name, escaped
TWO_METADATA = b'{"__metadata__":{},"__metadata__":{}}'
METADATA_TWICE = b'{"__metadata__":{"a":"1","a":"2"}}'
F64 = safetensors({"w": tensor("F64", [1], [0, 8])}, bytes(8))
FRACTIONS = safetensors(raw("[4.7]", "[0.9,16.2]", '"F32"'), bytes(16))
WRAPPING = safetensors(raw(offsets="[18446744073709551608,18446744073709551612]"), FOUR)

HOSTILE = [
    # The size of the header.
    Hostile("empty file", b"", "0 bytes"),
    Hostile("3 bytes", b"\1\2\3", "3 bytes"),
    Hostile("header of 0 bytes", safetensors(b""), "starts with"),
    Hostile("header of 0 bytes before data", safetensors(b"", FOUR), "starts with"),
    Hostile("header longer than the file", safetensors(b"{}", size=3), "claims 3 bytes"),
    Hostile("header claims 1e8", safetensors(b"{}", size=10**8), "claims 100000000 bytes"),
    Hostile("header claims 2^63", safetensors(b"{}", size=2**63), "claims 9223372036854775808"),
    Hostile("header claims 2^64-1", safetensors(b"{}", size=2**64 - 1), "claims 18446744073709551615"),
    Hostile("header above 100 MB", safetensors(b"{}", size=10**8 + 1), "at most 100000000", hole=5 * 10**8),
    Hostile("header cut by one", safetensors(raw(), FOUR, size=len(raw()) - 1), "not JSON"),
    Hostile("header is most of a large file", safetensors(raw() + b" " * 2 * MIB, FOUR), "a quarter", stricter=True),
    # The text of the header.
    Hostile("not JSON", safetensors(b"{hello", FOUR), "not JSON"),
    Hostile("array", safetensors(b"[]", FOUR), "must start with {"),
    Hostile("number", safetensors(b"1"), "must start with {"),
    Hostile("byte order mark", safetensors(b"\xef\xbb\xbf{}"), "must start with {"),
    Hostile("blank before the object", safetensors(b" {}"), "must start with {", stricter=True),
    Hostile("UTF-16", safetensors("{}".encode("utf-16-le")), "not JSON"),
    Hostile("bad UTF-8", safetensors(raw(name='"w"').replace(b"w", b"\xff"), FOUR), "not JSON in UTF-8"),
    Hostile("overlong UTF-8", safetensors(raw().replace(b'"w"', b'"\xc1\xb7"'), FOUR), "not JSON in UTF-8"),
    Hostile("lone surrogate in a name", safetensors(raw(name='"\\ud800"'), FOUR), "surrogates not allowed"),
    Hostile("lone surrogate in metadata", safetensors(b'{"__metadata__":{"a":"\\udc00"}}'), "surrogates not"),
    Hostile("control character in a name", safetensors(raw(name='"w\n"'), FOUR), "Invalid control character"),
    Hostile("truncated JSON", safetensors(raw()[:-1], FOUR), "not JSON"),
    Hostile("trailing comma", safetensors(raw(after=","), FOUR), "not JSON"),
    Hostile("comment", safetensors(raw() + b"// me", FOUR), "not JSON"),
    Hostile("two objects", safetensors(raw() + b"{}", FOUR), "not JSON"),
    Hostile("NULs and junk after the object", safetensors(raw() + b"\0\0junk", FOUR), "not JSON"),
    Hostile("form feed after the object", safetensors(raw() + b"\f", FOUR), "not JSON"),
    Hostile("200 thousand brackets", safetensors(b'{"w":' + b"[" * 200_000), "nests deeper", hole=DEEP),
    Hostile("nine levels", safetensors(b'{"w":' + b"[" * 8 + b"]" * 8 + b"}"), "nests deeper than 8 levels"),
    Hostile("20 million brackets", lambda: safetensors(b'{"w":' + b"[" * 20_000_000), "more than", hole=61_000_000),
    Hostile("3 million entries", lambda: safetensors(b"{" + b'"a":{},' * 3_000_000), "more than", hole=64_000_000),
    # Keys.
    Hostile("duplicate tensor", safetensors(raw(after="," + raw()[1:-1].decode()), FOUR), "twice", W, stricter=True),
    Hostile("duplicate tensor with bytes of its own", safetensors(raw(after=AGAIN), FOUR * 2), "twice", W),
    Hostile("duplicate field", safetensors(raw(dtype='"U8","dtype":"U8"'), FOUR), "'dtype' is there twice"),
    Hostile("duplicate metadata", safetensors(TWO_METADATA), "'__metadata__' is there twice"),
    Hostile("duplicate key in metadata", safetensors(METADATA_TWICE), "'a' is there twice", stricter=True),
    Hostile("metadata is a list", safetensors({"__metadata__": []}), "must map text to text"),
    Hostile("metadata holds a number", safetensors({"__metadata__": {"a": 1}}), "must map text to text"),
    Hostile("metadata holds an object", safetensors({"__metadata__": {"a": {}}}), "must map text to text"),
    Hostile("metadata holds NaN", safetensors(b'{"__metadata__":{"a":NaN}}'), "must map text to text"),
    # Entries.
    Hostile("entry is null", safetensors({"w": None}), "must be an object", W),
    Hostile("entry is text", safetensors({"w": "U8"}), "must be an object", W),
    Hostile("entry is a list", safetensors(b'{"w":["U8",[4],[0,4]]}', FOUR), "must be an object", W, stricter=True),
    Hostile("no dtype", safetensors({"w": {"shape": [4], "data_offsets": [0, 4]}}, FOUR), "must be an object", W),
    Hostile("no shape", safetensors({"w": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR), "must be an object", W),
    Hostile("no offsets", safetensors({"w": {"dtype": "U8", "shape": [4]}}, FOUR), "must be an object", W),
    Hostile("unknown field", safetensors({"w": tensor(code="x")}, FOUR), "alone", W, stricter=True),
    # dtype.
    Hostile("unknown dtype", safetensors({"w": tensor("U9")}, FOUR), "dtype 'U9' is not supported; known: BOOL", W),
    Hostile("lower case dtype", safetensors({"w": tensor("u8")}, FOUR), "dtype 'u8'", W),
    Hostile("dtype is a number", safetensors(raw(dtype="8"), FOUR), "dtype 8", W),
    Hostile("dtype is an object", safetensors(raw(dtype='{"U8":null}'), FOUR), "dtype {'U8': None}", W, stricter=True),
    Hostile("F64", F64, "convert the tensor to F32", W, stricter=True),
    Hostile("C64", safetensors({"w": tensor("C64", [1], [0, 8])}, bytes(8)), "imaginary part", W, stricter=True),
    Hostile("F8_E5M2", safetensors({"w": tensor("F8_E5M2")}, FOUR), "convert the tensor to BF16", W, stricter=True),
    Hostile("F4", safetensors({"w": tensor("F4", [8])}, FOUR), "packed into U8", W, stricter=True),
    Hostile("F6", safetensors({"w": tensor("F6_E2M3", [4], [0, 3])}, FOUR[:3]), "not supported", W, stricter=True),
    # Shapes.
    Hostile("shape is null", safetensors(raw("null"), FOUR), "must be a list", W),
    Hostile("shape is text", safetensors(raw('"4"'), FOUR), "must be a list", W),
    Hostile("dimension is true", safetensors(raw("[true,4]"), FOUR), "integers from 0", W),
    Hostile("dimension is text", safetensors(raw('["4"]'), FOUR), "integers from 0", W),
    Hostile("dimension is a list", safetensors(raw("[[4]]"), FOUR), "integers from 0", W),
    Hostile("dimension 4.0", safetensors(raw("[4.0]"), FOUR), "integers from 0", W),
    Hostile("dimension 4e0", safetensors(raw("[4e0]"), FOUR), "integers from 0", W),
    Hostile("dimension 1e400", safetensors(raw("[1e400]"), FOUR), "integers from 0", W),
    Hostile("dimension 4.7, offsets 0.9 and 16.2", FRACTIONS, "integers", W),
    Hostile("dimension -0", safetensors(raw("[-0]", "[0,0]")), "integers from 0", W),
    Hostile("dimensions -2, -2", safetensors(raw("[-2,-2]"), FOUR), "[-2, -2] holds something else than integers", W),
    Hostile("dimension -1 of F16", safetensors(raw("[-1]", "[0,18446744073709551614]", '"F16"')), "integers from 0", W),
    Hostile("dimension NaN", safetensors(raw("[NaN]"), FOUR), "integers from 0", W),
    Hostile("dimension 2^32+4", safetensors(raw("[4294967300]"), FOUR), "to 2147483647", W),
    Hostile("dimension 2^31 of nothing", safetensors(raw("[0,2147483648]", "[0,0]")), "2147483647", W, stricter=True),
    Hostile("dimension of 5000 digits", safetensors(raw(f"[{'9' * 5000}]"), FOUR), "thousands of digits"),
    Hostile("product is 2^64", safetensors(raw("[65536,65536,65536,65536]", "[0,0]", '"F32"')), "elements", W),
    Hostile("product is 2^64+4", safetensors(raw("[4,5,429509837,2147418113]"), FOUR), "elements", W),
    Hostile("product overflows before 0", safetensors(raw("[2147483647,2147483647,8,0]", "[0,0]")), "elements", W),
    Hostile("product is 2^63 before 0", safetensors(raw("[1073741824,1073741824,8,0]", "[0,0]")), "elements", W, True),
    Hostile("9 dimensions", safetensors({"w": tensor(shape=[4] + [1] * 8)}, FOUR), "at most 8", W, stricter=True),
    Hostile("5000 dimensions", safetensors({"w": tensor(shape=[4] + [1] * 4999)}, FOUR), "at most 8", W, stricter=True),
    # Offsets.
    Hostile("offsets are null", safetensors(raw(offsets="null"), FOUR), "must be two integers", W),
    Hostile("one offset", safetensors(raw(offsets="[4]"), FOUR), "must be two integers", W),
    Hostile("three offsets", safetensors(raw(offsets="[0,4,8]"), FOUR), "must be two integers", W),
    Hostile("offset is true", safetensors(raw("[1]", "[0,true]"), FOUR[:1]), "must be two integers", W),
    Hostile("offset -4", safetensors(raw(offsets="[-4,0]"), FOUR), "must be two integers", W),
    Hostile("offset -0", safetensors(raw(offsets="[-0,4]"), FOUR), "must be two integers", W),
    Hostile("begin after end", safetensors(raw(offsets="[4,0]"), FOUR), "do not decrease", W),
    Hostile("end past the file", safetensors(raw("[8]", "[0,8]"), FOUR), "exceed the 4 bytes of data", W),
    Hostile("offsets that wrap", WRAPPING, "exceed", W),
    Hostile("offset 2^64", safetensors(raw("[0]", "[18446744073709551616,18446744073709551616]")), "exceed", W),
    Hostile("data cut", safetensors(raw(), FOUR[:3]), "exceed the 3 bytes of data", W),
    Hostile("no data", safetensors(raw()), "exceed the 0 bytes of data", W),
    Hostile("dtype and size disagree", safetensors(raw(dtype='"F32"'), FOUR), "F32 of shape [4] needs 16", W),
    Hostile("shape and size disagree", safetensors(raw("[3]"), FOUR), "U8 of shape [3] needs 3", W),
    # Cover.
    Hostile("same bytes twice", two(tensor(), tensor(), 4), "overlap", "'b'"),
    Hostile("partial overlap", two(tensor(), tensor(offsets=(2, 6)), 6), "overlap", "'b'"),
    Hostile("empty tensor inside another", two(tensor(), tensor(shape=[0], offsets=(2, 2)), 4), "overlap", "'b'"),
    Hostile("hole", two(tensor(), tensor(offsets=(8, 12)), 12), "leave a hole", "'b'"),
    Hostile("hole at the start", safetensors({"w": tensor(offsets=(4, 8))}, FOUR * 2), "leave a hole", W),
    Hostile("trailing archive", safetensors(raw(), FOUR + b"PK\3\4" + bytes(406)), "410 bytes follow"),
    Hostile("data of no tensor", safetensors(b"{}", FOUR), "4 bytes follow"),
    Hostile("20,000 tensors over the same 4 MiB", lambda: copies(4 * MIB), "a quarter"),
    Hostile("20,000 tensors over the same 8 MiB", lambda: copies(8 * MIB), "overlap", "'t1'"),
    Hostile("200,001 tensors", many, "at most 200000", stricter=True, hole=200_001 * 300),
]  # fmt: skip


def written(folder: Path, file: bytes | Callable[[], bytes], hole: int = 0) -> Path:
    path = folder / "model.safetensors"
    content = file if isinstance(file, bytes) else file()
    with path.open("wb") as f:
        f.write(content)
        f.truncate(len(content) + hole)
    return path


def accepted_by_the_format(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


def test_the_table_is_complete():
    assert len(HOSTILE) >= 62 + 30
    assert len({case.name for case in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_a_hostile_file_is_refused_with_file_tensor_rule_and_remedy(case, tmp_path):
    path = written(tmp_path, case.file, case.hole)
    with pytest.raises(CheckpointError) as refusal:
        Shard.open(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert case.rule in message
    assert REMEDY.search(message)
    assert len(message) < 1000
    if case.tensor:
        assert case.tensor in message
    assert accepted_by_the_format(path) == case.stricter, (
        "the list of what only we refuse is out of date"
    )


VALID = {
    "no tensors": ({}, b""),
    "scalar": ({"w": tensor("F32", [], (0, 4))}, FOUR),
    "empty tensor": ({"w": tensor("F32", [0, 7], (0, 0))}, b""),
    "empty tensors around another": (
        {"a": tensor(shape=[0], offsets=(0, 0)), "w": tensor(), "z": tensor(shape=[3, 0], offsets=(4, 4))},
        FOUR,
    ),
    "misaligned": ({"a": tensor(shape=[3], offsets=(0, 3)), "w": tensor("F32", [2], (3, 11))}, bytes(range(11))),
    "another order than the data": ({"b": tensor(offsets=(4, 8)), "a": tensor()}, bytes(range(8))),
    "metadata": ({"w": tensor(), "__metadata__": {"format": "mlx", "": "…"}}, FOUR),
    "no metadata, as MLX writes it": ({"w": tensor(), "__metadata__": None}, FOUR),
    "8 dimensions": ({"w": tensor(shape=[1, 2, 1, 2, 1, 1, 1, 1])}, FOUR),
    "names": (
        {name: tensor(shape=[1], offsets=(i, i + 1)) for i, name in enumerate(["", "ü\0", "\U0001f600[{", "-0"])},
        FOUR,
    ),
    "NaN, infinity and a BOOL of 255": (
        {"a": tensor("F32", [2], (0, 8)), "b": tensor("BOOL", [1], (8, 9))},
        np.array([np.nan, np.inf], "<f4").tobytes() + b"\xff",
    ),
}  # fmt: skip
VALID |= {
    dtype: ({"w": tensor(dtype, [3], (0, 3 * size))}, bytes(range(3 * size)))
    for size, dtypes in {
        1: "BOOL U8 I8 F8_E4M3 F8_E8M0",
        2: "I16 U16 F16 BF16",
        4: "I32 U32 F32",
        8: "I64 U64",
    }.items()
    for dtype in dtypes.split()
}


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("pad", [b"", b" " * 7, b"\n\t\r "], ids=["tight", "padded", "blanks"])
def test_a_valid_file_is_accepted_and_read(name, pad, tmp_path):
    header, data = VALID[name]
    path = written(tmp_path, safetensors(json.dumps(header).encode() + pad, data))
    assert accepted_by_the_format(path)
    with Shard.open(path) as shard:
        assert shard.metadata == (header.get("__metadata__") or {})
        assert shard.tensors.keys() == header.keys() - {"__metadata__"}
        assert shard.size == path.stat().st_size
        for info in shard.tensors.values():
            entry = header[info.name]
            begin, end = entry["data_offsets"]
            assert (info.dtype, info.shape) == (entry["dtype"], tuple(entry["shape"]))
            buffer = bytearray(info.nbytes)
            shard.read_into(info, buffer)
            assert buffer == data[begin:end]
        starts = [info.start for info in shard.tensors.values()]
        assert starts == sorted(starts)


def test_brackets_and_escapes_in_names_are_not_structure(tmp_path):
    name = '[[[[[[[[[[[[{{{{\\"[\\\\'
    path = written(tmp_path, safetensors({name: tensor()}, FOUR))
    with Shard.open(path) as shard:
        assert list(shard.tensors) == [name]


def test_a_gigabyte_of_data_is_not_read(tmp_path):
    path = written(
        tmp_path, safetensors({"w": tensor("F32", [1 << 28], (0, 1 << 30))}), hole=1 << 30
    )
    with Shard.open(path) as shard:
        assert shard.tensors["w"].nbytes == 1 << 30


def test_a_long_hostile_name_is_cut_and_escaped_in_the_message(tmp_path):
    name = "\x1b[31m\u202e" + "x" * 100_000
    with pytest.raises(CheckpointError) as refusal:
        Shard.open(written(tmp_path, safetensors({name: tensor("F64")}, FOUR)))
    assert len(str(refusal.value)) < 700
    assert "\\x1b[31m\\u202exxx" in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_ten_thousand_tensors_validate_in_a_moment(tmp_path):
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    entries = (tensor("BF16", [64, 64], (8192 * i, 8192 * i + 8192)) for i in range(10_000))
    header = {name.format(i // 384, i % 384): entry for i, entry in enumerate(entries)}
    path = written(tmp_path, safetensors(header), hole=10_000 * 8192)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        with Shard.open(path) as shard:
            seconds.append(time.process_time() - start)
            assert len(shard.tensors) == 10_000
    assert min(seconds) < 0.25  # 0.05 s on an idle core
