"""SHA-256 of files, each read once as long as it is not changed."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Digests by the files' names, several at a time.

    Raises:
        OSError: one cannot be read.
    """
    chosen = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip((path.name for path in chosen), pool.map(_of_file, chosen), strict=True))


def _of_file(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(1024)
def _digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
