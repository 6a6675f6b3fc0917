"""Packed keys and values: their bytes, their products, and what is refused."""

import mlx.core as mx
import pytest

from mlxarch.blocks import Chunked, Full, Sliding, Span
from mlxarch.blocks.attention.span import Latent
from mlxarch.errors import QuantizationError
from mlxarch.kv_cache import QuantizedVectors
from mlxarch.kv_cache.quantized import quantize_vectors
from mlxarch.quantization.kv_vectors import fit_kv_quantization, vector_bytes
from mlxarch.quantization.scheme import Quantization

SPANS = [Full(), Latent(), Sliding(10), Chunked(10)]


def entries(length: int, size: int = 64, seed: int = 0) -> mx.array:
    return mx.random.normal((2, 3, length, size), key=mx.random.key(seed))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [12, 32, 64, 80, 96, 128, 576])
def test_a_vector_is_packed_in_groups_that_divide_it_or_padded(size: int, bits: int) -> None:
    x = entries(7, size)
    found = quantize_vectors(x, Quantization(bits, 64))
    assert found.shape == x.shape and found.dequantize().shape == x.shape
    assert found.arrays[1].nbytes + found.arrays[2].nbytes + found.arrays[0].nbytes == (
        2 * 3 * 7 * vector_bytes(size, Quantization(bits, 64), 4)
    )
    error = float((found.dequantize() - x).square().mean().sqrt())
    assert (
        0 < error <= 2.5 / (2**bits - 1)
    )  # half a step, if a group of these lies within five standard deviations


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (64, (64, 64)),
        (128, (64, 128)),
        (576, (64, 576)),
        (96, (32, 96)),
        (80, (32, 96)),
        (8, (32, 32)),
    ],
)
def test_the_largest_group_up_to_the_wanted_one_is_taken(
    size: int, wanted: tuple[int, int]
) -> None:
    form, padded = fit_kv_quantization(Quantization(8, 64), size)
    assert (form.group_size, padded) == wanted
    assert fit_kv_quantization(Quantization(4, 32), 128) == (Quantization(4, 32), 128)


def test_an_outlier_costs_the_others_little() -> None:
    x = entries(20)
    x[..., 7] = 50.0

    def error(rounded: mx.array) -> float:
        return float((rounded - x).square().mean().sqrt())

    plain = mx.dequantize(*mx.quantize(x, 64, 4), group_size=64, bits=4)
    assert error(quantize_vectors(x, Quantization(4, 64)).dequantize()) < 0.5 * error(plain)


@pytest.mark.parametrize("size", [12, 64, 80])
def test_products_are_those_with_the_unpacked_vectors(size: int) -> None:
    held = quantize_vectors(entries(50, size), Quantization(8, 64))
    q, weights = entries(5, size, 1), entries(5, 21, 2)
    part = held.slice_tokens(9, 30)
    assert isinstance(part, QuantizedVectors) and part.shape == (2, 3, 21, size)
    values = held.dequantize()[:, :, 9:30]
    assert mx.allclose(part.matmul(part.rotate(q), True), q @ values.swapaxes(-1, -2), atol=1e-4)
    found = part.matmul(weights, False)
    assert mx.allclose(part.rotate_back(found), weights @ values, atol=1e-4)
    assert mx.allclose(
        part.first_features(5).rotate_back(found), weights @ values[..., :5], atol=1e-4
    )
    assert mx.allclose(weights @ part.dequantize(rotated=True), found, atol=1e-4)
    assert not mx.allclose(
        found[..., :size], weights @ values, atol=1e-1
    )  # negative control: they are rotated


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_every_span_returns_what_it_was_given_but_for_the_rounding(span: Span, bits: int) -> None:
    kv, plain = span.make_cache(None, Quantization(bits, 32)), span.make_cache(None)
    for step, length in enumerate([3, 1, 30, 1, 1, 6, 1]):
        keys, values = entries(length, 64, step), entries(length, 64, step + 50)[..., :32]
        assert kv.slots(length).tolist() == plain.slots(length).tolist()
        for found, wanted in zip(kv.append(keys, values), plain.append(keys, values), strict=True):
            assert isinstance(found, QuantizedVectors) and isinstance(wanted, mx.array)
            rounded = quantize_vectors(wanted, Quantization(bits, 32)).dequantize()
            assert mx.array_equal(found.dequantize(), rounded) and not mx.array_equal(
                rounded, wanted
            )
    assert kv.nbytes < plain.nbytes * (bits + 4) / 32


@pytest.mark.parametrize(
    "kv",
    [Quantization(3, 64), Quantization(8, 16), Quantization(4, 32, "mxfp4")],
    ids=lambda kv: f"{kv.bits}-{kv.mode}",
)
def test_other_ways_of_packing_are_refused_with_those_that_there_are(kv: Quantization) -> None:
    with pytest.raises(
        QuantizationError, match=r"8 or 4 bits, affine, with groups of 32, 64, 128; found"
    ):
        Full().make_cache(None, kv).append(entries(1), entries(1))
