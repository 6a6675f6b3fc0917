"""Which settings exist, and which of them fit a row."""

import mlx.core as mx
import pytest

from mlxarch.errors import QuantizationError
from mlxarch.quantization.scheme import (
    Quantization,
    check_quantization,
    default_bits,
    fit_group_size,
    stored_arrays,
)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_affine_setting_is_accepted(bits: int, group: int) -> None:
    assert check_quantization(bits, group) == Quantization(bits, group, "affine")


@pytest.mark.parametrize(
    "mode, bits, group", [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
)
def test_a_mode_fixes_bits_and_group(mode: str, bits: int, group: int) -> None:
    assert default_bits(mode) == bits
    assert (
        check_quantization(bits, None, mode)
        == check_quantization(bits, group, mode)
        == Quantization(bits, group, mode)
    )
    with pytest.raises(QuantizationError, match=f"mode {mode} allows groups of {group}"):
        check_quantization(bits, 64, mode)
    with pytest.raises(QuantizationError, match=f"mode {mode} allows {bits} bits"):
        check_quantization(6, None, mode)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "7 bits: mode affine allows 2, 3, 4, 5, 6, 8 bits"),
        ((True,), "True bits"),
        ((4, 16), "group size 16: mode affine allows groups of 32, 64, 128"),
        ((4, None, "q4_k"), "mode 'q4_k' does not exist; allowed: affine, mxfp4"),
    ],
)
def test_other_settings_are_refused_and_the_allowed_ones_named(
    arguments: tuple, message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        check_quantization(*arguments)


def test_a_row_takes_the_largest_group_that_divides_it() -> None:
    assert [fit_group_size(Quantization(4, 128), n) for n in (256, 192, 96)] == [
        Quantization(4, g) for g in (128, 64, 32)
    ]
    assert fit_group_size(Quantization(4, 32), 256) == Quantization(4, 32), (
        "never a larger one than was asked for"
    )
    assert fit_group_size(Quantization(4, 128), 48) is None
    assert fit_group_size(Quantization(4, 32, "mxfp4"), 48) is None
    assert fit_group_size(Quantization(4, 64), 0) is None


@pytest.mark.parametrize(
    "wanted", [*(Quantization(b, 32) for b in (2, 3, 5, 6, 8)), Quantization(4, 16, "nvfp4")]
)
def test_the_arithmetic_of_shapes_is_that_of_mlx(wanted: Quantization) -> None:
    arrays = mx.quantize(mx.ones((6, 96)), wanted.group_size, wanted.bits, wanted.mode)
    shapes = [shape for _, shape in stored_arrays(wanted, (6, 96), "F32").values()]
    assert shapes == [array.shape for array in arrays]
