"""Hostile GGUF files: refused with a message that names the file and the rule, or read as the package reads them."""

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from house import THOROUGH

from mlxarch.checkpoint.gguf import header as gguf_header
from mlxarch.checkpoint.gguf.config import huggingface_name
from mlxarch.checkpoint.gguf.reader import GGUFFile
from mlxarch.checkpoint.gguf.source import open_gguf
from mlxarch.errors import CheckpointError, MlxArchError

MUTANTS = 5000 if THOROUGH else 2000
U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, data: bytes) -> bytes:
    return u32(kind) + u64(count) + data


def info(
    name: bytes = b"t",
    dims: tuple[int, ...] = (32, 2),
    kind: int = 0,
    offset: int = 0,
    rank: int | None = None,
):
    rank = len(dims) if rank is None else rank
    return text(name) + u32(rank) + struct.pack(f"<{len(dims)}Q", *dims) + u32(kind) + u64(offset)


def build(
    pairs: tuple[bytes, ...] = (pair(b"a", STRING, text(b"b")),),
    infos: tuple[bytes, ...] = (info(),),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
    alignment: int = 32,
    data: int = 256,
) -> bytes:
    counts = u64(len(infos) if tensors is None else tensors) + u64(
        len(pairs) if keys is None else keys
    )
    header = magic + u32(version) + counts + b"".join(pairs) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + bytes(range(256))[:data]


def aligned(value: bytes, kind: int = U32) -> bytes:
    return pair(b"general.alignment", kind, value)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends inside the magic number"),
    "three bytes": (b"GGU", "ends inside the magic number"),
    "another magic": (build(magic=b"GGML"), "this is no GGUF file"),
    "magic alone": (b"GGUF", "ends inside the version"),
    "version 1": (build(version=1), "has GGUF version 1;"),
    "version 99": (build(version=99), "has GGUF version 99;"),
    "big endian": (build(version=3 << 24), "in big-endian order"),
    "no counts": (b"GGUF" + u32(3), "ends inside the tensor count"),
    "tensor count 2^64-1": (build(tensors=2**64 - 1), "declares 18446744073709551615 tensors"),
    "tensor count too large": (
        build(tensors=9, data=0, alignment=1),
        "ends inside the name of tensor 1",
    ),
    "key count 2^64-1": (build(keys=2**64 - 1), "declares 18446744073709551615 metadata keys"),
    "key count 2^40": (build(keys=2**40), "metadata keys; the limit"),
    "key length 2^40": (build((u64(2**40) + b"a",)), "is 1099511627776 bytes long; the limit"),
    "key length 2^64-1": (build((u64(2**64 - 1) + b"a",)), "bytes long; the limit"),
    "key cut off": (build((u64(200) + b"a",), data=0), "ends inside metadata key 0"),
    "empty key": (build((pair(b"", U8, b"\0"),)), "must be printable text"),
    "key with NUL": (build((pair(b"a\0b", U8, b"\0"),)), "must be printable text"),
    "key not UTF-8": (build((pair(b"\xff\xfe", U8, b"\0"),)), "is not UTF-8"),
    "key twice": (build((pair(b"a", U8, b"\0"),) * 2), "'a' occurs twice"),
    "value type 13": (build((pair(b"a", 13, b"\0"),)), "has the value type 13"),
    "value type 2^32-1": (build((pair(b"a", 2**32 - 1, b"\0"),)), "has the value type 4294967295"),
    "bool 2": (build((pair(b"a", BOOL, b"\2"),)), "boolean of value 2"),
    "string length 2^40": (build((pair(b"a", STRING, u64(2**40)),)), "is 1099511627776 bytes long"),
    "string length wraps": (build((pair(b"a", STRING, u64(2**64 - 8)),)), "bytes long; the limit"),
    "string cut off": (build((pair(b"a", STRING, u64(5_000)),)), "ends inside a"),
    "string not UTF-8": (build((pair(b"a", STRING, text(b"\xc3\x28")),)), "a is not UTF-8"),
    "array of arrays": (
        build((pair(b"a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0"))),)),
        "an array of type 9",
    ),
    "array type 99": (build((pair(b"a", ARRAY, array(99, 1, b"\0")),)), "an array of type 99"),
    "array count 2^64-1": (
        build((pair(b"a", ARRAY, array(U64, 2**64 - 1, b"")),)),
        "the limit, for all arrays",
    ),
    "array bytes wrap": (
        build((pair(b"a", ARRAY, array(U64, 2**61, b"")),)),
        "the limit, for all arrays",
    ),
    "array cut off": (build((pair(b"a", ARRAY, array(U32, 9_999, b"")),)), "ends inside a"),
    "strings cut off": (
        build((pair(b"a", ARRAY, array(STRING, 2, text(b"x"))),), (), data=0, alignment=1),
        "ends inside a",
    ),
    "string in array 2^40": (
        build((pair(b"a", ARRAY, array(STRING, 1, u64(2**40))),)),
        "a string of 1099511627776 bytes",
    ),
    "string in array not UTF-8": (
        build((pair(b"a", ARRAY, array(STRING, 1, text(b"\xff"))),)),
        "that is not UTF-8",
    ),
    "bools 2": (build((pair(b"a", ARRAY, array(BOOL, 2, b"\1\2")),)), "neither 0 nor 1"),
    "alignment 0": (build((aligned(u32(0)),)), "general.alignment must be"),
    "alignment 1": (build((aligned(u32(1)),)), "general.alignment must be"),
    "alignment 48": (build((aligned(u32(48)),)), "general.alignment must be"),
    "alignment 2^31": (build((aligned(u32(2**31)),)), "general.alignment must be"),
    "alignment as string": (build((aligned(text(b"32"), STRING),)), "of type 8"),
    "alignment as u64": (build((aligned(u64(32), U64),)), "of type 10"),
    "name length 2^40": (build(infos=(u64(2**40),)), "is 1099511627776 bytes long"),
    "name twice": (build(infos=(info(), info(offset=256)), data=600), "'t' occurs twice"),
    "rank 0": (build(infos=(info(dims=()),)), "has 0 dimensions"),
    "rank 5": (build(infos=(info(dims=(32, 1, 1, 1, 1)),)), "has 5 dimensions"),
    "rank 100": (build(infos=(info(rank=100),)), "has 100 dimensions"),
    "rank 2^32-1": (build(infos=(info(rank=2**32 - 1),)), "has 4294967295 dimensions"),
    "dimension 0": (build(infos=(info(dims=(0, 2)),)), "each must be from 1"),
    "dimension 2^63": (build(infos=(info(dims=(2**63,)),)), "each must be from 1"),
    "product wraps to 0": (build(infos=(info(dims=(65536,) * 4),)), "after the end of the file"),
    "product wraps to 64": (
        build(infos=(info(dims=(2**30, 2**30, 16, 4)),)),
        "after the end of the file",
    ),
    "type 255": (build(infos=(info(kind=255),)), "has the unknown type 255"),
    "removed type 4": (build(infos=(info(kind=4),)), "has the unknown type 4"),
    "half a block": (build(infos=(info(dims=(48,), kind=2),)), "needs a multiple of 32"),
    "offset misaligned": (
        build(infos=(info(offset=4),), data=256),
        "no multiple of the alignment 32",
    ),
    "offset after the end": (build(infos=(info(offset=2**40),)), "after the end of the file"),
    "offset wraps": (build(infos=(info(offset=2**64 - 32),)), "after the end of the file"),
    "data cut off": (build(data=255), "after the end of the file"),
    "same bytes twice": (build(infos=(info(), info(b"u"))), "overlaps another tensor"),
    "partial overlap": (
        build(infos=(info(), info(b"u", offset=224)), data=256),
        "overlaps another tensor",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_file_rule_and_remedy_and_little_memory(
    tmp_path: Path, case: str
):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            GGUFFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(path) in str(caught.value) and "again" in str(caught.value)
    assert peak < 1 << 20, peak


def test_the_files_they_were_made_from_are_read(tmp_path: Path):
    path = tmp_path / "good.gguf"
    for data in (
        build(),
        build(version=2),
        build((aligned(u32(64)),), alignment=64),
        build((), ()),
    ):
        path.write_bytes(data)
        with GGUFFile.open(path) as file:
            assert same_as_package(file)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path):
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "missing.gguf", Path("/dev/zero")):
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_a_vocabulary_of_the_largest_size_is_read_within_bounds(tmp_path: Path):
    count = 100_000
    tokens = pair(b"tokens", ARRAY, array(STRING, count, text(b"token") * count))
    scores = pair(b"scores", ARRAY, array(F32, count, bytes(4 * count)))
    path = tmp_path / "large.gguf"
    path.write_bytes(build((tokens, scores)))
    tracemalloc.start()
    start = time.process_time()
    with GGUFFile.open(path) as file:
        assert len(file.keys["tokens"]) == len(file.keys["scores"]) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20, peak  # the package alone takes 160 MB
    assert time.process_time() - start < 10
    over = array(U8, gguf_header.MAX_ELEMENTS - 2 * count + 1, bytes(gguf_header.MAX_ELEMENTS))
    path.write_bytes(build((tokens, scores, pair(b"more", ARRAY, over))))
    with pytest.raises(CheckpointError, match="for all arrays together"):
        GGUFFile.open(path)


def test_every_type_in_the_table_is_one_that_the_package_decodes():
    for number, (elements, size) in gguf_header.BLOCK_SIZES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert gguf.GGML_QUANT_SIZES[kind] == (elements, size)
        values = gguf.dequantize(np.zeros((2, size), np.uint8), kind)
        assert values.shape == (2, elements)


def same_as_package(file: GGUFFile) -> bool:
    reader = gguf.GGUFReader(file.path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    ours = {name: (i.dtype, i.shape, i.start, i.nbytes) for name, i in file.tensors.items()}
    return repr(fields) == repr(file.keys) and tensors == ours  # repr: NaN is unlike itself


def seed(path: Path) -> bytes:
    """A whole model of 1.9 kB, in every kind of block that is repacked or copied."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", 1),
        ("context_length", 32),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "</s>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    kinds = gguf.GGMLQuantizationType
    layout = {
        "attn_q": kinds.Q4_0,
        "attn_k": kinds.Q4_1,
        "ffn_up": kinds.Q8_0,
        "ffn_norm": kinds.F16,
    }
    for name, kind in (
        {"token_embd": kinds.BF16} | {f"blk.0.{stem}": kind for stem, kind in layout.items()}
    ).items():
        values = np.linspace(-1, 1, 32 * (1 if "norm" in name else 4), dtype=np.float32)
        shaped = values if "norm" in name else values.reshape(4, 32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(shaped, kind), raw_dtype=kind)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return path.read_bytes()


WORDS = [
    0,
    1,
    2,
    8,
    9,
    31,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 32,
    2**64 - 1,
]


def mutant(original: bytes, chance: random.Random, header: int) -> bytes:
    """One or two edits, most of them in the header: a bit, a byte, an integer, a cut, a piece left out or doubled."""
    data = bytearray(original)
    for _ in range(chance.choice([1, 1, 1, 2])):
        where = chance.randrange(min(header, len(data)) if chance.random() < 0.9 else len(data))
        length = chance.choice([1, 4, 8, 32])
        edit = chance.choice(["bit", "bit", "byte", "u32", "u64", "cut", "drop", "double"])
        if edit == "bit":
            data[where] ^= 1 << chance.randrange(8)
        elif edit == "byte":
            data[where] = chance.randrange(256)
        elif edit in ("u32", "u64"):
            size = int(edit[1:]) // 8
            data[where : where + size] = (chance.choice(WORDS) % 2 ** (8 * size)).to_bytes(
                size, "little"
            )
        elif edit == "cut" and len(data) > 100:
            del data[where + 50 :]
        elif edit == "drop":
            del data[where : where + length]
        else:
            data[where:where] = data[where : where + length]
    return bytes(data)


def outcome(read: Callable[[], object]) -> object:
    try:
        return read()
    except MlxArchError as error:
        assert str(error)
        return type(error)


def read_all(path: Path) -> dict[str, tuple[int, ...]]:
    source = open_gguf(path)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    for tensor in gguf.GGUFReader(path).tensors:
        name = huggingface_name(tensor.name) or tensor.name
        values = np.array(source.tensors[name].load().astype(mx.float32))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn" in name:  # permuted rows: test_gguf.py checks their order
            values, expected = np.sort(values, axis=0), np.sort(expected, axis=0)
        assert np.array_equal(values, expected, equal_nan=True), name
    return shapes


def test_thousands_of_mutants_are_refused_or_read_as_the_package_reads_them(tmp_path: Path):
    path, chance = tmp_path / "m.gguf", random.Random(2608)
    original = seed(path)
    header = gguf.GGUFReader(path).data_offset
    assert len(read_all(path)) == 5
    accepted = whole = 0
    slowest = 0.0
    tracemalloc.start()
    for _ in range(MUTANTS):
        path.write_bytes(mutant(original, chance, header))
        start = time.process_time()
        file = outcome(lambda: GGUFFile.open(path))
        if isinstance(file, GGUFFile):
            accepted += 1
            assert same_as_package(file)
            file.close()
            whole += isinstance(outcome(lambda: read_all(path)), dict)
        else:
            assert file is CheckpointError
        slowest = max(slowest, time.process_time() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert MUTANTS // 10 < accepted < MUTANTS * 9 // 10 and MUTANTS // 100 < whole < accepted, (
        accepted,
        whole,
    )  # both sides were exercised
    assert slowest < 5, slowest
    assert peak < 1 << 20, peak
