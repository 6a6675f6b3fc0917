"""Operations that take the place of several: attention that writes its cache in place, feed-forward."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import Attention, DecoderConfig, ForwardContext, GatedMLP, RMSNorm, RoPE, fuse
from mlxarch.blocks.feed_forward import geglu, swiglu
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.rope import NoRoPE, RoPEConfig
from mlxarch.cpu_kernels import native
from mlxarch.kv_cache import FullCache
from mlxarch.quantization.scheme import Quantization

pytestmark = pytest.mark.kernels

BUILT, _ = native.status()
CONFIG = DecoderConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "max_position_embeddings": 512,
    }
)


def fill(module: Any, bits: int | None = None) -> Any:
    """Give a module random weights, quantized in groups of 32 if ``bits`` is set, and fuse it."""
    for index, (_, part) in enumerate(module.named_modules()):
        if "weight" not in part:
            continue
        values = mx.random.normal(part.weight.shape, key=mx.random.key(index)) / 8
        part.weight = values + 1 if isinstance(part, RMSNorm) else values
        if bits and isinstance(part, Matrix):
            part.weight, part.scales, part.biases = mx.quantize(values, 32, bits)
            part.quantization = Quantization(bits, 32)
    mx.eval(module.parameters())
    fuse(module)
    return module


def attention(**options: Any) -> Attention:
    options.setdefault("rope", RoPE(32, RoPEConfig(100.0)))
    return fill(Attention(CONFIG, **options))


def run(layer: Attention, x: mx.array, lengths: tuple[int, ...]) -> mx.array:
    """Outputs of the layer for the tokens x (B, L, 64), so many of them at a time."""
    cache = layer.make_cache(None)
    assert isinstance(cache, FullCache)
    outputs: list[mx.array] = []
    for length in lengths:
        begin = cache.length
        part = x[:, begin : begin + length]
        outputs.append(layer(part, ForwardContext(length, [cache]), cache))
    return mx.concatenate(outputs, axis=1)


def difference(found: mx.array, wanted: mx.array) -> float:
    assert found.shape == wanted.shape
    return float(mx.abs(found - wanted).max())


INPUT = mx.random.normal((2, 300, 64), key=mx.random.key(7))

if BUILT:

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"rope": NoRoPE()},
            {"rope": RoPE(16, RoPEConfig(100.0), interleaved=True)},
            {"norm": lambda size: RMSNorm(size, 1e-5)},
            {"bias": True, "scale": 0.3},
        ],
    )
    def test_attention_in_place_is_that_of_mlx(
        options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = attention(**options)
        used: list[bool] = []
        inner = layer._attend_in_place

        def counted(*arguments: Any) -> mx.array | None:
            out = inner(*arguments)
            used.append(out is not None)
            return out

        monkeypatch.setattr(layer, "_attend_in_place", counted)
        lengths = (70, 1, 3, 1, 225)  # the last one makes the cache grow
        found = run(layer, INPUT, lengths)
        assert used == [True] * len(lengths)
        with native.suspended():
            wanted = run(layer, INPUT, lengths)
        assert difference(found, wanted) < 1e-5
        assert difference(found[:, 1:], wanted[:, :-1]) > 1e-2  # negative control

    def test_what_a_kernel_does_not_have_is_left_to_mlx() -> None:
        class Shifted(Attention):
            def apply_positions(
                self, q: mx.array, k: mx.array, context: ForwardContext
            ) -> tuple[mx.array, mx.array]:
                return q + 1, k

        x = INPUT[:, :5]
        others: list[Attention] = [
            attention(softcap=5.0),
            attention(sinks=True),
            fill(Shifted(CONFIG, rope=NoRoPE())),
            attention(value_size=16),
        ]
        for layer in others:
            cache = layer.make_cache(None)
            assert layer._attend_in_place(x, ForwardContext(5, [cache]), cache) is None
        layer = attention()
        packed = layer.make_cache(None, Quantization(8, 32))
        assert layer._attend_in_place(x, ForwardContext(5, [packed]), packed) is None
        assert layer._attend_in_place(x, ForwardContext(5), None) is None
        cache = layer.make_cache(None)
        assert layer._attend_in_place(x, ForwardContext(5, [cache]), cache) is not None

    def test_the_cache_is_not_copied() -> None:
        layer = attention()
        cache = layer.make_cache(64)

        def step(length: int) -> list[int]:
            """Addresses of the keys and the values after a pass."""
            assert cache is not None
            begin = cache.length
            x = INPUT[:, begin : begin + length]
            mx.eval(layer(x, ForwardContext(length, [cache]), cache), cache.arrays())
            return [np.asarray(array).ctypes.data for array in cache.arrays()]

        addresses = step(9)
        assert step(1) == addresses and step(3) == addresses
        kept = list(cache.arrays()) if cache else []
        assert not set(step(1)) & set(addresses)  # a buffer that is still read is not overwritten
        assert float(mx.abs(kept[0][:, :, 13:]).max()) == 0

    @pytest.mark.parametrize("bits", [None, 4, 8])
    @pytest.mark.parametrize("activation", [swiglu, geglu])
    def test_a_feed_forward_in_one_operation_is_that_of_mlx(
        bits: int | None, activation: Any
    ) -> None:
        network = fill(GatedMLP(64, 96, activation), bits)
        for rows in (1, 3, 16):
            x = 3 * INPUT[:1, :rows]
            found = network._in_one_operation(x)
            with native.suspended():
                wanted = network(x)
                assert network._in_one_operation(x) is None
            assert found is not None and difference(found, wanted) < 1e-4
            assert difference(found, 1.01 * wanted) > 1e-3
            assert bool(mx.array_equal(network(x), found))
        assert network._in_one_operation(INPUT[:1, :17]) is None

    def test_a_feed_forward_that_is_observed_runs_its_products() -> None:
        network = fill(GatedMLP(64, 96, swiglu), 4)
        x = INPUT[:1, :2]
        seen: list[int] = []
        matmul = network.down_proj.matmul

        def observed(*arguments: Any) -> mx.array:
            seen.append(len(arguments))
            return matmul(*arguments)

        assert network._in_one_operation(x) is not None
        network.down_proj.matmul = observed
        network(x)
        assert seen

    def test_gradients_pass_through_a_feed_forward() -> None:
        network = fill(GatedMLP(64, 96, swiglu), 8)
        x = INPUT[:1, :2]

        def loss(x: mx.array) -> mx.array:
            return (network(x) ** 2).sum()

        found = mx.grad(loss)(x)
        with native.suspended():
            wanted = mx.grad(loss)(x)
        assert difference(found, wanted) < 1e-3 * float(mx.abs(wanted).max())
        assert difference(found, 1.1 * wanted) > 1e-3 * float(mx.abs(wanted).max())

else:

    def test_without_the_package_nothing_is_fused() -> None:
        network = fill(GatedMLP(64, 96, swiglu), 4)
        layer = attention()
        cache = layer.make_cache(None)
        assert network._in_one_operation(INPUT[:1, :1]) is None
        assert layer._attend_in_place(INPUT[:, :1], ForwardContext(1, [cache]), cache) is None
