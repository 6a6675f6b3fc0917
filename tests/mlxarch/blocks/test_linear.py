"""Linear layers, and projections that share an input, run as one product."""

from typing import Any

import mlx.core as mx
import pytest

from mlxarch.blocks import Embedding, Linear, fuse
from mlxarch.blocks.feed_forward import GatedMLP, swiglu
from mlxarch.blocks.linear import FusableProjections
from mlxarch.cpu_kernels import native
from mlxarch.quantization.scheme import Quantization


def filled(linear: Linear | Embedding, seed: int, settings: Quantization | None = None) -> None:
    weight = mx.random.normal(linear.weight.shape, key=mx.random.key(seed))
    linear.weight = weight
    if settings:
        packed = mx.quantize(weight, settings.group_size, settings.bits, settings.mode)
        linear.quantization = settings
        for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
            linear[name] = array
    if "bias" in linear:
        linear.bias = mx.random.normal((weight.shape[0],), key=mx.random.key(seed + 100))


def projections(settings: list[Quantization | None], bias: bool = False) -> list[Linear]:
    linears = [Linear(64, rows, bias) for rows in (96, 32, 32)]
    for seed, (linear, one) in enumerate(zip(linears, settings, strict=True)):
        filled(linear, seed, one)
    return linears


KINDS = [
    None,
    Quantization(4, 64),
    Quantization(8, 32),
    Quantization(3, 32),
    Quantization(4, 32, "mxfp4"),
    Quantization(4, 16, "nvfp4"),
    Quantization(8, 32, "mxfp8"),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("length", [1, 5])
def test_joined_projections_give_the_same_bits(
    settings: Quantization | None, bias: bool, length: int
) -> None:
    linears = projections([settings] * 3, bias)
    x = mx.random.normal((2, length, 64), key=mx.random.key(9))
    apart = [linear(x) for linear in linears]
    mx.eval(apart)
    shared = FusableProjections(*linears)
    shared.fuse()
    assert shared.is_fused
    for one, other in zip(shared(x), apart, strict=True):
        assert one.shape == other.shape
        if settings is None:  # a BLAS may add in another order where a matrix has other dimensions
            assert float(mx.abs(one - other).max()) <= 1e-5
        else:
            assert mx.array_equal(one, other)


def test_projections_keep_their_weights_when_joined() -> None:
    linears = projections([Quantization(4, 64)] * 3)
    before = [mx.array(linear.weight) for linear in linears]
    FusableProjections(*linears).fuse()
    assert all(
        mx.array_equal(linear.weight, old) for linear, old in zip(linears, before, strict=True)
    )


@pytest.mark.parametrize("other", [None, Quantization(8, 64), Quantization(4, 32)])
def test_projections_packed_differently_stay_apart(other: Quantization | None) -> None:
    linears = projections([Quantization(4, 64), other, Quantization(4, 64)])
    x = mx.random.normal((1, 3, 64), key=mx.random.key(9))
    apart = [linear(x) for linear in linears]
    shared = FusableProjections(*linears)
    shared.fuse()
    assert not shared.is_fused
    assert all(mx.array_equal(one, two) for one, two in zip(shared(x), apart, strict=True))


def test_a_weight_set_after_joining_counts() -> None:
    linears = projections([None] * 3)
    shared = FusableProjections(*linears)
    shared.fuse()
    x = mx.ones((1, 1, 64))
    old = shared(x)[1]
    linears[1].weight = linears[1].weight * 2
    assert mx.allclose(shared(x)[1], old * 2, rtol=1e-5)
    assert not mx.allclose(shared(x)[1], old)


def test_fuse_finds_the_groups_below_a_module() -> None:
    mlp = GatedMLP(64, 96, swiglu)
    for seed, linear in enumerate((mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        filled(linear, seed, Quantization(4, 32))
    x = mx.random.normal((1, 4, 64), key=mx.random.key(5))
    before = mlp(x)
    fuse(mlp)
    assert mlp.gate_up.is_fused
    assert mx.array_equal(mlp(x), before)


@pytest.mark.parametrize("settings", KINDS[1:])
def test_a_packed_embedding_gives_the_rows_of_its_dequantized_table(settings: Quantization) -> None:
    table = Embedding(50, 64)
    filled(table, 0, settings)
    whole = settings.dequantize(table["weight"], table["scales"], table.get("biases"), mx.float32)
    tokens = mx.array([[3, 49, 0], [7, 7, 1]])
    assert mx.array_equal(table(tokens), whole[tokens])
    assert mx.allclose(table.as_linear(whole[:2]), whole[:2] @ whole.T, atol=1e-4, rtol=1e-4)


def test_rows_of_one_token_each_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(64, 32)
    filled(linear, 0, Quantization(4, 64))
    shapes: list[tuple[int, ...]] = []
    product = mx.quantized_matmul

    def recorded(x: mx.array, *arguments: Any, **named: Any) -> mx.array:
        shapes.append(tuple(x.shape))
        return product(x, *arguments, **named)

    monkeypatch.setattr(mx, "quantized_matmul", recorded)
    x = mx.random.normal((3, 1, 64), key=mx.random.key(1))
    with native.suspended():
        y = linear(x)
        several = linear(mx.concatenate([x, x], axis=1))
    assert y.shape == (3, 1, 32)
    assert mx.array_equal(y, several[:, :1])
    assert shapes == [(3, 64), (3, 2, 64)]  # the second: several tokens are left as they are
