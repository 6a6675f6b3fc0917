"""Embedding tables on the SSD: the rows of a pass are read before the model computes with them.

The tokens of a pass determine its rows, so nothing has to be read back from a layer and no layer
waits. While tokens are generated one by one, the graph of the next pass is built before its token
is known; ``LateRows`` are placeholders in the graph that are filled as soon as it is.
"""

import threading
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks.linear import dequantize_rows
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import InvalidInput
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.expert_slots import writes_in_place
from mlxarch.ssd_streaming.row_cache import Field, RowCache, Verify, open_rows

NOT_A_NUMBER = 0xFF  # these bytes are NaN in every type that scales and floats have


def tables_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of embedding tables that may stay on the SSD.

    The network lists those that are looked up by token in ``token_tables``, and those that are
    looked up by the last few tokens in ``ngram_tables``.
    """
    return (*getattr(model, "token_tables", ()), *getattr(model, "ngram_tables", ()))


def packable_tables_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the tables that docs/rows-format.md packs: those that are looked up by token."""
    return getattr(model, "token_tables", ())


def cache_of(model: nn.Module) -> RowCache | None:
    """Cache of embedding rows that a network reads from the SSD; None if all are in memory."""
    return next(
        (module.cache for module in model.modules() if isinstance(module, StreamedEmbedding)), None
    )


def attach_tables(
    model: nn.Module,
    parameters: Mapping[str, LazyTensor],
    dtype: mx.Dtype,
    verify: Verify = "first",
) -> frozenset[str]:
    """Replace the tables of per-layer embeddings of a network by ones that are read from the SSD.

    Returns:
        Names of the parameters that need not be loaded.

    Raises:
        InvalidInput: the network has no such table.
        CheckpointError: the rows of a table cannot be read one by one from its format.
    """
    modules = dict(model.named_modules())
    tables = tables_of(model)
    if not tables:
        raise InvalidInput(
            "this model has no per-layer embeddings that could be read from the disk"
        )
    for path in tables:
        tensor = parameters[f"{path}.weight"]
        rows = RowCache(open_rows(path, tensor, verify))
        packed = tensor.quantization if isinstance(tensor, QuantizedTensor) else None
        parent, _, name = path.rpartition(".")
        by_token = path in getattr(model, "token_tables", ())
        setattr(modules[parent], name, StreamedEmbedding(rows, packed, dtype, by_token))
    return frozenset(f"{path}.weight" for path in tables)


class StreamedEmbedding(nn.Module):
    """Embedding whose rows are read from the SSD; bitwise equal to one in memory.

    An id beyond the table reads row 0.

    Args:
        by_token: whether the id of a row is that of the token.

    Shape:
        tokens: (B, L) -> (B, L, dims)

    Raises:
        EmbeddingReadError: a row cannot be read.
    """

    def __init__(
        self,
        cache: RowCache,
        quantization: Quantization | None,
        dtype: mx.Dtype,
        by_token: bool = True,
    ) -> None:
        super().__init__()
        self.cache = cache
        self.by_token = by_token
        self.quantization = quantization
        self.dtype = dtype
        self._local = threading.local()

    def __call__(self, tokens: mx.array) -> mx.array:
        """Rows of the tokens, dequantized; within a ``LateRows`` block its placeholders."""
        late: LateRows | None = getattr(self._local, "late", None)
        if late is not None:
            return self._unpack(late.arrays)
        wanted, places = np.unique(self.row_indices(np.asarray(tokens)), return_inverse=True)
        records = self.cache.rows(wanted.tolist())
        arrays = {}
        indices = mx.array(places.reshape(tokens.shape).astype(np.uint32))
        for field, start, stop in self.layout():
            words = np.ascontiguousarray(records[:, start:stop]).view(f"u{field.dtype.size}")
            arrays[field.name] = mx.array(words).view(field.dtype)[indices]
        return self._unpack(arrays)

    def row_indices(self, ids: np.ndarray) -> np.ndarray:
        """Row of the table for each token id."""
        return np.where(ids < self.cache.file.count, ids, 0)

    def layout(self) -> list[tuple[Field, int, int]]:
        """Fields of a record, each with its bytes (start, stop)."""
        fields = []
        at = 0
        for field in self.cache.file.fields:
            fields.append((field, at, at + field.nbytes))
            at += field.nbytes
        return fields

    def _unpack(self, arrays: dict[str, mx.array]) -> mx.array:
        """Dequantize rows like ``Embedding``, whose floats the loader has cast."""
        cast = {
            name: a.astype(self.dtype) if a.dtype in FLOAT_DTYPES else a
            for name, a in arrays.items()
        }
        return dequantize_rows(cast, self.quantization, self.dtype)


class LateRows:
    """Placeholders for the rows of (B, L) tokens that are not known yet.

    Within the ``with`` block, a lookup in the same thread returns arrays that ``fill`` writes
    later; computed earlier, they give NaN. There are two sets, because the pass before may still
    run while the next one is built.
    """

    def __init__(self, table: StreamedEmbedding, shape: tuple[int, int]) -> None:
        self._table = table
        self._current = 0  # index of the set of the pass that is being built
        self._sets = [self._allocate(shape), self._allocate(shape)]

    def _allocate(
        self, shape: tuple[int, int]
    ) -> tuple[dict[str, mx.array], list[tuple[np.ndarray, int, int]]]:
        """Arrays, and their memory (rows, bytes) with the bytes of a record that go there."""
        arrays = {}
        memory = []
        for field, start, stop in self._table.layout():
            array = mx.zeros((*shape, field.nbytes // field.dtype.size), field.dtype)
            buffer = _memory(array).reshape(-1, field.nbytes)
            buffer[...] = NOT_A_NUMBER
            arrays[field.name] = array
            memory.append((buffer, start, stop))
        return arrays, memory

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Placeholders of the pass that is being built."""
        return self._sets[self._current][0]

    def __enter__(self) -> "LateRows":
        self._current = 1 - self._current
        self._table._local.late = self
        return self

    def __exit__(self, *_: object) -> None:
        self._table._local.late = None

    def fill(self, tokens: Sequence[int]) -> None:
        """Read the rows of all B * L tokens. The pass before must have finished: its rows become NaN.

        Raises:
            EmbeddingReadError: a row cannot be read.
        """
        wanted, places = np.unique(self._table.row_indices(np.array(tokens)), return_inverse=True)
        records = self._table.cache.rows(wanted.tolist())[places]
        for buffer, start, stop in self._sets[self._current][1]:
            buffer[...] = records[:, start:stop]
        for buffer, _, _ in self._sets[1 - self._current][1]:
            buffer[...] = NOT_A_NUMBER


def late_rows(model: nn.Module, shape: tuple[int, int] = (1, 1)) -> LateRows | None:
    """Placeholders for the rows of a network.

    None if it reads no rows from the SSD, or rows that more than the new token determines, or if
    MLX does not notice writes to the memory of its arrays.
    """
    tables = [module for module in model.modules() if isinstance(module, StreamedEmbedding)]
    if len(tables) != 1 or not tables[0].by_token or not writes_in_place(mx.default_device()):
        return None
    return LateRows(tables[0], shape)


def _memory(array: mx.array) -> np.ndarray:
    """Memory of an array as bytes, not a copy: writing to it changes the array."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint8)).reshape(-1)
