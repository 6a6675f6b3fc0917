"""Caches in shared arrays: rows that join, leave and come back compute what each computes alone."""

import random

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import Cache, CausalLM, ForwardContext
from mlxarch.kv_cache import BatchedCache, CacheBatch, FullCache, can_batch
from mlxarch.kv_cache.batched import BatchLengths
from mlxarch.kv_cache.recording import RecordingCache
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization

KINDS = {
    "full": ("qwen3", None),
    "full, 8 bits": ("qwen3", 8),
    "sliding": ("gemma3_text", None),
    "sliding, 4 bits": ("gemma3_text", 4),
    "chunked": ("llama4_scout", None),
    "latent": ("deepseek_v3", None),
    "chosen keys": ("deepseek_v32", None),
    "latent, 4 bits": ("deepseek_v3", 4),
    "shared keys and values": ("gemma3n_text", None),
    "states": ("qwen3_5", None),
    "sinks": ("gpt_oss", None),
}


class Row:
    """A row with caches to batch, and a twin with caches of its own."""

    def __init__(self, model: CausalLM, prompt: list[int], kv: Quantization | None) -> None:
        self.caches = model.make_caches(kv=kv)
        self.twin = model.make_caches(kv=kv)
        mx.eval(model(mx.array([prompt]), self.caches), model(mx.array([prompt]), self.twin))


def step(model: CausalLM, batch: CacheBatch, rows: list[Row], places: int, token: int) -> float:
    """Append one token to each row, in the batch and alone; gives the largest error of the logits."""
    at = batch.arrange([row.caches for row in rows], places)
    found = model(mx.full((places, 1), token), batch.layers)[:, 0]
    batch.advance()
    wanted = mx.concatenate([model(mx.array([[token]]), row.twin)[:, 0] for row in rows])
    return float(np.abs(np.asarray(found[mx.array(at)] - wanted)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave_are_as_alone(kind: str) -> None:
    name, bits = KINDS[kind]
    kv = None if bits is None else Quantization(bits, 64)
    model = load_model(parity.GOLDEN / name)[0]
    rng = random.Random(3)
    batch = CacheBatch()
    rows = [
        Row(model, [rng.randrange(model.vocab_size) for _ in range(1 + 9 * index)], kv)
        for index in range(4)
    ]
    assert can_batch(rows[0].caches)
    worst = 0.0
    for turn in range(24):
        some = rng.sample(rows, 2 + turn % 3)
        for row in rows:
            if row not in some:
                batch.release(row.caches)
        worst = max(worst, step(model, batch, some, 4 + turn % 2, rng.randrange(model.vocab_size)))
    assert worst < 2e-4
    batch.clear()
    for row in rows:  # the caches of its own go on where the batch has left them
        token = mx.array([[1]])
        error = np.asarray(model(token, row.caches) - model(token, row.twin))
        assert np.abs(error).max() < 2e-4


def test_a_wrong_place_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(parity.GOLDEN / "qwen3")[0]
    rows = [Row(model, list(range(1, 4 + 5 * index)), None) for index in range(2)]
    batch = CacheBatch()
    assert step(model, batch, rows, 2, 5) < 2e-4
    indices = BatchLengths.indices
    monkeypatch.setattr(BatchLengths, "indices", lambda self, window: indices(self, window) - 1)
    assert step(model, batch, rows, 2, 5) > 1e-2


def test_rows_of_equal_length_need_no_mask() -> None:
    model = load_model(parity.GOLDEN / "qwen3")[0]
    rows = [Row(model, list(range(1, 9)), None) for _ in range(3)]
    batch = CacheBatch()
    batch.arrange([row.caches for row in rows], 8)
    context = ForwardContext(1, batch.layers)
    assert isinstance(context.offset, int) and context.offset == 8
    longer = Row(model, list(range(1, 12)), None)
    batch.arrange([row.caches for row in [*rows, longer]], 8)
    offsets = ForwardContext(1, batch.layers).offset
    assert isinstance(offsets, mx.array)
    assert np.asarray(offsets).tolist() == [8, 8, 8, 11, 11, 11, 11, 11]


def test_arrays_grow_by_more_than_a_token() -> None:
    model = load_model(parity.GOLDEN / "qwen3")[0]
    rows = [Row(model, list(range(1, 9)), None) for _ in range(2)]
    batch = CacheBatch()
    batch.arrange([row.caches for row in rows], 2)
    assert {cache.tokens for cache in batch.layers if isinstance(cache, BatchedCache)} == {256}
    before = batch.nbytes
    step(model, batch, rows, 2, 3)
    assert batch.nbytes == before
    assert sum(cache.nbytes for row in rows for cache in row.caches if cache) == 0


def test_unknown_kinds_and_records_are_not_batched() -> None:
    class Other(Cache):
        def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
            return new, new

        def slots(self, length: int) -> mx.array:
            return mx.arange(length)

    assert not can_batch([Other()])
    assert not can_batch([RecordingCache()])
    assert can_batch([None, FullCache()])
