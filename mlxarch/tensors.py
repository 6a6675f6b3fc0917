"""Virtual tensors: their shape is known, and their values are read by rows when they are asked for.

A quantizer reads a tensor in chunks, a loader whole. What is stored otherwise than a model wants it (packed, split,
stacked, transposed, in another number format) is a Tensor that computes its rows from those of others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Literal, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.checkpoint import Shard, TensorInfo
from mlxarch.errors import CheckpointError, InvalidInput

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F8_E4M3": mx.uint8,  # MLX has no such type; ``Fp8Blocks`` knows what the bytes mean
}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
PIECE = 4 << 20  # bytes that are held of a tensor of which columns are wanted


class Tensor(ABC):
    """A tensor that is read when its rows are asked for.

    Attributes:
        shape: what the model sees.
        dtype: of the rows.
        origin: how another program packed it and what became of that, for people; empty where there is nothing to say.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    origin: str = ""

    @property
    def row_count(self) -> int:
        """Rows of the matrix (prod(shape[:-1]), shape[-1]) as which ``rows`` counts; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return prod(self.shape) * self.dtype.size

    @abstractmethod
    def rows(self, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop``: (stop - start, shape[-1]).

        Raises:
            CheckpointError: the file cannot be read, or is no longer the one that was checked.
        """

    def load(self) -> mx.array:
        """All of it, in its own shape."""
        return self.rows(0, self.row_count).reshape(self.shape)

    def panel(self, start: int, stop: int) -> mx.array:
        """Columns of the same matrix: (row_count, stop - start). Of the others, a few rows are held at a time."""
        step, pieces = max(PIECE // max(self.shape[-1] * self.dtype.size, 1), 1), []
        for row in range(0, self.row_count, step):
            pieces.append(mx.contiguous(self.rows(row, min(row + step, self.row_count))[:, start:stop]))
            mx.eval(pieces[-1])
        return mx.concatenate(pieces)


class Stored(Tensor):
    """A tensor as a safetensors file holds it."""

    def __init__(self, shard: Shard, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{shard.path}: tensor {info.name} has dtype {info.dtype}; mlxarch reads {', '.join(DTYPES)}. "
                "Save the checkpoint in bfloat16 or float32"
            )
        self.shard, self.info, self.shape, self.dtype = shard, info, info.shape, DTYPES[info.dtype]

    def rows(self, start: int, stop: int) -> mx.array:
        width = self.shape[-1] if self.shape else 1
        raw = bytearray((stop - start) * width * self.dtype.size)
        self.shard.read_into(self.info, memoryview(raw), start * width * self.dtype.size)
        # by way of an integer type of the same width, for NumPy has no bfloat16
        words = mx.array(np.frombuffer(raw, f"u{self.dtype.size}"))
        return words.view(self.dtype).reshape(stop - start, width)

    def panel(self, start: int, stop: int) -> mx.array:
        if (start, stop) == (0, self.shape[-1]):
            return self.rows(0, self.row_count)
        size, width, wide = self.dtype.size, self.shape[-1], stop - start
        raw = bytearray(self.row_count * wide * size)
        for row, piece in enumerate(range(0, len(raw), wide * size)):
            part = memoryview(raw)[piece : piece + wide * size]
            self.shard.read_into(self.info, part, (row * width + start) * size)
        return mx.array(np.frombuffer(raw, f"u{size}")).view(self.dtype).reshape(-1, wide)

    def load(self) -> mx.array:
        """See Tensor. MLX reads it, when it is evaluated: in parallel, and straight into its own buffer."""
        if self.info.dtype == "F8_E4M3":
            return super().load()
        array = _unread_array(self.shard, self.info.name)
        if array.shape != self.shape or array.dtype != self.dtype:
            self.shard.check_unchanged()
            raise CheckpointError(
                f"{self.shard.path}: tensor {self.info.name} is {self.dtype} {self.shape}, and MLX reads it as "
                f"{array.dtype} {array.shape}; save the checkpoint again"
            )
        return array


_unread: WeakKeyDictionary[Shard, dict[str, mx.array]] = WeakKeyDictionary()


def _unread_array(shard: Shard, name: str) -> mx.array:
    """An array that MLX has yet to read. It is handed out once, so that nothing here holds on to what was read."""
    if name not in _unread.get(shard, {}):
        shard.check_unchanged()  # MLX opens it anew, by its path
        try:
            _unread[shard] = cast(dict[str, mx.array], mx.load(str(shard.path), format="safetensors"))
        except (RuntimeError, ValueError) as error:
            shard.check_unchanged()
            raise CheckpointError(f"{shard.path}: MLX does not read it ({error}); download it again") from None
    if name not in _unread[shard]:
        shard.check_unchanged()
        raise CheckpointError(f"{shard.path}: MLX does not find tensor {name}; download the file again")
    return _unread[shard].pop(name)


def without_loss(origin: str, dtype: mx.Dtype) -> str:
    """The ``origin`` of a matrix that is packed for MLX with scales and biases in ``dtype``."""
    kept = f", scales and biases in {str(dtype).rpartition('.')[2]}" if dtype in FLOATS else ""
    return f"{origin}, which MLX's packing holds without loss{kept}"


class Packed(Tensor):
    """A quantized matrix: its rows are dequantized, its parts are what is stored.

    The rows are float32 whatever the type of the scales: in float16, scale * code + bias would be off by an eighth of
    a step.

    Raises:
        CheckpointError: weight, scales and biases do not fit together. MLX would read beyond their ends.
    """

    def __init__(self, name: str, parts: Mapping[str, Tensor], settings: Quantization) -> None:
        self.parts, self.settings = dict(parts), settings
        weight, scales = parts["weight"], parts["scales"]
        if settings.mode != "affine":
            self.parts["scales"] = SmallScales(name, scales, settings.mode)
        elements = prod(weight.shape[-1:]) * 32
        self.shape = (*weight.shape[:-1], elements // settings.bits)
        self.dtype = mx.float32
        wanted = {"weight": (mx.uint32, weight.shape), "scales": (None, settings.scales_shape(self.shape))}
        if settings.mode == "affine":
            wanted["biases"] = (scales.dtype, settings.scales_shape(self.shape))
        wrong = [
            f"{part} is {parts[part].dtype} {parts[part].shape}" if part in parts else f"{part} is missing"
            for part, (dtype, shape) in wanted.items()
            if part not in parts or parts[part].shape != shape or parts[part].dtype != (dtype or parts[part].dtype)
        ]
        wrong += [f"{part} are not of this mode" for part in sorted(parts.keys() - wanted.keys())]
        scale_types = FLOATS if settings.mode == "affine" else (mx.uint8,)
        if scales.dtype not in scale_types:
            wrong.append(f"scales are {scales.dtype}")
        if elements % settings.bits or self.shape[-1] % settings.group_size or wrong:
            raise CheckpointError(
                f"tensor {name}: with {settings.bits} bits, groups of {settings.group_size}, mode {settings.mode}, a "
                f"weight of {weight.dtype} {weight.shape} and its scales and biases must fit together; found "
                f"{'; '.join(wrong) or f'rows of {self.shape[-1]} elements'}. Check `quantization` in config.json"
            )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, start: int, stop: int) -> mx.array:
        parts = {part: tensor.rows(start, stop) for part, tensor in self.parts.items()}
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(self.dtype), biases.astype(self.dtype)
        return self.settings.dequantize(parts["weight"], scales, biases, self.dtype)

    def each_part(self, name: str, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The same matrix with its rows moved: what moves the rows of every part moves its own."""
        return Packed(name, {part: change(tensor) for part, tensor in self.parts.items()}, self.settings)

    def columns(self, name: str, runs: Sequence[tuple[int, int]]) -> "Packed":
        """The same matrix with some runs of columns; no number changes, so that each must begin and end with a group.

        Raises:
            InvalidInput: one does not.
        """
        group, bits = self.settings.group_size, self.settings.bits
        if cut := [place for run in runs for place in run if place % group]:
            below = cut[0] // group * group
            raise InvalidInput(
                f"tensor {name} is quantized in groups of {group} columns, and can be cut between them only: at "
                f"{below} or {below + group}, not at {cut[0]}"
            )
        parts = {}
        for part, stored in self.parts.items():
            times, by = (bits, 32) if part == "weight" else (1, group)  # 32 columns are ``bits`` words
            parts[part] = Columns(stored, [(start * times // by, stop * times // by) for start, stop in runs])
        return Packed(name, parts, self.settings)


class SmallScales(Tensor):
    """Scales of eight bits, none of which may be NaN: 255 as a power of two (E8M0), 127 with either sign as E4M3.

    Source: OCP Microscaling Formats 1.0, section 5.4; OCP 8-bit Floating Point 1.0, table 1.
    """

    def __init__(self, name: str, tensor: Tensor, mode: str) -> None:
        self.name, self.tensor, self.shape, self.dtype = name, tensor, tensor.shape, tensor.dtype
        self.mask, self.nan = (127, 127) if mode == "nvfp4" else (255, 255)

    def _checked(self, scales: mx.array) -> mx.array:
        if mx.any(scales & self.mask == self.nan).item():
            raise CheckpointError(f"tensor {self.name} has a scale that is NaN; take an intact copy of the checkpoint")
        return scales

    def rows(self, start: int, stop: int) -> mx.array:
        return self._checked(self.tensor.rows(start, stop))

    def load(self) -> mx.array:
        return self._checked(self.tensor.load())


class Stacked(Tensor):
    """Tensors of one shape, one behind the other: E of (out, in) become (E, out, in)."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts, self.shape, self.dtype = parts, (len(parts), *parts[0].shape), parts[0].dtype

    @property
    def row_count(self) -> int:
        return len(self.parts) * self.parts[0].row_count

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int) -> mx.array:
        each = self.parts[0].row_count
        pieces = [
            self.parts[index].rows(max(start - index * each, 0), min(stop - index * each, each))
            for index in range(start // each, -(-stop // each))
        ]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def load(self) -> mx.array:
        return mx.stack([part.load() for part in self.parts])


class Rows(Tensor):
    """Some rows of every matrix of a tensor: ``pick`` lists them, in their new order.

    Shape:
        (..., out, in) -> (..., len(pick), in); (..., out) -> (..., len(pick)) where ``vector`` is set
    """

    def __init__(self, tensor: Tensor, pick: np.ndarray, vector: bool = False) -> None:
        self.tensor, self.pick, self.vector, self.dtype = tensor, pick, vector, tensor.dtype
        shape = tensor.shape
        self.shape = (*shape[:-1], len(pick)) if vector else (*shape[:-2], len(pick), shape[-1])

    def rows(self, start: int, stop: int) -> mx.array:
        if self.vector:
            return self.tensor.rows(start, stop)[:, mx.array(self.pick)]
        wanted, each = np.arange(start, stop), len(self.pick)
        source = wanted // each * self.tensor.shape[-2] + self.pick[wanted % each]
        low, high = int(source.min()), int(source.max()) + 1
        return self.tensor.rows(low, high)[mx.array(source - low)]

    def load(self) -> mx.array:
        return mx.take(self.tensor.load(), mx.array(self.pick), axis=-1 if self.vector else -2)


class Columns(Tensor):
    """Some runs (start, stop) of columns of every matrix of a tensor, side by side.

    Shape:
        (..., in) -> (..., sum of stop - start)
    """

    def __init__(self, tensor: Tensor, runs: Sequence[tuple[int, int]]) -> None:
        self.tensor, self.runs, self.dtype = tensor, tuple(runs), tensor.dtype
        self.shape = (*tensor.shape[:-1], sum(stop - start for start, stop in runs))

    def rows(self, start: int, stop: int) -> mx.array:
        return self._cut(self.tensor.rows(start, stop))

    def load(self) -> mx.array:
        return self._cut(self.tensor.load())

    def _cut(self, whole: mx.array) -> mx.array:
        """A copy: a view would hold the whole."""
        pieces = [whole[..., start:stop] for start, stop in self.runs]
        return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)


class Joined(Tensor):
    """Tensors side by side along the rows (axis -2) or the columns (axis -1) of a matrix, as parallel ranks cut it."""

    def __init__(self, parts: Sequence[Tensor], axis: Literal[-2, -1]) -> None:
        self.parts, self.axis, self.dtype = parts, axis, parts[0].dtype
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        self.shape = tuple(shape)

    def rows(self, start: int, stop: int) -> mx.array:
        if self.axis == -1:
            return mx.concatenate([part.rows(start, stop) for part in self.parts], axis=-1)
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.row_count)
            pieces += [part.rows(low, high)] if low < high else []
            first += part.row_count
        return mx.concatenate(pieces)

    def load(self) -> mx.array:
        return mx.concatenate([part.load() for part in self.parts], axis=self.axis)


class Transposed(Tensor):
    """The last two axes exchanged.

    One matrix at a time is held while its rows are read: a row of the transposed is spread over all of the file's.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self.shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        self._held: tuple[int, mx.array] | None = None

    def _matrix(self, index: int) -> mx.array:
        if self._held is None or self._held[0] != index:
            self._held = None  # let the old one go first
            high = self.tensor.shape[-2]
            self._held = index, self.tensor.rows(index * high, (index + 1) * high)
        return self._held[1]

    def rows(self, start: int, stop: int) -> mx.array:
        each = self.shape[-2]
        pieces = [
            self._matrix(index)[:, max(start - index * each, 0) : min(stop - index * each, each)].T
            for index in range(start // each, -(-stop // each))
        ]
        out = mx.contiguous(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces))
        if stop == self.row_count:
            mx.eval(out)
            self._held = None
        return out

    def load(self) -> mx.array:
        return mx.contiguous(self.tensor.load().swapaxes(-1, -2))


class Shaped(Tensor):
    """The same rows under other leading axes: (H · out, in) as (H, out, in)."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape, self.dtype = tensor, shape, tensor.dtype

    def rows(self, start: int, stop: int) -> mx.array:
        return self.tensor.rows(start, stop)

    def load(self) -> mx.array:
        return self.tensor.load().reshape(self.shape)
