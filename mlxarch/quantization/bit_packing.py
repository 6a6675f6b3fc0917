"""Bit layout of MLX's quantized arrays: codes packed into uint32 words.

The codes of a row form one stream of bits, lowest bits first; a code may cross the border between
two words (3, 5 and 6 bits).
"""

import mlx.core as mx

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Pack integer codes into words.

    Shape:
        codes: (R, columns) in uint8 -> (R, columns * bits / 32) in uint32
    """
    width = bits
    while width % 8:  # join neighbours until they fill whole bytes
        width *= 2
        wide = _UNSIGNED[next(size for size in _UNSIGNED if 8 * size >= width)]
        high = mx.left_shift(codes[:, 1::2].astype(wide), mx.array(width // 2, wide))
        codes = codes[:, 0::2].astype(wide) | high
    octets = codes[..., None].view(mx.uint8)[..., : width // 8]
    return mx.contiguous(octets.flatten(1)).view(mx.uint32)
