"""Disk cache of the reference distributions of evaluated models.

Computing the next-token distributions of a large original takes long; variants of it that are
evaluated on the same texts reuse them. A file is the SHA-256 of its contents followed by the arrays
of ``ReferenceDistributions`` in NumPy's npz format. The cache holds at most ``MAX_CACHE_BYTES``;
the oldest files are removed first.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from mlxarch.quantize.evaluation.kl_divergence import ReferenceDistributions
from mlxarch.system import paths

logger = logging.getLogger(__name__)

MAX_CACHE_BYTES = 2 << 30
_DIGEST_BYTES = 32  # SHA-256 of the rest of the file

_ARRAY_NAMES = {  # in the file
    "top_ids": "ids",
    "top_logits": "logits",
    "tail_ids": "drawn",
    "tail_logits": "drawn_logits",
    "logsumexp": "total",
    "tail_logsumexp": "tail",
    "nll": "surprise",
    "top_token": "top",
}


def cache_folder() -> Path:
    """Folder of the cached reference distributions; its files may be removed at any time."""
    return paths.cache() / "references"


def cache_key(facts: dict[str, Any]) -> str:
    """File name for distributions that depend on ``facts``: their SHA-256 in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(key: str) -> ReferenceDistributions | None:
    """Read the distributions of a cache key; None if there are none or the file is damaged."""
    path = cache_folder() / key
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        logger.warning("%s is damaged and will be computed again", path)
        return None
    with np.load(io.BytesIO(data[_DIGEST_BYTES:]), allow_pickle=False) as arrays:
        return ReferenceDistributions(
            **{field: arrays[name] for field, name in _ARRAY_NAMES.items()}
        )


def store(key: str, reference: ReferenceDistributions) -> None:
    """Write distributions to the cache; a full or read-only disk only causes a warning."""
    buffer = io.BytesIO(b"\0" * _DIGEST_BYTES)
    buffer.seek(_DIGEST_BYTES)
    np.savez(buffer, **{name: getattr(reference, field) for field, name in _ARRAY_NAMES.items()})
    data = buffer.getbuffer()
    data[:_DIGEST_BYTES] = hashlib.sha256(data[_DIGEST_BYTES:]).digest()
    path = cache_folder() / key
    unfinished = path.with_name(f"{key}.{os.getpid()}")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        _evict_oldest(len(data))
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except OSError as error:
        logger.warning("%s could not be stored: %s", path, error.strerror or error)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _evict_oldest(needed: int) -> None:
    """Remove files, the oldest first, until ``needed`` more bytes fit."""
    files = sorted(
        (path.stat().st_mtime, path.stat().st_size, path) for path in cache_folder().iterdir()
    )
    total = needed + sum(size for _, size, _ in files)
    for _, size, path in files:
        if total > MAX_CACHE_BYTES:
            path.unlink(missing_ok=True)
            total -= size
