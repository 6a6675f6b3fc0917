"""Quantization of keys and values: group size and bytes of one vector.

A vector is rotated by a Hadamard transform and then quantized on its own (``kv_cache.quantized``),
in groups of its features.
"""

from dataclasses import replace

from mlxarch.errors import QuantizationError
from mlxarch.quantization.formats import KV_BITS, KV_GROUP_SIZES
from mlxarch.quantization.scheme import Quantization


def fit_kv_quantization(kv: Quantization, features: int) -> tuple[Quantization, int]:
    """Choose the largest allowed group size that divides vectors of ``features`` elements.

    Returns:
        The quantization, and the length of the vectors. If no group size divides them, they are
        padded to the next multiple of the smallest.

    Raises:
        QuantizationError: bits, group size or mode are not supported for keys and values.
    """
    if kv.bits not in KV_BITS or kv.group_size not in KV_GROUP_SIZES or kv.mode != "affine":
        raise QuantizationError(
            f"keys and values are quantized to {' or '.join(map(str, KV_BITS))} bits, affine, with "
            f"groups of {', '.join(map(str, sorted(KV_GROUP_SIZES)))}; found {kv.bits} bits, "
            f"{kv.mode}, groups of {kv.group_size}"
        )
    group = next(
        (size for size in KV_GROUP_SIZES if size <= kv.group_size and features % size == 0),
        KV_GROUP_SIZES[-1],
    )
    return replace(kv, group_size=group), -(-features // group) * group


def vector_bytes(features: int, kv: Quantization | None, float_bytes: int) -> int:
    """Bytes of one token's key or value in one head, including scales and biases.

    Args:
        features: size of the head.
        kv: quantization; None for floating point.
        float_bytes: bytes of one floating-point number.
    """
    if kv is None:
        return features * float_bytes
    fitted, padded = fit_kv_quantization(kv, features)
    return padded * fitted.bits // 8 + 2 * (padded // fitted.group_size) * float_bytes
