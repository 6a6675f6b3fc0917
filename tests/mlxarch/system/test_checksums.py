"""The checksum of records is zlib's CRC-32, whatever computes it."""

import zlib
from itertools import pairwise

import numpy as np
import pytest

from mlxarch.system.checksums import crc32


def test_the_value_that_the_format_names() -> None:
    assert crc32(b"123456789") == 0xCBF43926
    assert crc32() == 0 and crc32(b"123456780") != 0xCBF43926


@pytest.mark.parametrize("size", [1, 15, 64, 4099, 1 << 20])
def test_the_standard_library_finds_the_same_in_one_piece_and_in_several(size: int) -> None:
    draw = np.random.default_rng(size)
    data = draw.integers(0, 256, size, np.uint8)
    cuts = [0, *sorted(draw.integers(0, size + 1, 3).tolist()), size]
    pieces = [data[start:stop] for start, stop in pairwise(cuts)]
    wanted = zlib.crc32(data.tobytes())
    assert crc32(data) == crc32(*pieces) == wanted
    data[size // 2] ^= 16
    assert crc32(data) == crc32(*pieces) == zlib.crc32(data.tobytes()) != wanted
