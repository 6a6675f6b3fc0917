"""A table of embeddings that stays on the disk: the rows of the tokens are read before the model computes with them.

Which rows a pass needs is known from its tokens alone, so that nothing has to be read back from a layer, and no layer
waits. While tokens are generated one by one, the next pass is built before its token is known; ``LateRows`` are the
places in it that are filled as soon as it is.
"""

import threading
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks.linear import unpacked_rows
from mlxarch.errors import InvalidInput
from mlxarch.packing import Quantization
from mlxarch.streaming.banks import writes_in_place
from mlxarch.streaming.rows import Field, RowCache, RowFile, Verify
from mlxarch.tensors import FLOATS, Packed, Tensor

NOT_A_NUMBER = 0xFF  # these bytes are NaN in every type that scales and floats have


def tables_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the tables that may stay on the disk: a model names them in ``token_tables``."""
    return getattr(model, "token_tables", ())


def cache_of(model: nn.Module) -> RowCache | None:
    """The rows that a model reads from the disk, with ``stats``; None where it reads none."""
    return next((module.cache for module in model.modules() if isinstance(module, StreamedEmbedding)), None)


def attach_tables(
    model: nn.Module, parameters: Mapping[str, Tensor], dtype: mx.Dtype, verify: Verify = "first"
) -> frozenset[str]:
    """Let the tables of per-layer embeddings of a model be read from the disk.

    Returns:
        The names of the parameters that need not be loaded any more.

    Raises:
        InvalidInput: the model has none.
        CheckpointError: a table is stored in a form whose rows cannot be read one by one.
    """
    modules, tables = dict(model.named_modules()), tables_of(model)
    if not tables:
        raise InvalidInput("this model has no per-layer embeddings that could be read from the disk")
    for path in tables:
        tensor = parameters[f"{path}.weight"]
        rows = RowCache(RowFile(path, tensor, verify))
        packed = tensor.settings if isinstance(tensor, Packed) else None
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, StreamedEmbedding(rows, packed, dtype))
    return frozenset(f"{path}.weight" for path in tables)


class StreamedEmbedding(nn.Module):
    """Stands in for an embedding whose rows are on the disk, and gives the same bits.

    An id beyond the table has row 0.

    Shape:
        tokens: (B, L) -> (B, L, dims)

    Raises:
        EmbeddingReadError: a row cannot be read.
    """

    def __init__(self, cache: RowCache, quantization: Quantization | None, dtype: mx.Dtype) -> None:
        super().__init__()
        self.cache, self.quantization, self.dtype = cache, quantization, dtype
        self._local = threading.local()

    def __call__(self, tokens: mx.array) -> mx.array:
        """The rows, unpacked; within ``LateRows`` the places for them."""
        late: LateRows | None = getattr(self._local, "late", None)
        if late is not None:
            return self._unpack(late.arrays)
        wanted, places = np.unique(self.known(np.asarray(tokens)), return_inverse=True)
        records = self.cache.rows(wanted.tolist())
        arrays, at = {}, mx.array(places.reshape(tokens.shape).astype(np.uint32))
        for field, start, stop in self.layout():
            words = np.ascontiguousarray(records[:, start:stop]).view(f"u{field.dtype.size}")
            arrays[field.name] = mx.array(words).view(field.dtype)[at]
        return self._unpack(arrays)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """The rows that belong to token ids."""
        return np.where(ids < self.cache.file.count, ids, 0)

    def layout(self) -> list[tuple[Field, int, int]]:
        """The fields with their bytes (start, stop) in a record."""
        fields, at = [], 0
        for field in self.cache.file.fields:
            fields.append((field, at, at + field.nbytes))
            at += field.nbytes
        return fields

    def _unpack(self, arrays: dict[str, mx.array]) -> mx.array:
        """As ``Embedding``, whose floats the loader has cast."""
        cast = {name: a.astype(self.dtype) if a.dtype in FLOATS else a for name, a in arrays.items()}
        return unpacked_rows(cast, self.quantization, self.dtype)


class LateRows:
    """The rows of (B, L) tokens that are not known yet.

    Within ``with``, a lookup in the same thread hands out arrays whose contents ``fill`` brings. What is computed from
    them earlier is NaN. There are two sets, for the pass before may still be running while the next one is built.
    """

    def __init__(self, table: StreamedEmbedding, shape: tuple[int, int]) -> None:
        self._table, self._turn = table, 0
        self._sets = [self._make(shape), self._make(shape)]

    def _make(self, shape: tuple[int, int]) -> tuple[dict[str, mx.array], list[tuple[np.ndarray, int, int]]]:
        """Arrays, and their memory (rows, bytes) with the bytes of a record that belong there."""
        arrays, memory = {}, []
        for field, start, stop in self._table.layout():
            array = mx.zeros((*shape, field.nbytes // field.dtype.size), field.dtype)
            octets = _memory(array).reshape(-1, field.nbytes)
            octets[...] = NOT_A_NUMBER
            arrays[field.name] = array
            memory.append((octets, start, stop))
        return arrays, memory

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Of the pass that is being built."""
        return self._sets[self._turn][0]

    def __enter__(self) -> "LateRows":
        self._turn = 1 - self._turn
        self._table._local.late = self
        return self

    def __exit__(self, *_: object) -> None:
        self._table._local.late = None

    def fill(self, tokens: Sequence[int]) -> None:
        """Bring the rows, all B * L. The pass before must be done: its rows become NaN.

        Raises:
            EmbeddingReadError: one cannot be read.
        """
        wanted, places = np.unique(self._table.known(np.array(tokens)), return_inverse=True)
        records = self._table.cache.rows(wanted.tolist())[places]
        for octets, start, stop in self._sets[self._turn][1]:
            octets[...] = records[:, start:stop]
        for octets, _, _ in self._sets[1 - self._turn][1]:
            octets[...] = NOT_A_NUMBER


def late_rows(model: nn.Module, shape: tuple[int, int] = (1, 1)) -> LateRows | None:
    """Places for a model's rows; None where it reads none from the disk, or MLX does not see what is written there."""
    tables = [module for module in model.modules() if isinstance(module, StreamedEmbedding)]
    return LateRows(tables[0], shape) if len(tables) == 1 and writes_in_place(mx.default_device()) else None


def _memory(array: mx.array) -> np.ndarray:
    """The bytes of an array. Not a copy: writing to them changes the array."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint8)).reshape(-1)
