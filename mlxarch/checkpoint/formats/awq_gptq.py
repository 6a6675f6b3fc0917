"""AWQ and GPTQ matrices as lazily read tensors in MLX's affine mode.

Both formats have integer codes with a scale and a zero point per group. A value is (code - zero) *
scale. In MLX's affine mode it is scale * code + bias with bias = -zero *
scale: codes are rearranged and no value is computed anew. The product is exact in float32; if every
zero point is the middle code, a power of two, it is exact in the scales' own dtype too.
Source: AutoAWQ's awq/utils/packing_utils.py (version gemm) and AutoGPTQ's qlinear modules; ``gptq``
stores zero points less one, ``gptq_v2`` as they are (gptqmodel).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor, lossless_origin
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.quantization.formats import MODES
from mlxarch.quantization.scheme import Quantization

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in a word of each of eight neighbouring outputs
CACHE_BYTES = 16 << 20  # of a stored matrix that are kept in memory while it is transposed
CHUNK_BYTES = 4 << 20  # in float32, read at a time when a whole matrix is loaded
TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")

# Supported values of the config's keys; a missing key or null stands for the first value.
SUPPORTED_COMMON: dict[str, tuple[Any, ...]] = {
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "dynamic": ({}, None),
}
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
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
class AwqGptqConfig:
    """Parsed ``quantization_config`` of an AWQ or GPTQ checkpoint.

    Attributes:
        method: awq or gptq.
        bits: bits of a code.
        group_size: inputs that share a scale, fewer in the last group if it does not divide them;
            -1 for all inputs.
        zero_offset: number added to a stored zero point.
        symmetric: every zero point is the middle code.
        act_order: ``g_idx`` gives the group of each input, in activation order (``desc_act``).
        output_order: position in a word of each of eight neighbouring outputs, AWQ only; None if a
            word holds neighbouring inputs.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int = 0
    symmetric: bool = False
    act_order: bool = False
    output_order: tuple[int, ...] | None = None


def parse_config(section: Mapping[str, Any]) -> AwqGptqConfig:
    """Parse ``quantization_config``.

    Raises:
        ConfigError: it describes an unsupported variant.
    """
    method = str(section["quant_method"])
    supported = SUPPORTED[method] | SUPPORTED_COMMON
    values = {
        key: allowed[0] if section.get(key) is None else section[key]
        for key, allowed in supported.items()
    }
    group_size = section.get("group_size", 128)
    wrong = [
        f"{key} {value!r}" for key, value in values.items() if not is_one_of(value, supported[key])
    ]
    if type(group_size) is not int or (group_size != -1 and not 8 <= group_size <= 1 << 20):
        wrong.append(f"group_size {group_size!r}")
    if wrong:
        raise ConfigError(
            f"config.json: the weights are packed by {method!r} with {', '.join(wrong)}, which "
            "mlxarch "
            "does not read; it reads awq with version gemm, 4 bits and zero points, and gptq or "
            "gptq_v2 with 2, 4 or 8 bits. Take the original checkpoint, or one that is quantized "
            "for MLX"
        )
    if method == "awq":
        return AwqGptqConfig(method, 4, group_size, output_order=AWQ_ORDER)
    zero_offset = int("gptq_v2" not in (values["checkpoint_format"], values["format"]))
    return AwqGptqConfig(
        method, values["bits"], group_size, zero_offset, values["sym"], values["desc_act"]
    )


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Return whether a value is allowed, type included: 4.0 is not 4, and 1 is not True."""
    return any(type(value) is type(each) and value == each for each in allowed)


def convert_tensors(
    stored: Mapping[str, LazyTensor], config: AwqGptqConfig
) -> dict[str, LazyTensor]:
    """Join ``X.qweight`` with its scales, zero points and groups as ``X.weight``.

    The result is in MLX's affine mode, or float32 if MLX cannot represent the grouping.

    Raises:
        CheckpointError: a tensor of a matrix is missing, or shapes do not match.
    """
    matrices = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    required = ["qzeros", "scales"]
    if config.act_order:
        required.append("g_idx")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        base, _, role = name.rpartition(".")
        if role == "qweight":
            if missing := [f"{base}.{key}" for key in required if f"{base}.{key}" not in stored]:
                raise CheckpointError(
                    f"tensor {name} has no {missing[0]} beside it; download the checkpoint again"
                )
            weight = f"{base}.weight"
            if weight in stored:
                raise CheckpointError(f"tensors {name} and {weight} cannot both be there")
            arrays = {
                key: stored[f"{base}.{key}"] for key in TENSOR_NAMES if f"{base}.{key}" in stored
            }
            tensors[weight] = _convert_matrix(_StoredMatrix(weight, arrays, config))
        elif role in TENSOR_NAMES and base not in matrices:
            raise CheckpointError(
                f"tensor {name} has no {base}.qweight beside it; download the checkpoint again"
            )
        elif role not in TENSOR_NAMES:
            tensors[name] = tensor
    return tensors


def _convert_matrix(stored: "_StoredMatrix") -> LazyTensor:
    config = stored.config
    group_sizes = sorted(MODES["affine"][1], reverse=True)
    fitting = [
        size for size in group_sizes if stored.group_size % size == stored.shape[1] % size == 0
    ]
    if config.act_order or not fitting:
        return _Dequantized(stored)
    quantization = Quantization(config.bits, fitting[0])
    dtype = stored.scales.tensor.dtype if config.symmetric else mx.float32
    dtypes = {"weight": mx.uint32, "scales": dtype, "biases": dtype}
    components = {key: _Component(stored, key, quantization, dtypes[key]) for key in dtypes}
    matrix = QuantizedTensor(stored.name, components, quantization)
    matrix.origin = lossless_origin(f"packed by {config.method}, {config.bits} bits", dtype)
    return matrix


class _ColumnReader:
    """Ranges of columns of a stored matrix (R, C), read in blocks: the last block is cached."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self._cached: tuple[int, mx.array] | None = None

    def read(self, start: int, stop: int) -> mx.array:
        """Read columns ``start`` to ``stop``: (R, stop - start)."""
        rows, columns = self.tensor.shape
        if self._cached is None or not self._covers(start, stop):
            self._cached = None  # frees the old block first
            width = max(CACHE_BYTES // max(rows * self.tensor.dtype.size, 1), stop - start)
            self._cached = (start, self.tensor.read_columns(start, min(start + width, columns)))
        first, block = self._cached
        if stop == columns:
            self._cached = None
        return block[:, start - first : stop - first]

    def _covers(self, start: int, stop: int) -> bool:
        assert self._cached is not None
        first, block = self._cached
        return first <= start <= stop <= first + block.shape[1]


class _StoredMatrix:
    """A stored matrix (out, in), read by rows: codes, scales and zero points, with matching shapes.

    Raises:
        CheckpointError: their shapes or dtypes do not match.
    """

    def __init__(self, name: str, arrays: Mapping[str, LazyTensor], config: AwqGptqConfig) -> None:
        self.name = name
        self.config = config
        self.per_word = 32 // config.bits
        codes = arrays["qweight"]
        scales = arrays["scales"]
        outputs = scales.shape[1] if len(scales.shape) == 2 else 0
        inputs = codes.shape[0] if codes.shape else 0
        if not config.output_order:
            inputs *= self.per_word
        self.group_size = inputs if config.group_size == -1 else config.group_size
        wrong = self._mismatches(arrays, inputs, outputs)
        if wrong or not inputs or inputs % self.per_word or outputs % self.per_word:
            raise CheckpointError(
                f"tensor {name}: with {config.bits} bits in groups of {config.group_size}, codes, "
                "zero "
                "points and scales must fit together; found "
                f"{'; '.join(wrong) or f'a matrix ({outputs}, {inputs})'}. Check "
                "`quantization_config` in config.json"
            )
        self.shape = (outputs, inputs)
        self._codes = _ColumnReader(codes)
        self._zeros = _ColumnReader(arrays["qzeros"])
        self.scales = _ColumnReader(scales)
        self._stored_groups = arrays.get("g_idx")
        self._groups = None

    def _mismatches(self, arrays: Mapping[str, LazyTensor], inputs: int, outputs: int) -> list[str]:
        """Describe the arrays whose shape or dtype differs from the one required."""
        groups = -(-inputs // self.group_size) if self.group_size else 0
        per_word = self.per_word
        codes_shape = (inputs // per_word, outputs)
        if self.config.output_order:
            codes_shape = (inputs, outputs // per_word)
        required = {
            "qweight": codes_shape,
            "qzeros": (groups, outputs // per_word),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }
        wrong = []
        for key, shape in required.items():
            array = arrays.get(key)
            if array is None:
                continue
            dtypes = FLOAT_DTYPES if key == "scales" else (mx.int32, mx.uint32)
            if array.shape != shape or array.dtype not in dtypes:
                wrong.append(f"{key} is {array.dtype} {array.shape}, wanted {shape}")
        return wrong

    @property
    def nbytes(self) -> int:
        return sum(reader.tensor.nbytes for reader in (self._codes, self._zeros, self.scales))

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Read the codes of rows: (stop - start, in) in uint8."""
        self.groups()  # validates the stored groups
        if self.config.output_order:
            return self._unpack_outputs(self._codes, start, stop)
        words = np.array(self._codes.read(start, stop).view(mx.uint32).T)  # (rows, in / per_word)
        return self._unpack(words).reshape(stop - start, -1)

    def packed_codes(self, start: int, stop: int) -> mx.array:
        """Read the codes of rows in MLX's bit layout: (stop - start, in / per_word) in uint32."""
        self.groups()
        if not self.config.output_order:
            # GPTQ's words hold neighbouring inputs, the first in the lowest bits, as MLX's do.
            return mx.contiguous(self._codes.read(start, stop).view(mx.uint32).T)
        codes = self._unpack_outputs(self._codes, start, stop)
        return mx.array(np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<u4"))

    def zeros(self, start: int, stop: int) -> np.ndarray:
        """Read the zero points of rows: (stop - start, groups) in uint8."""
        bits = self.config.bits
        stored = self._unpack_outputs(self._zeros, start, stop)
        zeros = stored + np.uint8(self.config.zero_offset) & 2**bits - 1
        middle = 2 ** (bits - 1)
        if self.config.symmetric and (zeros != middle).any():
            raise CheckpointError(
                f"tensor {self.name} has a zero point that is not {middle}, though config.json "
                'says `"sym": true`; set it to false'
            )
        return zeros

    def groups(self) -> np.ndarray:
        """Return the group of every input: (in,).

        Raises:
            CheckpointError: the stored groups contradict the config, or exceed the number of
                groups.
        """
        if self._groups is None:
            inputs = self.shape[1]
            count = -(-inputs // self.group_size)
            consecutive = np.arange(inputs) // self.group_size
            stored = None
            if self._stored_groups is not None:
                stored = np.array(self._stored_groups.load()).astype(np.int64)
            if stored is not None and not self.config.act_order and (stored != consecutive).any():
                raise CheckpointError(
                    f"tensor {self.name} has inputs in an order of its own, and config.json says "
                    '`"desc_act": false`; set it to true'
                )
            if stored is not None and not (stored.min() >= 0 and stored.max() < count):
                raise CheckpointError(
                    f"tensor {self.name} has inputs of a group that is none of its {count}"
                )
            self._groups = consecutive if stored is None else stored
        return self._groups

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """Unpack the codes of words, lowest bits first: uint32 (…) -> uint8 (…, per_word)."""
        bits = self.config.bits
        octets = words[..., None].view(np.uint8)  # (…, 4)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = octets[..., None] >> shifts & np.uint8(2**bits - 1)
        return codes.reshape(*words.shape, self.per_word)

    def _unpack_outputs(self, columns: _ColumnReader, start: int, stop: int) -> np.ndarray:
        """Unpack words of neighbouring outputs: (R, out / per_word) -> uint8 (stop - start, R)."""
        per_word = self.per_word
        first = start // per_word
        words = np.array(columns.read(first, -(-stop // per_word)).view(mx.uint32).T)  # (words, R)
        codes = self._unpack(words).swapaxes(1, 2)  # (words, per_word, R)
        if self.config.output_order:
            codes = codes[:, list(self.config.output_order)]
        rows = codes.reshape(-1, codes.shape[-1])
        return rows[start - first * per_word : stop - first * per_word]


class _ComputedRows(LazyTensor):
    """A tensor whose rows are computed; the whole tensor is loaded in chunks, to bound memory."""

    def load(self) -> mx.array:
        step = max(CHUNK_BYTES // (4 * self.shape[-1]), 1)
        pieces = []
        for start in range(0, self.row_count, step):
            pieces.append(self.read_rows(start, min(start + step, self.row_count)))
            mx.eval(pieces[-1])
        return mx.concatenate(pieces)


class _Component(_ComputedRows):
    """Weight, scales or biases of a matrix in MLX's affine mode."""

    def __init__(
        self, stored: _StoredMatrix, key: str, quantization: Quantization, dtype: mx.Dtype
    ) -> None:
        self.stored = stored
        self.group_size = quantization.group_size
        self.key = key
        find_shape = quantization.packed_shape if key == "weight" else quantization.scales_shape
        self.shape = find_shape(stored.shape)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes if self.key == "weight" else 0

    def read_rows(self, start: int, stop: int) -> mx.array:
        if self.key == "weight":
            return self.stored.packed_codes(start, stop)
        values = self.stored.scales.read(start, stop).T.astype(self.dtype)  # (rows, groups)
        if self.key == "biases":
            values = -values * mx.array(self.stored.zeros(start, stop)).astype(self.dtype)
        times = self.stored.group_size // self.group_size
        return mx.repeat(values, times, axis=-1)[:, : self.shape[-1]]  # the last may be shorter


class _Dequantized(_ComputedRows):
    """A matrix in float32: its groups are not consecutive, or MLX has no groups of that size."""

    dtype = mx.float32

    def __init__(self, stored: _StoredMatrix) -> None:
        self.stored = stored
        self.shape = stored.shape
        reason = f"groups of {stored.group_size}"
        if stored.config.act_order:
            reason = "the order of activations"
        self.origin = (
            f"packed by {stored.config.method} with {reason}, which MLX's packing cannot hold: "
            "unpacked to float32"
        )

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def read_rows(self, start: int, stop: int) -> mx.array:
        scales = self.stored.scales.read(start, stop).T.astype(mx.float32)
        codes = self.stored.codes(start, stop).astype(np.int16)
        zeros = self.stored.zeros(start, stop).astype(np.int16)
        groups = self.stored.groups()
        steps = mx.array(codes - zeros[:, groups]).astype(mx.float32)
        return steps * mx.take(scales, mx.array(groups), axis=1)
