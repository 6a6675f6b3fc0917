"""What a model's folder says of its own making, and whether its files are still those that were made."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxarch.errors import CheckpointError
from mlxarch.untrusted import read_json

RECEIPT = "receipt.json"
_LIMIT = 256 << 20  # bytes: a model may have a hundred thousand tensors
_LITTER = {".DS_Store", "Thumbs.db", ".cache", ".gitattributes"}  # what file managers and the Hub's library leave


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The receipt in a folder; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder) / RECEIPT
    if not os.path.lexists(path):
        return None
    receipt = read_json(path, limit=_LIMIT, values=10_000_000, error=CheckpointError)
    files = receipt.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(f"{path}: `files` must give each file's SHA-256; quantize the model again")
    return receipt


def compared(forecast: float, measured: float) -> str:
    """A divergence that was expected beside the one that came, in words."""
    off = f" ({measured / forecast - 1:+.0%})" if forecast > 0 else ""
    return f"{forecast:.3g}, measured {measured:.3g}{off}"


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a folder, a sentence each: files that changed, are missing, or were not there.

    Raises:
        CheckpointError: there is no receipt, or it is damaged.
    """
    receipt = read(folder)
    if receipt is None:
        raise CheckpointError(f"{folder} has no {RECEIPT}; `mlxarch quantize` writes one into what it makes")
    expected = receipt["files"]
    here = {path.name: path for path in Path(folder).iterdir() if path.name not in _LITTER | {RECEIPT}}
    present = {name: path for name, path in here.items() if name in expected and path.is_file()}
    found = sha256(present.values())
    problems = [f"{name} is missing" for name in sorted(expected.keys() - present.keys())]
    problems += [f"{name} has changed" for name in sorted(present) if found[name] != expected[name]]
    return problems + [f"{name} was not there" for name in sorted(here.keys() - expected.keys())]


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Digests by the files' names, several at a time; a file that has not changed since is not read again.

    Raises:
        OSError: one cannot be read.
    """
    chosen = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip((path.name for path in chosen), pool.map(_of_file, chosen), strict=True))


def _of_file(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(1024)
def _digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
