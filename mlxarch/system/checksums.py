"""Checksums: CRC-32 of records in packed files, SHA-256 of whole files.

CRC-32 uses zlib's polynomial, as docs/experts-format.md specifies. It is computed by zlib-ng
because the standard library's is up to six times slower on many systems: the threads that read from
an SSD would wait for the CPU.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from zlib_ng import zlib_ng

from mlxarch.progress import Progress, silent

_CHUNK_BYTES = 1 << 22  # between two progress reports


def crc32(*buffers: Any) -> int:
    """Return the CRC-32 of the concatenated bytes of all buffers."""
    checksum = 0
    for buffer in buffers:
        checksum = zlib_ng.crc32(buffer, checksum)
    return checksum


def sha256_file(path: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 of a file as lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    done = 0
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(f"checking {path.name}", done, total)
    return digest.hexdigest()


def sha256_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 by file name, four files at a time; digests of unchanged files are cached.

    Raises:
        OSError: a file cannot be read.
    """
    chosen = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(
            zip(
                (path.name for path in chosen),
                pool.map(_sha256_unless_changed, chosen),
                strict=True,
            )
        )


def _sha256_unless_changed(path: Path) -> str:
    status = path.stat()
    return _cached_sha256(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(1024)
def _cached_sha256(path: Path, *_: int) -> str:
    return sha256_file(path)
