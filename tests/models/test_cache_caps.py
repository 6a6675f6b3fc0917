"""Cache sizes of published shapes at 32k tokens: windows are capped, MLA keeps latents, KV-shared layers nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxarch
from mlxarch.blocks import Cache, CausalLM
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

CONTEXT, CHUNK = 32768, 2048
# elements of a token in one layer, layers that keep the context, layers with a window, the window
SHAPES = {
    "gemma3-27b": (2 * 16 * 128, 10, 52, 1024),
    "gpt-oss-20b": (2 * 8 * 64, 12, 12, 128),
    "llama4-scout": (2 * 8 * 128, 12, 36, 8192),
    "deepseek-v3": (512 + 64, 61, 0, 0),
    "gemma3n-e4b": (2 * 2 * 256, 4, 16, 512),  # 15 more layers borrow
    "qwen3-30b-a3b": (2 * 4 * 128, 48, 0, 0),
}
BYTES = {
    16: 2.0,
    8: 1 + 4 / 64,
    4: 1 / 2 + 4 / 64,
}  # of an element; a group of 64 has a scale and a bias in 16 bits


def build(name: str) -> CausalLM:
    folder = Path(mlxarch.__file__).parent / "hub" / "configs"
    return architecture(json.loads((folder / f"{name}.json").read_text())).build()


def filled(model: CausalLM, bits: int) -> tuple[list[Cache], int]:
    """Caches of which all but shapes is left aside, and how many keys a layer saw at most in one step."""
    vectors: dict[int, list[mx.array]] = {}

    def noting(index: int, append: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*new: mx.array) -> Any:
            vectors[index] = [mx.zeros((*x.shape[:2], 1, x.shape[3]), mx.bfloat16) for x in new]
            return append(*new)

        return noted

    caches = model.make_caches(1)
    for index, cache in enumerate(caches):
        if cache is not None:
            cache.append = noting(index, cache.append)  # pyright: ignore[reportAttributeAccessIssue]
    model.hidden_state(mx.zeros((1, 1), mx.int32), caches)
    kv = Quantization(bits, 64) if bits < 16 else None
    found = {
        n: cache for n, cache in enumerate(model.make_caches(CONTEXT, kv=kv)) if cache is not None
    }
    widest = 0
    for index, cache in found.items():
        for length in (*[CHUNK] * (CONTEXT // CHUNK - 1), CHUNK - 3, 1, 1, 1):
            keys, _ = cache.append(*(mx.repeat(x, length, axis=2) for x in vectors[index]))
            widest = max(widest, keys.shape[2] if getattr(cache, "window", None) else 0)
    return list(found.values()), widest


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("name", SHAPES)
def test_bytes_at_32k_tokens_are_those_of_the_formula(name: str, bits: int) -> None:
    elements, full, sliding, window = SHAPES[name]
    caches, widest = filled(build(name), bits)
    assert len(caches) == full + sliding and all(cache.length == CONTEXT for cache in caches)
    assert sum(cache.nbytes for cache in caches) == elements * BYTES[bits] * (
        full * CONTEXT + sliding * window
    )
    assert widest == (
        window - 1 + CHUNK if window else 0
    )  # what is held while a part of the prompt passes
    if name == "gemma3-27b":
        assert sum(cache.nbytes for cache in caches) <= {16: 3.2e9, 8: 1.75e9, 4: 0.95e9}[bits]


def test_without_windows_it_would_be_several_times_as_much() -> None:
    elements, full, sliding, _ = SHAPES["gemma3-27b"]
    assert 2 * elements * (full + sliding) * CONTEXT > 5 * 3.2e9
