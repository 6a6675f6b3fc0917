"""Lazily read matrices in MLX's quantized form: packed codes, scales and biases per group."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import mlx.core as mx

from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.tensor_views import SelectedColumns
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.quantization.scheme import Quantization


class QuantizedTensor(LazyTensor):
    """A quantized matrix: its rows are dequantized, its components are the stored arrays.

    The rows are float32 whatever the type of the scales: in float16, scale * code + bias would be
    off by an eighth of a step.

    Attributes:
        components: the tensors "weight", "scales" and, in affine mode, "biases".
        quantization: bits, group size and mode.

    Raises:
        CheckpointError: weight, scales and biases do not fit together. MLX would read beyond their
            ends.
    """

    def __init__(
        self, name: str, components: Mapping[str, LazyTensor], quantization: Quantization
    ) -> None:
        self.components = dict(components)
        self.quantization = quantization
        weight = components["weight"]
        scales = components["scales"]
        if quantization.mode != "affine":
            self.components["scales"] = Float8Scales(name, scales, quantization.mode)
        row_bits = prod(weight.shape[-1:]) * 32
        self.shape = (*weight.shape[:-1], row_bits // quantization.bits)
        self.dtype = mx.float32
        wrong = self._mismatches(components)
        if row_bits % quantization.bits or self.shape[-1] % quantization.group_size or wrong:
            raise CheckpointError(
                f"tensor {name}: with {quantization.bits} bits, groups of "
                f"{quantization.group_size}, mode {quantization.mode}, a weight of {weight.dtype} "
                f"{weight.shape} and its scales and biases must fit together; found "
                f"{'; '.join(wrong) or f'rows of {self.shape[-1]} elements'}. Check `quantization` "
                "in config.json"
            )

    def _mismatches(self, components: Mapping[str, LazyTensor]) -> list[str]:
        """Describe each component whose dtype or shape differs from the required one."""
        scales = components["scales"]
        affine = self.quantization.mode == "affine"
        scales_shape = self.quantization.scales_shape(self.shape)
        required: dict[str, tuple[mx.Dtype | None, tuple[int, ...]]] = {
            "weight": (mx.uint32, components["weight"].shape),
            "scales": (None, scales_shape),
        }
        if affine:
            required["biases"] = (scales.dtype, scales_shape)
        wrong = []
        for key, (dtype, shape) in required.items():
            tensor = components.get(key)
            if tensor is None:
                wrong.append(f"{key} is missing")
            elif tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype):
                wrong.append(f"{key} is {tensor.dtype} {tensor.shape}")
        wrong += [
            f"{key} are not of this mode" for key in sorted(components.keys() - required.keys())
        ]
        if scales.dtype not in (FLOAT_DTYPES if affine else (mx.uint8,)):
            wrong.append(f"scales are {scales.dtype}")
        return wrong

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.components.values())

    def read_rows(self, start: int, stop: int) -> mx.array:
        rows = {key: tensor.read_rows(start, stop) for key, tensor in self.components.items()}
        scales = rows["scales"]
        biases = rows.get("biases")
        if biases is not None:
            scales = scales.astype(self.dtype)
            biases = biases.astype(self.dtype)
        return self.quantization.dequantize(rows["weight"], scales, biases, self.dtype)

    def map_components(
        self, name: str, change: Callable[[LazyTensor], LazyTensor]
    ) -> "QuantizedTensor":
        """Apply a change of rows, such as a selection, to weight, scales and biases alike."""
        return QuantizedTensor(
            name,
            {key: change(tensor) for key, tensor in self.components.items()},
            self.quantization,
        )

    def select_columns(self, name: str, ranges: Sequence[tuple[int, int]]) -> "QuantizedTensor":
        """Select ranges (start, stop) of columns that begin and end with a group.

        Raises:
            InvalidInput: a range begins or ends inside a group.
        """
        group = self.quantization.group_size
        bits = self.quantization.bits
        if inside := [position for ends in ranges for position in ends if position % group]:
            below = inside[0] // group * group
            raise InvalidInput(
                f"tensor {name} is quantized in groups of {group} columns, and can be cut between "
                "them only: at "
                f"{below} or {below + group}, not at {inside[0]}"
            )
        components = {}
        for key, tensor in self.components.items():
            # 32 columns of codes are ``bits`` uint32 words; a group of columns is one scale.
            times, divisor = (bits, 32) if key == "weight" else (1, group)
            components[key] = SelectedColumns(
                tensor,
                [(start * times // divisor, stop * times // divisor) for start, stop in ranges],
            )
        return QuantizedTensor(name, components, self.quantization)


class Float8Scales(LazyTensor):
    """Scales of eight bits, checked for NaN.

    NaN is 255 in a power of two (E8M0), and 127 with either sign in E4M3.

    Source: OCP Microscaling Formats 1.0, section 5.4; OCP 8-bit Floating Point 1.0, table 1.
    """

    def __init__(self, name: str, tensor: LazyTensor, mode: str) -> None:
        self.name = name
        self.tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.mask, self.nan = (127, 127) if mode == "nvfp4" else (255, 255)

    def _check(self, scales: mx.array) -> mx.array:
        if mx.any(scales & self.mask == self.nan).item():
            raise CheckpointError(
                f"tensor {self.name} has a scale that is NaN; take an intact copy of the checkpoint"
            )
        return scales

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self._check(self.tensor.read_rows(start, stop))

    def load(self) -> mx.array:
        return self._check(self.tensor.load())
