"""Views of lazily read tensors: stacked, selected, concatenated, transposed, shifted, reshaped."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor


class Stacked(LazyTensor):
    """Tensors of one shape along a new first axis: E of (out, in) become (E, out, in)."""

    def __init__(self, tensors: Sequence[LazyTensor]) -> None:
        self.tensors = tensors
        self.shape = (len(tensors), *tensors[0].shape)
        self.dtype = tensors[0].dtype

    @property
    def row_count(self) -> int:
        return len(self.tensors) * self.tensors[0].row_count

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def read_rows(self, start: int, stop: int) -> mx.array:
        height = self.tensors[0].row_count
        pieces = [
            self.tensors[index].read_rows(
                max(start - index * height, 0), min(stop - index * height, height)
            )
            for index in range(start // height, -(-stop // height))
        ]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def load(self) -> mx.array:
        return mx.stack([tensor.load() for tensor in self.tensors])


class SelectedRows(LazyTensor):
    """Selected rows of every matrix of a tensor: ``indices`` lists them in their new order.

    Shape:
        (..., out, in) -> (..., len(indices), in); (..., out) -> (..., len(indices)) if ``vector``
    """

    def __init__(self, tensor: LazyTensor, indices: np.ndarray, vector: bool = False) -> None:
        self.tensor = tensor
        self.indices = indices
        self.vector = vector
        self.dtype = tensor.dtype
        shape = tensor.shape
        self.shape = (
            (*shape[:-1], len(indices)) if vector else (*shape[:-2], len(indices), shape[-1])
        )

    def read_rows(self, start: int, stop: int) -> mx.array:
        if self.vector:
            return self.tensor.read_rows(start, stop)[:, mx.array(self.indices)]
        wanted = np.arange(start, stop)
        height = len(self.indices)
        source = wanted // height * self.tensor.shape[-2] + self.indices[wanted % height]
        low = int(source.min())
        high = int(source.max()) + 1
        return self.tensor.read_rows(low, high)[mx.array(source - low)]

    def load(self) -> mx.array:
        return mx.take(self.tensor.load(), mx.array(self.indices), axis=-1 if self.vector else -2)


class SelectedColumns(LazyTensor):
    """Selected ranges (start, stop) of columns of every matrix of a tensor, side by side.

    Shape:
        (..., in) -> (..., sum of stop - start)
    """

    def __init__(self, tensor: LazyTensor, ranges: Sequence[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.ranges = tuple(ranges)
        self.dtype = tensor.dtype
        self.shape = (*tensor.shape[:-1], sum(stop - start for start, stop in ranges))

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self._select(self.tensor.read_rows(start, stop))

    def load(self) -> mx.array:
        return self._select(self.tensor.load())

    def _select(self, whole: mx.array) -> mx.array:
        """Copy the columns: a view would keep the whole array in memory."""
        pieces = [whole[..., start:stop] for start, stop in self.ranges]
        return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)


class Concatenated(LazyTensor):
    """Slices of a matrix, concatenated along its rows (axis -2) or its columns (axis -1)."""

    def __init__(self, tensors: Sequence[LazyTensor], axis: Literal[-2, -1]) -> None:
        self.tensors = tensors
        self.axis: Literal[-2, -1] = axis
        self.dtype = tensors[0].dtype
        shape = list(tensors[0].shape)
        shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
        self.shape = tuple(shape)

    def read_rows(self, start: int, stop: int) -> mx.array:
        if self.axis == -1:
            pieces = [tensor.read_rows(start, stop) for tensor in self.tensors]
            return mx.concatenate(pieces, axis=-1)
        pieces = []
        first = 0
        for tensor in self.tensors:
            low = max(start - first, 0)
            high = min(stop - first, tensor.row_count)
            if low < high:
                pieces.append(tensor.read_rows(low, high))
            first += tensor.row_count
        return mx.concatenate(pieces)

    def load(self) -> mx.array:
        return mx.concatenate([tensor.load() for tensor in self.tensors], axis=self.axis)


class Transposed(LazyTensor):
    """A tensor with its last two axes exchanged.

    One matrix at a time is kept in memory while rows are read: a row of the transposed matrix takes
    one element from every row in the file.
    """

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        self._cached: tuple[int, mx.array] | None = None

    def _matrix(self, index: int) -> mx.array:
        if self._cached is None or self._cached[0] != index:
            self._cached = None  # frees the old matrix first
            height = self.tensor.shape[-2]
            matrix = self.tensor.read_rows(index * height, (index + 1) * height)
            self._cached = (index, matrix)
        return self._cached[1]

    def read_rows(self, start: int, stop: int) -> mx.array:
        height = self.shape[-2]
        pieces = []
        for index in range(start // height, -(-stop // height)):
            first = max(start - index * height, 0)
            last = min(stop - index * height, height)
            pieces.append(self._matrix(index)[:, first:last].T)
        out = mx.contiguous(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces))
        if stop == self.row_count:
            mx.eval(out)
            self._cached = None
        return out

    def load(self) -> mx.array:
        return mx.contiguous(self.tensor.load().swapaxes(-1, -2))


class Shifted(LazyTensor):
    """A tensor plus a number, in float32: the sum may have more digits than the stored type."""

    def __init__(self, tensor: LazyTensor, addend: float) -> None:
        self.tensor = tensor
        self.addend = addend
        self.shape = tensor.shape
        self.dtype = mx.float32

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.tensor.read_rows(start, stop).astype(mx.float32) + self.addend


class Flattened(LazyTensor):
    """The values of a small tensor as a vector."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.shape = (prod(tensor.shape),)
        self.dtype = tensor.dtype

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.tensor.load().reshape(1, -1)[start:stop]


class Reshaped(LazyTensor):
    """The same rows with other leading axes: (H · out, in) as (H, out, in)."""

    def __init__(self, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
        self.tensor = tensor
        self.shape = shape
        self.dtype = tensor.dtype

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.tensor.read_rows(start, stop)

    def load(self) -> mx.array:
        return self.tensor.load().reshape(self.shape)
