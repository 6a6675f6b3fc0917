"""Validation of a GGUF header with bounded cost, before any other reader opens the file.

Layout: magic, version, counts; keys with typed values; tensor infos; padding to
``general.alignment``; tensor data. All integers are little endian. The limits are mlxarch's own:
every published model meets them, and they bound the time and memory that a hostile file can cost.
Source: the GGUF specification, versions 2 and 3 (docs/gguf.md of the ggml repository).
"""

import os
import struct
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from mlxarch.errors import CheckpointError

MAX_KEYS = 4_096
MAX_TENSORS = 65_536
MAX_NAME = 256  # bytes of a key or a tensor name
MAX_STRING = 16 << 20  # bytes of one string value: a chat template
MAX_TOKEN = 65_536  # bytes of one string in an array: a token or a merge
# array elements in the whole file: tokens, types, scores and merges of 200,000 tokens
MAX_ELEMENTS = 1 << 20
ALIGNMENTS = [2**n for n in range(3, 17)]

# Value types of metadata
UINT32 = 4
BOOL = 7
STRING = 8
ARRAY = 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, BOOL: 1, 10: 8, 11: 8, 12: 8}

# GGML tensor type -> (elements, bytes) of a block.
BLOCK_SIZES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
}


def check_header(file: BinaryIO, path: os.PathLike[str] | str) -> None:
    """Check a header against the rules of the format and the limits of this module.

    A file that passes is safe for the gguf package: every length and count was checked against the
    bytes that are there.

    Args:
        file: a regular file, open for reading and buffered, at any position.
        path: its path, for messages.

    Raises:
        CheckpointError: it names the file, the key or tensor, the rule and the remedy.
    """
    _HeaderValidator(file, path).run()


class _HeaderValidator:
    """One pass over a header; each method reads and checks the item that follows in the file."""

    def __init__(self, file: BinaryIO, path: os.PathLike[str] | str):
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.elements = 0
        self.alignment = 32
        file.seek(0)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {what}. Download the file again, or convert the original again."
        )

    def read(self, count: int, what: str) -> bytes:
        # read() allocates the bytes requested before it knows how many there are
        data = self.file.read(min(count, self.size))
        if len(data) < count:
            self.refuse(f"the file ends inside {what}, at byte {self.size}")
        return data

    def integer(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self.read(struct.calcsize(layout), what))[0]

    def string(self, limit: int, what: str) -> str:
        length = self.integer("<Q", what)
        if length > limit:
            self.refuse(f"{what} is {length} bytes long; the limit is {limit}")
        try:
            return self.read(length, what).decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")

    def name(self, what: str, taken: set[str]) -> str:
        name = self.string(MAX_NAME, what)
        if not name or not name.isprintable():
            self.refuse(f"{what} is {name!r}; it must be printable text")
        if name in taken:
            self.refuse(f"{what} {name!r} occurs twice")
        taken.add(name)
        return name

    def run(self) -> None:
        magic = self.read(4, "the magic number")
        if magic != b"GGUF":
            self.refuse(f"it starts with {magic!r}, not with b'GGUF': this is no GGUF file")
        version = self.integer("<I", "the version")
        if version not in (2, 3):
            order = " in big-endian order" if version and version & 0xFFFF == 0 else ""
            self.refuse(
                f"it has GGUF version {version}{order}; read are versions 2 and 3, little endian"
            )
        tensors = self.integer("<Q", "the tensor count")
        keys = self.integer("<Q", "the key count")
        for count, limit, what in (
            (tensors, MAX_TENSORS, "tensors"),
            (keys, MAX_KEYS, "metadata keys"),
        ):
            if count > limit:
                self.refuse(f"it declares {count} {what}; the limit is {limit}")
        seen: set[str] = set()
        for number in range(keys):
            self.value(self.name(f"metadata key {number}", seen))
        seen = set()
        spans = [
            self.tensor(self.name(f"the name of tensor {number}", seen))
            for number in range(tensors)
        ]
        self.check_data(-(-self.file.tell() // self.alignment) * self.alignment, spans)

    def value(self, key: str) -> None:
        kind = self.integer("<I", f"the type of {key}")
        if key == "general.alignment":
            self.alignment = self.integer("<I", key)
            if kind != UINT32 or self.alignment not in ALIGNMENTS:
                allowed = f"a power of two from {ALIGNMENTS[0]} to {ALIGNMENTS[-1]}"
                self.refuse(
                    f"general.alignment must be a uint32 and {allowed}, found {self.alignment} of "
                    f"type {kind}"
                )
        elif kind == STRING:
            self.string(MAX_STRING, key)
        elif kind == ARRAY:
            self.array(key)
        elif kind in SCALAR_BYTES:
            data = self.read(SCALAR_BYTES[kind], key)
            if kind == BOOL and data[0] > 1:
                self.refuse(f"{key} is a boolean of value {data[0]}")
        else:
            self.refuse(f"{key} has the value type {kind}; known are 0 to 12")

    def array(self, key: str) -> None:
        kind = self.integer("<I", key)
        count = self.integer("<Q", key)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            self.refuse(
                f"{key} has {count} elements; the limit, for all arrays together, is {MAX_ELEMENTS}"
            )
        if kind == STRING:
            self.strings(key, count)
        elif kind in SCALAR_BYTES:
            data = self.read(count * SCALAR_BYTES[kind], key)
            if kind == BOOL and data.strip(b"\0\1"):
                self.refuse(f"{key} has a boolean that is neither 0 nor 1")
        else:
            self.refuse(
                f"{key} is an array of type {kind}; read are arrays of numbers, booleans and "
                "strings"
            )

    def strings(self, key: str, count: int) -> None:
        # Vocabularies have many tokens and merges, so that each takes as few calls as possible.
        read: Callable[[int], bytes] = self.file.read
        length = 0
        try:
            for _ in range(count):
                (length,) = struct.unpack("<Q", read(8))
                if length > MAX_TOKEN or len(data := read(length)) < length:
                    break
                data.decode()
            else:
                return
        except struct.error:
            length = 0
        except UnicodeDecodeError:
            self.refuse(f"{key} has a string that is not UTF-8")
        if length > MAX_TOKEN:
            self.refuse(f"{key} has a string of {length} bytes; the limit is {MAX_TOKEN}")
        self.refuse(f"the file ends inside {key}, at byte {self.size}")

    def tensor(self, name: str) -> tuple[int, int, str]:
        """Read the next tensor info: declared offset, bytes and name."""
        what = f"tensor {name!r}"
        rank = self.integer("<I", what)
        if not 1 <= rank <= 4:
            self.refuse(f"{what} has {rank} dimensions; allowed are 1 to 4")
        dimensions = struct.unpack(f"<{rank}Q", self.read(8 * rank, what))
        kind = self.integer("<I", what)
        offset = self.integer("<Q", what)
        if not all(0 < size < 2**31 for size in dimensions):
            self.refuse(f"{what} has dimensions {dimensions}; each must be from 1 to {2**31 - 1}")
        if kind not in BLOCK_SIZES:
            self.refuse(
                f"{what} has the unknown type {kind}; known are {', '.join(map(str, BLOCK_SIZES))}"
            )
        elements, block_bytes = BLOCK_SIZES[kind]
        if dimensions[0] % elements:
            self.refuse(
                f"{what} has rows of {dimensions[0]} values; type {kind} needs a multiple of "
                f"{elements}"
            )
        values = 1
        for size in dimensions:
            values *= size
        return offset, values // elements * block_bytes, name

    def check_data(self, start: int, spans: list[tuple[int, int, str]]) -> None:
        """Check that tensor data is aligned, within the file, and does not overlap."""
        end = 0
        for offset, nbytes, name in sorted(spans):
            if offset % self.alignment:
                self.refuse(
                    f"tensor {name!r} starts at {offset}, which is no multiple of the alignment "
                    f"{self.alignment}"
                )
            if offset < end:
                self.refuse(f"tensor {name!r} overlaps another tensor")
            end = offset + nbytes
            if start + end > self.size:
                self.refuse(
                    f"tensor {name!r} ends at byte {start + end}, after the end of the file at "
                    f"{self.size}"
                )
