"""Tables of quantization formats: allowed bits, group sizes and modes of weights and KV cache.

Plain data without MLX, so that the command line can offer the same values that the loader checks.
Source: the table of quantization modes in MLX's documentation of ``mx.quantize``.
"""

MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Bits and group sizes that each mode allows; the first group size is the mode's default."""

BITS = MODES["affine"][0]
"""Bits of affine weights."""

DEFAULT_BITS = (8, 4)
"""Bits of weights that are tried where the user names none, largest first."""

KV_BITS = (8, 4)
"""Bits of keys and values in a quantized KV cache; always affine."""

KV_GROUP_SIZES = (128, 64, 32)
"""Group sizes of keys and values, largest first."""

KV_GROUP_SIZE = 64
"""Group size of keys and values where only their bits are named."""
