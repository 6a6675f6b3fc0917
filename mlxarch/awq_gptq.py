"""AWQ and GPTQ: integers in groups with a scale and a zero point each, in words that hold a matrix by its inputs.

A value is (code - zero) * scale, which in MLX's affine mode is scale * code + bias with bias = -zero * scale: the codes
are moved and nothing is computed anew. The product is exact in float32; where every zero point is the middle code, a
power of two, it is exact in the scales' own type too.
Source: AutoAWQ's awq/utils/packing_utils.py (version gemm) and AutoGPTQ's qlinear modules; ``gptq`` stores zero points
less one, ``gptq_v2`` as they are (gptqmodel).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.packing import Quantization
from mlxarch.tensors import FLOATS, Packed, Tensor, without_loss

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the first, second … of eight neighbouring outputs stands
PANEL = 16 << 20  # bytes of a stored matrix that are held to be turned
PIECE = 4 << 20  # bytes in float32 of a piece, where a whole matrix is asked for
ROLES = ("qweight", "qzeros", "scales", "g_idx")

# What the settings may be; a key that is missing or None is left to the first value.
COMMON: dict[str, tuple[Any, ...]] = {"pack_dtype": ("int32",), "is_marlin_format": (False,), "dynamic": ({}, None)}
KNOWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "version": ("gemm", "GEMM"), "format": ("gemm",), "zero_point": (True,)},
    "gptq": {
        "bits": (4, 2, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "sym": (True, False),
        "desc_act": (False, True),
    },
}


@dataclass(frozen=True)
class Settings:
    """How the matrices are packed.

    Attributes:
        group: inputs that share a scale; -1 is all of them.
        plus: what is added to a stored zero point.
        symmetric: every zero point is the middle code.
        ordered: an input's group is told by ``g_idx``, in the order of activations, and not by its place.
        order: where an output stands in its word, of AWQ.
    """

    method: str
    bits: int
    group: int
    plus: int = 0
    symmetric: bool = False
    ordered: bool = False
    order: tuple[int, ...] | None = None


def settings_of(section: Mapping[str, Any]) -> Settings:
    """Read ``quantization_config``.

    Raises:
        ConfigError: it describes a variant that is not read.
    """
    method = str(section["quant_method"])
    known = KNOWN[method] | COMMON
    found = {key: allowed[0] if section.get(key) is None else section[key] for key, allowed in known.items()}
    group = section.get("group_size", 128)
    wrong = [f"{key} {value!r}" for key, value in found.items() if not is_one_of(value, known[key])]
    if type(group) is not int or (group != -1 and not 8 <= group <= 1 << 20):
        wrong.append(f"group_size {group!r}")
    if wrong:
        raise ConfigError(
            f"config.json: the weights are packed by {method!r} with {', '.join(wrong)}, which mlxarch does not read; "
            "it reads awq with version gemm, 4 bits and zero points, and gptq or gptq_v2 with 2, 4 or 8 bits. Take the "
            "original checkpoint, or one that is quantized for MLX"
        )
    if method == "awq":
        return Settings(method, 4, group, order=AWQ_ORDER)
    plus = int("gptq_v2" not in (found["checkpoint_format"], found["format"]))
    return Settings(method, found["bits"], group, plus, found["sym"], found["desc_act"])


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether it is there, type and all: 4.0 is not 4, and 1 is not True."""
    return any(type(value) is type(each) and value == each for each in allowed)


def unpack(stored: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """``X.qweight`` with its scales, zero points and groups become ``X.weight``, packed for MLX where it has the form.

    Raises:
        CheckpointError: tensors that belong together are not all there, or do not fit.
    """
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        base, _, role = name.rpartition(".")
        if role == "qweight":
            needed = ("qzeros", "scales", *(["g_idx"] if settings.ordered else []))
            if missing := [f"{base}.{each}" for each in needed if f"{base}.{each}" not in stored]:
                raise CheckpointError(f"tensor {name} has no {missing[0]} beside it; download the checkpoint again")
            if f"{base}.weight" in stored:
                raise CheckpointError(f"tensors {name} and {base}.weight cannot both be there")
            parts = {each: stored[f"{base}.{each}"] for each in ROLES if f"{base}.{each}" in stored}
            tensors[f"{base}.weight"] = _matrix(_Grid(f"{base}.weight", parts, settings))
        elif role in ROLES and base not in packed:
            raise CheckpointError(f"tensor {name} has no {base}.qweight beside it; download the checkpoint again")
        elif role not in ROLES:
            tensors[name] = tensor
    return tensors


def _matrix(grid: "_Grid") -> Tensor:
    settings = grid.settings
    fitting = [size for size in (128, 64, 32) if grid.group % size == 0]
    if settings.ordered or not fitting:
        return _Unpacked(grid)
    quantization = Quantization(settings.bits, fitting[0])
    dtype = grid.scales.tensor.dtype if settings.symmetric else mx.float32
    per_group = quantization.scales_shape(grid.shape)
    parts = {
        "weight": _Part(grid, "weight", quantization.packed_shape(grid.shape), mx.uint32),
        "scales": _Part(grid, "scales", per_group, dtype),
        "biases": _Part(grid, "biases", per_group, dtype),
    }
    matrix = Packed(grid.name, parts, quantization)
    matrix.origin = without_loss(f"packed by {settings.method}, {settings.bits} bits", dtype)
    return matrix


class _Columns:
    """The columns of a stored matrix (R, C) by ranges. A panel of them is held, which the next range may lie in."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._held: tuple[int, mx.array] | None = None

    def read(self, start: int, stop: int) -> mx.array:
        """Columns ``start`` to ``stop``: (R, stop - start)."""
        if self._held is None or not self._held[0] <= start <= stop <= self._held[0] + self._held[1].shape[1]:
            self._held = None  # let the old panel go first
            width = max(PANEL // max(self.tensor.shape[0] * self.tensor.dtype.size, 1), stop - start)
            self._held = start, self.tensor.panel(start, min(start + width, self.tensor.shape[1]))
        first, panel = self._held
        if stop == self.tensor.shape[1]:
            self._held = None
        return panel[:, start - first : stop - first]


class _Grid:
    """A matrix (out, in) by ranges of its rows: codes, scales and zero points, checked against each other."""

    def __init__(self, name: str, parts: Mapping[str, Tensor], settings: Settings) -> None:
        self.name, self.settings, self.each = name, settings, 32 // settings.bits
        codes, zeros, scales, groups = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
        outputs = scales.shape[1] if len(scales.shape) == 2 else 0
        inputs = codes.shape[0] * (1 if settings.order else self.each) if codes.shape else 0
        self.group = inputs if settings.group == -1 else settings.group
        count = inputs // self.group if self.group else 0
        wanted = {
            "qweight": ((inputs, outputs // self.each) if settings.order else (inputs // self.each, outputs)),
            "qzeros": (count, outputs // self.each),
            "scales": (count, outputs),
            "g_idx": (inputs,),
        }
        wrong = [
            f"{role} is {part.dtype} {part.shape}, wanted {shape}"
            for role, shape in wanted.items()
            if (part := parts.get(role)) is not None
            and (part.shape != shape or part.dtype not in (FLOATS if role == "scales" else (mx.int32, mx.uint32)))
        ]
        if wrong or not inputs or inputs % self.group or inputs % self.each or outputs % self.each:
            raise CheckpointError(
                f"tensor {name}: with {settings.bits} bits in groups of {settings.group}, codes, zero points and "
                f"scales must fit together; found {'; '.join(wrong) or f'a matrix ({outputs}, {inputs})'}. Check "
                "`quantization_config` in config.json"
            )
        self.shape = (outputs, inputs)
        self._codes, self._zeros, self.scales = _Columns(codes), _Columns(zeros), _Columns(scales)
        self._stored_groups, self._groups = groups, None

    @property
    def nbytes(self) -> int:
        return sum(part.tensor.nbytes for part in (self._codes, self._zeros, self.scales))

    def codes(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, in) in uint8."""
        self.groups()  # checks them
        if self.settings.order:
            return self._of_words(self._codes, start, stop)
        words = np.array(self._codes.read(start, stop).view(mx.uint32).T)  # (rows, in / each)
        return self._split(words).reshape(stop - start, -1)

    def words(self, start: int, stop: int) -> mx.array:
        """The codes as MLX packs them: (stop - start, in / each)."""
        self.groups()
        if not self.settings.order:  # GPTQ's words hold neighbouring inputs, the first in the lowest bits, as MLX's do
            return mx.contiguous(self._codes.read(start, stop).view(mx.uint32).T)
        codes = self._of_words(self._codes, start, stop)
        return mx.array(np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<u4"))

    def zeros(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, groups) in uint8."""
        zeros = self._of_words(self._zeros, start, stop) + np.uint8(self.settings.plus) & 2**self.settings.bits - 1
        if self.settings.symmetric and (zeros != 2 ** (self.settings.bits - 1)).any():
            raise CheckpointError(
                f"tensor {self.name} has a zero point that is not {2 ** (self.settings.bits - 1)}, though config.json "
                'says `"sym": true`; set it to false'
            )
        return zeros

    def groups(self) -> np.ndarray:
        """The group of every input (in,)."""
        if self._groups is None:
            count, inputs = self.shape[1] // self.group, self.shape[1]
            by_place = np.arange(inputs) // self.group
            told = None if self._stored_groups is None else np.array(self._stored_groups.load()).astype(np.int64)
            if told is not None and not self.settings.ordered and (told != by_place).any():
                raise CheckpointError(
                    f'tensor {self.name} has inputs in an order of its own, and config.json says `"desc_act": false`; '
                    "set it to true"
                )
            if told is not None and not (told.min() >= 0 and told.max() < count):
                raise CheckpointError(f"tensor {self.name} has inputs of a group that is none of its {count}")
            self._groups = by_place if told is None else told
        return self._groups

    def _split(self, words: np.ndarray) -> np.ndarray:
        """uint32 (…) -> uint8 (…, each): the fields of every word, the lowest first."""
        bits = self.settings.bits
        octets = words[..., None].view(np.uint8)  # (…, 4)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (octets[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*words.shape, self.each)

    def _of_words(self, columns: _Columns, start: int, stop: int) -> np.ndarray:
        """Of words that hold neighbouring outputs: (R, out / each) -> the fields (stop - start, R) in uint8."""
        first = start // self.each
        words = np.array(columns.read(first, -(-stop // self.each)).view(mx.uint32).T)  # (words, R)
        fields = self._split(words).swapaxes(1, 2)  # (words, each, R)
        if self.settings.order:
            fields = fields[:, list(self.settings.order)]
        return fields.reshape(-1, fields.shape[-1])[start - first * self.each : stop - first * self.each]


class _Piecewise(Tensor):
    """A tensor whose rows are computed: a whole one is put together from pieces."""

    def load(self) -> mx.array:
        step, pieces = max(PIECE // (4 * self.shape[-1]), 1), []
        for start in range(0, self.row_count, step):
            pieces.append(self.rows(start, min(start + step, self.row_count)))
            mx.eval(pieces[-1])
        return mx.concatenate(pieces)


class _Part(_Piecewise):
    """Weight, scales or biases of a matrix as MLX packs it."""

    def __init__(self, grid: _Grid, part: str, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.grid, self.part, self.shape, self.dtype = grid, part, shape, dtype

    @property
    def nbytes(self) -> int:
        return {"weight": self.grid.nbytes, "scales": 0, "biases": 0}[self.part]

    def rows(self, start: int, stop: int) -> mx.array:
        if self.part == "weight":
            return self.grid.words(start, stop)
        values = self.grid.scales.read(start, stop).T.astype(self.dtype)  # (rows, groups)
        if self.part == "biases":
            values = -values * mx.array(self.grid.zeros(start, stop)).astype(self.dtype)
        return mx.repeat(values, self.shape[-1] // values.shape[-1], axis=-1)


class _Unpacked(_Piecewise):
    """A matrix as float32, where inputs of a group do not stand together or MLX has no groups of that size."""

    dtype = mx.float32

    def __init__(self, grid: _Grid) -> None:
        self.grid, self.shape = grid, grid.shape
        why = "the order of activations" if grid.settings.ordered else f"groups of {grid.group}"
        self.origin = (
            f"packed by {grid.settings.method} with {why}, which MLX's packing cannot hold: unpacked to float32"
        )

    @property
    def nbytes(self) -> int:
        return self.grid.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        scales = self.grid.scales.read(start, stop).T.astype(mx.float32)
        codes, zeros = self.grid.codes(start, stop), self.grid.zeros(start, stop).astype(np.int16)
        groups = self.grid.groups()
        steps = mx.array(codes.astype(np.int16) - zeros[:, groups]).astype(mx.float32)
        return steps * mx.take(scales, mx.array(groups), axis=1)
