"""Codes and scales against ``mx.quantize``, and against the error that it makes."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.methods.rounding import all_finite, round_to_nearest

BITS = (2, 3, 4, 5, 6, 8)


def noise(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * 0.02


def restored(parts: dict[str, mx.array], to: Quantization) -> mx.array:
    """The values that the parts stand for, computed in float32."""
    scales = {name: parts[name].astype(mx.float32) for name in ("scales", "biases")}
    return to.dequantize(parts["weight"], scales["scales"], scales["biases"], mx.float32)


def squared_error(parts: dict[str, mx.array], to: Quantization, exact: mx.array) -> float:
    return float(((restored(parts, to) - exact.astype(mx.float32)) ** 2).mean())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_in_float32_it_is_mx_quantize_bit_for_bit(bits: int, group: int) -> None:
    rows = noise(33, 384) + mx.arange(33)[:, None] * 0.01  # some groups are all positive
    rows[5] = 0
    expected = mx.quantize(rows, group_size=group, bits=bits)
    found = round_to_nearest(rows, Quantization(bits, group), mx.float32)
    assert all(mx.array_equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    other = round_to_nearest(rows[:, ::-1], Quantization(bits, group), mx.float32)
    assert not mx.array_equal(other["weight"], expected[0]), "the order of the codes must show"


@pytest.mark.parametrize("bits", BITS)
def test_codes_fit_the_scales_as_stored(bits: int) -> None:
    rows, to = noise(256, 512).astype(mx.bfloat16), Quantization(bits, 64)
    ours = squared_error(round_to_nearest(rows, to, mx.bfloat16), to, rows)
    weight, scales, biases = mx.quantize(rows, group_size=64, bits=bits)
    theirs = {"weight": weight, "scales": scales, "biases": biases}
    assert ours <= squared_error(theirs, to, rows)
    # the negative control: scales that are rounded after the codes were chosen
    late = {
        n: v.astype(mx.bfloat16) if n != "weight" else v
        for n, v in round_to_nearest(rows, to, mx.float32).items()
    }
    worse = {2: 1.0, 3: 1.0, 4: 1.0001, 5: 1.001, 6: 1.01, 8: 1.4}[
        bits
    ]  # the finer the codes, the more it shows
    assert worse * ours <= squared_error(late, to, rows)


@pytest.mark.parametrize(
    "mode, group, bits", [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_the_other_modes_are_mlx_own(mode: str, group: int, bits: int) -> None:
    rows = noise(4, 128)
    found = round_to_nearest(rows.astype(mx.bfloat16), Quantization(bits, group, mode), mx.bfloat16)
    expected = mx.quantize(
        rows.astype(mx.bfloat16).astype(mx.float32), group_size=group, bits=bits, mode=mode
    )
    assert all(mx.array_equal(a, b) for a, b in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e4])
def test_float16_scales_that_vanish_or_are_large_give_finite_weights(size: float) -> None:
    rows, to = noise(8, 64) / 0.02 * size, Quantization(4, 64)
    error = squared_error(round_to_nearest(rows, to, mx.float16), to, rows)
    assert error < max(size * 0.2, 1e-7) ** 2


def test_rows_can_be_converted_in_any_portions() -> None:
    rows, to = noise(37, 128), Quantization(5, 32)
    whole = round_to_nearest(rows, to, mx.bfloat16)
    portions = [
        round_to_nearest(rows[a:b], to, mx.bfloat16) for a, b in ((0, 1), (1, 20), (20, 37))
    ]
    for name, array in whole.items():
        assert mx.array_equal(mx.concatenate([portion[name] for portion in portions]), array)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_one_bad_element_among_millions_is_found(dtype: mx.Dtype) -> None:
    values = noise(1024, 2048).astype(dtype)
    assert all_finite(values)
    places = np.random.default_rng(1).integers(0, (1024, 2048), (4, 2)).tolist()
    for (row, column), bad in zip(
        places, [float("nan"), -float("nan"), float("inf"), -float("inf")], strict=True
    ):
        spoilt = values + 0
        spoilt[row, column] = bad
        assert not all_finite(spoilt), (row, column, bad)


def test_large_elements_are_not_taken_for_infinite() -> None:
    assert all_finite(mx.full((4, 64), 3e38))
    assert all_finite(mx.full((4, 64), 3e38, dtype=mx.bfloat16))
