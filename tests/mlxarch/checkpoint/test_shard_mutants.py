"""Thousands of mutated safetensors files: what the format's own library refuses must be refused here too.

Mutants are made from the structure of a header, not from its bytes: arithmetic holes need offsets that agree with
shapes, which random bytes do not hit.
"""

import json
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from mlxarch.checkpoint.safetensors_header import DTYPE_BYTES
from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError

MUTANTS = 5_000

# What only we refuse, by our message, and why.
STRICTER = {
    r"dtype '(F64|C64|F8_E5M2|F8_E4M3FNUZ|F8_E5M2FNUZ|F4|F6_E2M3|F6_E3M2)' is not supported": "no array library type",
    r"dtype \{'\w+': None\} is not supported": "the package's parser takes an object of one key for a name",
    r"dtype, shape and data_offsets alone": "it takes a list for an object, and ignores fields it does not know",
    r"is there twice": "it lets the last of equal keys win where their bytes agree",
    r"must start with \{": "it skips blanks",
    r"integers from 0 to 2147483647": "dimensions are 32-bit integers in the array library",
    r"at most 8 dimensions": "no weight has more",
    r"has more than \d+ elements": "it counts up to 2^64, we count up to 2^63",
    r"nests deeper than 8 levels": "in a field that it ignores",
}

Fields = list[
    tuple[str, str]
]  # name and value as JSON text: what json.dumps cannot say is said too
NUMBERS = """0 1 2 3 4 8 16 -1 -2 -0 1.0 4.7 1e0 1e400 NaN true null [] {} "4" 01 2147483647 2147483648 4294967295
    4294967296 4294967300 9223372036854775807 9223372036854775808 18446744073709551614 18446744073709551616"""
NAMES = r""" "t0" "\u0074\u0030" "" "[{[{" "\"}" "\\" "\ud83d\ude00" "\ud83d" "__metadata__" "\u005f_metadata__" "-0" t0
    't0' "\x41" """
BINARY_NAMES = ['"é\0"', '"\udcff"', '"a\tb"', '"\x7f\u2028"']
METADATA = r"""null [] {} {"a":"1","a":"2"} {"a":1} {"a":null} {"a":{}} {"":"\u0000"} {"a":"\udfff"} {"a":NaN} {"a":-0}
    "text" {"a":"\ud83d\ude00"} {"a":"b"},"__metadata__":{"a":"b"}"""
NOTES = r"""1 "x" NaN [[[[[[[[[[]]]]]]]]]] "\ud800" {}"""
SIZES = DTYPE_BYTES | {"F64": 8, "C64": 8, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
SHAPES_OF_NOTHING = [
    [0],
    [0, 2**31 - 1],
    [0, 2**31],
    [2**32, 2**32],
    [2**16] * 4,
    [2**30, 2**30, 8, 0],
    [2**63, 2],
]


class Mutant:
    """A header as text fragments, the data and the size prefix, all of which a mutation may change."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.entries: list[tuple[str, Fields]] = []
        end = 0
        for i in range(rng.randint(1, 5)):
            dtype = rng.choice(list(DTYPE_BYTES))
            shape = [
                rng.choice([0, 1, 1, 2, 3, 4, 7]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 8]))
            ]
            start, end = end, end + DTYPE_BYTES[dtype] * int(np.prod(shape, dtype=int))
            self.entries.append((f'"t{i}"', self.fields(dtype, shape, start, end)))
        self.data = rng.randbytes(end)
        self.head, self.tail = "", ""
        self.metadata = rng.choice(["", "", '"__metadata__":{"format":"mlx"}', '"__metadata__":{}'])
        self.grow = 0

    @staticmethod
    def fields(dtype: str, shape: list[int], start: int, end: int) -> Fields:
        return [
            ("dtype", f'"{dtype}"'),
            ("shape", json.dumps(shape)),
            ("data_offsets", f"[{start},{end}]"),
        ]

    def entry(self) -> tuple[int, str, Fields]:
        i = self.rng.randrange(len(self.entries))
        return i, *self.entries[i]

    def change(self, field: str, change) -> None:
        """Replace the JSON text of one field of one tensor by ``change(text)``."""
        _, _, fields = self.entry()
        for i, (name, text) in enumerate(fields):
            if name == field:
                fields[i] = name, change(text)

    def file(self) -> bytes:
        entries = []
        for name, fields in self.entries:
            text = ",".join(f'"{field}":{value}' for field, value in fields)
            entries.append(f"{name}:{{{text}}}")
        middle = self.rng.randint(0, len(entries))
        entries[middle:middle] = [self.metadata] if self.metadata else []
        text = f"{self.head}{{{','.join(entries)}}}{self.tail}".encode("utf-8", "surrogateescape")
        return struct.pack("<Q", max(0, len(text) + self.grow) % 2**64) + text + self.data


def number(m: Mutant) -> None:
    value, count = m.rng.choice([*NUMBERS.split(), "9" * 25, "9" * 5000]), m.rng.randint(1, 2)
    m.change(
        m.rng.choice(["shape", "data_offsets"]),
        lambda text: re.sub(r"\d+", value, text, count=count),
    )


def nudge(m: Mutant) -> None:
    step, count = m.rng.choice([-8, -4, -1, 1, 4, 8]), m.rng.randint(1, 2)

    def moved(digits: re.Match) -> str:
        return str(int(digits[0]) + step)

    m.change("data_offsets", lambda text: re.sub(r"\d{1,19}", moved, text, count=count))


def dimension(m: Mutant) -> None:
    extra = m.rng.choice(["1", "1,1", "0", "2", "1," * 5 + "1", "1," * 8 + "1", "true", "1.0"])
    m.change(
        "shape", lambda text: text.replace("[", f"[{extra}," if text != "[]" else f"[{extra}", 1)
    )


def nothing(m: Mutant) -> None:
    """A tensor of no bytes at the end, whose product is zero, or zero modulo 2^64."""
    end = len(m.data)
    m.entries.append(
        ('"empty"', m.fields(m.rng.choice(list(SIZES)), m.rng.choice(SHAPES_OF_NOTHING), end, end))
    )


def wrap(m: Mutant) -> None:
    """A shape whose byte count equals the offsets' modulo 2^64."""
    m.change("shape", lambda text: "[4,5,429509837,2147418113]")
    m.change(
        "data_offsets", lambda text: text.replace("]", "").split(",")[0] + ",18446744073709551620]"
    )


def swap(m: Mutant) -> None:
    i, _, a = m.entry()
    j, _, b = m.entry()
    a[-1], b[-1] = b[-1], a[-1]


def share(m: Mutant) -> None:
    _, _, a = m.entry()
    m.entries.append(('"again"', list(a)))


def dtype(m: Mutant) -> None:
    choices = [*SIZES, "F4", "F6_E2M3", "F6_E3M2", "f32", "U128", ""]
    name = json.dumps(m.rng.choice(choices))
    m.change(
        "dtype", lambda text: m.rng.choice([name, name, name, f"{{{text}:null}}", "null", "4"])
    )


def same_size_dtype(m: Mutant) -> None:
    def other(text: str) -> str:
        size = SIZES.get(text.strip('"'))
        return json.dumps(m.rng.choice([d for d in SIZES if SIZES[d] == size])) if size else text

    m.change("dtype", other)


def fields(m: Mutant) -> None:
    i, name, fields = m.entry()
    kind = m.rng.randrange(4)
    if kind == 0:
        m.rng.shuffle(fields)
    elif kind == 1:
        fields.pop()
    elif kind == 2:
        fields.append(m.rng.choice(fields))
    else:
        fields.append(
            (
                "note",
                m.rng.choice(
                    ["1", '"x"', "NaN", "9" * 5000, "[[[[[[[[[[]]]]]]]]]]", '"\\ud800"', "{}"]
                ),
            )
        )


def names(m: Mutant) -> None:
    i, _, fields = m.entry()
    m.entries[i] = m.rng.choice(NAMES.split() + BINARY_NAMES), fields


def metadata(m: Mutant) -> None:
    m.metadata = '"__metadata__":' + m.rng.choice(METADATA.split())


def blanks(m: Mutant) -> None:
    m.change(
        m.rng.choice(["dtype", "shape", "data_offsets"]),
        lambda text: m.rng.choice(" \n\t\r\v\f\0") + text + " ",
    )


def ends(m: Mutant) -> None:
    m.head = m.rng.choice(["", "", "", " ", "\n", "\ufeff", "[", "//\n"])
    m.tail = m.rng.choice([" " * 8, "\n", "\t\r\n ", "\0\0", "{}", ",", "x", "\f", " x"])


def data(m: Mutant) -> None:
    m.data = m.rng.choice(
        [m.data[:-1], m.data + b"\0", m.data + b"PK\3\4", b"", m.data[1:] + b"\0"]
    )


def size(m: Mutant) -> None:
    m.grow = m.rng.choice([-1, 1, 7, 8, -8, -(10**9), 10**8, 2**31, 2**63, 2**64 - 200])


MUTATIONS = [
    number,
    number,
    number,
    nudge,
    dimension,
    nothing,
    wrap,
    swap,
    share,
    dtype,
    same_size_dtype,
    fields,
]
MUTATIONS += [names, metadata, blanks, ends, data, size]


def mutant(seed: int) -> bytes:
    rng = random.Random(seed)
    made = Mutant(rng)
    for mutate in rng.choices(MUTATIONS, k=rng.choice([0, 1, 1, 1, 2, 2, 3])):
        mutate(made)
    file = bytearray(made.file())
    if rng.random() < 0.05 and len(file) > 8:  # and now and then a byte of the header
        file[rng.randrange(8, min(len(file), 200))] = rng.choice(b'"{}[]:,0-1 \\\0\xff')
    return bytes(file)


def ours(path: Path) -> dict[str, tuple] | str:
    """Contents of the file, or the reason of its refusal."""
    try:
        with Shard.open(path) as shard:
            held = {}
            for name, info in shard.tensors.items():
                data = bytearray(info.nbytes)
                shard.read_into(info, data)
                held[name] = info.dtype, list(info.shape), bytes(data)
            return held
    except CheckpointError as refusal:
        return str(refusal)


def theirs(file: bytes) -> dict[str, tuple] | None:
    try:
        return {
            name: (of["dtype"], of["shape"], bytes(of["data"])) for name, of in deserialize(file)
        }
    except SafetensorError:
        return None


@pytest.fixture(scope="module")
def accepted(tmp_path_factory) -> list[Path]:
    """The mutants that are accepted, after every mutant has been compared with the safetensors package."""
    folder = tmp_path_factory.mktemp("mutants")
    kept, reasons, refused = [], Counter(), 0
    for seed in range(MUTANTS):
        path = folder / f"{seed}.safetensors"
        file = mutant(seed)
        path.write_bytes(file)
        mine, reference = ours(path), theirs(file)
        if isinstance(mine, str):
            refused += 1
            path.unlink()
            if reference is not None:
                reason = next((pattern for pattern in STRICTER if re.search(pattern, mine)), None)
                assert reason, (
                    f"seed {seed}: refused by us alone, for a reason that is not listed: {mine}"
                )
                reasons[reason] += 1
        else:
            assert reference is not None, f"seed {seed}: accepted by us alone: {file[:500]!r}"
            assert mine == reference, f"seed {seed}: read differently"
            kept.append(path)
    assert not STRICTER.keys() - reasons.keys(), "listed, and met by no mutant"
    assert refused > MUTANTS // 4
    return kept


def test_no_mutant_is_accepted_that_the_format_refuses(accepted):
    assert len(accepted) > MUTANTS // 4


CHILD = """
import json, sys
import mlx.core as mx
import numpy as np
from mlxarch.checkpoint.shards import Shard
files = tensors = 0
for path in sys.stdin.read().split():
    with Shard.open(path) as shard:
        arrays = mx.load(path)
        assert arrays.keys() == shard.tensors.keys(), path
        mx.eval(arrays)
        for name, info in shard.tensors.items():
            assert arrays[name].shape == info.shape, (path, name)
            bits = np.array(arrays[name].reshape(-1).view(mx.uint8)) if info.nbytes else np.zeros(0, np.uint8)
            held = np.fromfile(path, np.uint8, count=info.nbytes, offset=info.start)
            assert np.array_equal(bits, held), (path, name)
            tensors += 1
    files += 1
print(files, tensors)
"""


def test_what_is_accepted_neither_crashes_mlx_nor_reads_differently(accepted):
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\n".join(map(str, accepted)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files, tensors = map(int, done.stdout.split())
    assert files == len(accepted)
    assert tensors > files


def test_the_comparison_in_the_child_can_fail(tmp_path):
    header = b'{"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1\2")
    child = CHILD.replace("offset=info.start", "offset=info.start - 1")
    done = subprocess.run(
        [sys.executable, "-c", child], input=str(path), capture_output=True, text=True, timeout=60
    )
    assert "AssertionError" in done.stderr
