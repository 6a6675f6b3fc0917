"""Reference distributions on the disk: what a large model said of some texts, so that it need not say it again."""

import contextlib
import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from mlxarch import paths
from mlxarch.quantize.distributions import Kept

logger = logging.getLogger(__name__)

LIMIT = 2 << 30  # bytes of all that is kept; the oldest go first
_DIGEST = 32  # bytes before the data: their SHA-256


def folder() -> Path:
    """Where they lie; any of them may be removed."""
    return paths.cache() / "references"


def key(facts: dict[str, Any]) -> str:
    """Of everything that the distributions depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(name: str) -> Kept | None:
    """What was stored under a key; None if nothing was, or if a byte of it has changed."""
    path = folder() / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        logger.warning("%s is damaged and is made again", path)
        return None
    with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as arrays:
        return Kept(**arrays)


def store(name: str, kept: Kept) -> None:
    """Keep it for later; a disk that is full or read-only is no error."""
    buffer = io.BytesIO(b"\0" * _DIGEST)
    buffer.seek(_DIGEST)
    np.savez(buffer, **{field: getattr(kept, field) for field in kept.__dataclass_fields__})
    data = buffer.getbuffer()
    data[:_DIGEST] = hashlib.sha256(data[_DIGEST:]).digest()
    path = folder() / name
    unfinished = path.with_name(f"{name}.{os.getpid()}")
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _make_room(len(data))
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except OSError as error:
        logger.warning("%s could not be kept: %s", path, error.strerror or error)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _make_room(needed: int) -> None:
    found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder().iterdir())
    total = needed + sum(size for _, size, _ in found)
    for _, size, path in found:
        if total > LIMIT:
            path.unlink(missing_ok=True)
            total -= size
