"""The checksum of records on the disk: CRC-32 with zlib's polynomial, which docs/experts-format.md names.

Computed by zlib-ng: with the standard library's, on many systems a sixth as fast, threads that read from an SSD would
wait for their processors.
"""

from typing import Any

from zlib_ng import zlib_ng


def crc32(*buffers: Any) -> int:
    """Of the bytes of buffers, one behind the other."""
    found = 0
    for buffer in buffers:
        found = zlib_ng.crc32(buffer, found)
    return found
