"""Packed keys and values of every architecture: attention over them is that over the values they stand for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import Cache, CausalLM
from mlxarch.blocks.attention import blockwise as scores
from mlxarch.kv_cache import quantized as packed
from mlxarch.kv_cache.parallel import ParallelCache
from mlxarch.kv_cache.quantized import quantize_vectors
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization

NAMES = sorted(
    folder.name for folder in parity.GOLDEN.iterdir() if (folder / "reference.safetensors").exists()
)
# refused there: see tests/models/test_deepseek_v4.py
NAMES.remove("deepseek_v4")
STEPS = (13, 1, 17, 2, 1, 1, 5, 1)  # tokens that run at once; a window of 8 is passed in each way


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five keys at a time, so that tiny contexts take many blocks."""
    monkeypatch.setattr(scores, "MAX_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(scores, "MIN_BLOCK_KEYS", 5)


def loaded(name: str, folder: Path) -> CausalLM:
    return load_model(parity.copy(name, "config.json", folder), dtype="float32")[0]


def run(model: CausalLM, caches: list[Cache | None], rows: list[list[int]]) -> mx.array:
    ids, parts, at = mx.array(rows), [], 0
    for count in STEPS:
        parts.append(model(ids[:, at : at + count], caches))
        at += count
    return mx.concatenate(parts, axis=1)


def both(
    model: CausalLM, kv: Quantization, rows: list[list[int]], padding: list[int] | None = None
) -> list[mx.array]:
    """Logits with packed caches, and with ordinary ones that hold the values which the packed ones stand for.

    The second run takes them over from the first: rounding its own would now and then round to the other side, where
    the two differ by the last digit of a float.
    """
    taken: dict[int, list[list[mx.array]]] = {}

    def noting(index: int, append: Callable[..., Any], *vectors: mx.array) -> Any:
        taken.setdefault(index, []).append(
            [quantize_vectors(array, kv).dequantize() for array in vectors]
        )
        return append(*vectors)

    def repeating(index: int, append: Callable[..., Any], *vectors: mx.array) -> Any:
        return append(*taken[index].pop(0))

    logits = []
    for form, change in ((kv, noting), (None, repeating)):
        caches = model.make_caches(padding=padding, kv=form)
        for index, cache in enumerate(caches):
            if isinstance(cache, ParallelCache):
                cache = cache.keys_values
            if cache is not None:
                cache.append = partial(change, index, cache.append)  # pyright: ignore[reportAttributeAccessIssue]
        logits.append(run(model, caches, rows))
    return logits


def distance(some: mx.array, other: mx.array) -> float:
    return float(np.abs(np.array(some) - np.array(other)).max())


def prompts(name: str, batch: int) -> list[list[int]]:
    ids = parity.reference(name)["input_ids"][0].tolist()
    return [ids[i : i + sum(STEPS)] for i in range(batch)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_attention_over_the_unpacked_cache(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kv, rows = loaded(name, tmp_path), Quantization(bits, 64), prompts(name, 1)
    plain = run(model, model.make_caches(), rows)
    for few in (0, 64):  # rows up to which a product reads the packed elements themselves
        monkeypatch.setattr(packed, "MAX_MATMUL_ROWS", few)
        found, wanted = both(model, kv, rows)
        assert distance(found, wanted) <= parity.TOLERANCE
        assert distance(found, plain) > 1e-2  # negative control: packing is not for nothing


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_too(name: str, tmp_path: Path) -> None:
    model, kv, padding = loaded(name, tmp_path), Quantization(8, 32), [0, 11, 3]
    rows = [[0] * pad + row[pad:] for pad, row in zip(padding, prompts(name, 3), strict=True)]
    found, wanted = both(model, kv, rows, padding)
    other = run(model, model.make_caches(kv=kv), rows)  # negative control: padding taken for text
    for index, pad in enumerate(padding):
        # both are computed here, and each may be so far from exact
        assert distance(found[index, pad:], wanted[index, pad:]) <= 2 * parity.TOLERANCE
    assert distance(other[1, 11:], found[1, 11:]) > 1e-2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["llama3", "gpt_oss", "gemma2", "deepseek_v3", "llama4_scout"])
def test_what_was_forgotten_is_written_over(name: str, tmp_path: Path) -> None:
    model, [row] = loaded(name, tmp_path), prompts(name, 1)
    caches = model.make_caches(kv=Quantization(8, 64))
    for count in (6, 1):
        model(mx.array([row[:count]]), caches)
    assert all(cache.truncate(6) for cache in caches if cache)
    found = model(mx.array([row[6:20]]), caches)
    fresh = model.make_caches(kv=Quantization(8, 64))
    model(mx.array([row[:6]]), fresh)
    assert distance(found, model(mx.array([row[6:20]]), fresh)) <= parity.TOLERANCE
