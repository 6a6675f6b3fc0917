"""Prefill without logits: the last layer computes keys and values only, and the numbers stay the same."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.blocks.attention.blockwise import attend_blockwise
from mlxarch.generation import decode as generation
from mlxarch.generation import prefill as prefill_module
from mlxarch.generation.decode import decode_batch
from mlxarch.generation.prefill import prefill
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.kv_cache import last_cached_layer
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization
from streamed import attached, load
from tiny_moe import make_moe

NAMES = sorted(
    folder.name for folder in parity.GOLDEN.iterdir() if (folder / "reference.safetensors").exists()
)
PROMPT = np.random.default_rng(4).integers(0, 40, 40).tolist()
CHUNKS = [16, 16, 7, 1]  # on a CPU the last token comes by itself
PACKED = Quantization(8, 32)
KINDS = [
    pytest.param(name, kv, id=f"{name}-{'packed' if kv else 'as computed'}")
    for name in NAMES
    for kv in (None, PACKED)
    if not (kv and name == "deepseek_v4")  # compressed attention refuses to quantize its cache
]


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "default_chunk", lambda: 16)
    monkeypatch.setattr(generation.mx, "default_device", lambda: mx.cpu)


class Watched:
    """A layer that counts how often it is begun, and how often it is done."""

    def __init__(self, layer: Any, counts: Counter[str]) -> None:
        self.layer, self.counts = layer, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *arguments: Any) -> mx.array:
        self.counts["begun"] += 1
        found = self.layer(*arguments)
        self.counts["done"] += 1
        return found


def watch(model: CausalLM, number: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    layers: list[Any] = model.model.layers
    layers[number] = Watched(layers[number], counts)
    return counts


def fingerprint(logits: mx.array, caches: Any) -> list[bytes]:
    return [
        np.asarray(array).tobytes()
        for array in (logits, *(a for c in caches if c for a in c.arrays()))
    ]


def whole(model: CausalLM, kv: Quantization | None) -> list[bytes]:
    """Every chunk through all of every layer."""
    caches, start, state = model.make_caches(kv=kv), 0, mx.array(0)
    for count in CHUNKS:
        state = model.hidden_state(mx.array([PROMPT[start : start + count]]), caches)
        evaluate_caches(caches)
        mx.eval(state)
        start += count
    return fingerprint(model.head(state[:, -1:])[:, 0], caches)


def only_caches(
    model: CausalLM, kv: Quantization | None, prompt: Sequence[int] = PROMPT
) -> list[bytes]:
    session = Session(model.make_caches(kv=kv), rewind=0)  # without a break for a snapshot
    return fingerprint(prefill(model, session, prompt), session.caches)


@pytest.mark.parametrize(("name", "kv"), KINDS)
def test_the_last_layer_with_a_cache_is_done_once_a_prompt_and_all_bits_are_the_same(
    name: str, kv: Quantization | None
) -> None:
    model, _ = load_model(parity.GOLDEN / name, dtype="float32")
    last = last_cached_layer(model.make_caches())
    counts, behind = (
        watch(model, last),
        watch(model, -1) if last < len(model.layers) - 1 else Counter(begun=1),
    )
    found = only_caches(model, kv)
    assert (counts["begun"], counts["done"], behind["begun"]) == (4, 1, 1)
    assert found == whole(model, kv)
    assert counts["done"] == 5, "as it would be for every chunk"
    assert only_caches(model, kv, PROMPT[:3] + PROMPT[2:-1]) != found


def test_attention_by_blocks_is_not_begun_where_nobody_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = load_model(parity.GOLDEN / "gemma2", dtype="float32")
    lengths: list[int] = []

    def counted(q: mx.array, *arguments: Any) -> mx.array:
        lengths.append(q.shape[2])
        return attend_blockwise(q, *arguments)

    monkeypatch.setattr("mlxarch.blocks.attention.attention.attend_blockwise", counted)
    only_caches(model, None)
    layers = len(model.layers)
    assert lengths == [count for count in CHUNKS[:-1] for _ in range(layers - 1)] + [1] * layers


def test_a_padded_batch_gives_the_same_tokens() -> None:
    prompts = [PROMPT, PROMPT[20:], PROMPT[5:30]]
    model, _ = load_model(parity.GOLDEN / "gemma2", dtype="float32")
    counts = watch(model, -1)
    found = list(decode_batch(model, prompts, Sampling(), 3, Timings()))
    assert counts == {"begun": 3 + 2, "done": 1 + 2}, "three chunks, and two tokens more"
    for row, prompt in enumerate(prompts):
        alone = list(decode_batch(model, [prompt], Sampling(), 3, Timings()))
        assert [tokens[row] for tokens in found] == [tokens[0] for tokens in alone]


@pytest.mark.parametrize("segment", [16, 32, 40])
def test_of_a_streamed_last_layer_no_expert_is_read_for_the_caches(
    segment: int, tmp_path: Path
) -> None:
    folder = make_moe(tmp_path / "model", packed=Quantization(4, 32))
    model = load(folder, 3)
    streaming = attached(model)
    streaming.segment = segment
    rows: Counter[int] = Counter()
    for number, layer in streaming.layers.items():

        def run(
            calls: list[Any], decoding: bool = False, number: int = number, real: Any = layer.run
        ) -> list[mx.array]:
            rows[number] += sum(call.size for call in calls)
            return real(calls, decoding)

        layer.run = run
    assert only_caches(model, None) == only_caches(load(folder), None) == whole(load(folder), None)
    assert rows == {0: 40 * 3, 2: 3}, "of the last layer only the last token's"
