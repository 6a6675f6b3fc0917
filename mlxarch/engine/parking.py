"""Caches of a row that was set aside, outside of MLX's memory: in a file, or in the host's memory."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Cache


class ParkedCaches:
    """Copy of the caches of a row, which ``restore`` brings back bit by bit.

    Args:
        caches: caches of the row.
        folder: where to write a file, which only its owner can read; None keeps the copy in the
            memory of the host.
    """

    def __init__(self, caches: Sequence[Cache | None], folder: Path | None) -> None:
        self._lengths = [0 if cache is None else cache.length for cache in caches]
        states = [() if cache is None else cache.export() for cache in caches]
        arrays = {
            f"{layer}.{index}": array
            for layer, state in enumerate(states)
            for index, array in enumerate(state)
        }
        self._counts = [len(state) for state in states]
        self._file: Path | None = None
        self._copies: dict[str, tuple[np.ndarray, mx.Dtype]] = {}
        if folder is None:
            self._copies = {
                name: (np.array(array.view(mx.uint8)), array.dtype)
                for name, array in arrays.items()
            }
        else:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(".safetensors", "row-", folder)  # mode 0600
            os.close(handle)
            self._file = Path(name)
            mx.save_safetensors(name, arrays)

    def restore(self, caches: Sequence[Cache | None]) -> None:
        """Bring the copy into empty caches, and delete it."""
        if self._file is None:
            arrays = {name: mx.array(a).view(dtype) for name, (a, dtype) in self._copies.items()}
        else:
            arrays = cast(dict[str, mx.array], mx.load(str(self._file)))
        for layer, (cache, count) in enumerate(zip(caches, self._counts, strict=True)):
            if cache is not None:
                state = tuple(arrays[f"{layer}.{index}"] for index in range(count))
                cache.restore(self._lengths[layer], [state])
        mx.eval([cache.arrays() for cache in caches if cache is not None])
        self.discard()

    def discard(self) -> None:
        """Delete the copy."""
        self._copies = {}
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
