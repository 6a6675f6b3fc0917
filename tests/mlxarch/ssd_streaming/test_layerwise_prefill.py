"""A prompt reads each expert that it needs once, however few slots there are, and gives the same numbers."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import CausalLM
from mlxarch.generation import prefill as prefill_module
from mlxarch.generation.decode import decode_batch
from mlxarch.generation.prefill import prefill
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming import layerwise_prefill as by_layers
from mlxarch.ssd_streaming.experts import Call
from streamed import attached, fingerprint, load
from tiny_moe import make_moe

PROMPT = np.random.default_rng(2).integers(0, 96, 150).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "model", packed=Quantization(4, 32))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "default_chunk", lambda: 16)


def count_reads(model: CausalLM) -> Counter[tuple[int, int]]:
    """How often each expert of each layer is read from now on."""
    reads: Counter[tuple[int, int]] = Counter()
    for number, layer in attached(model).layers.items():

        def read(
            expert: int, buffers: list[np.ndarray], number: int = number, real=layer.records.read
        ) -> None:
            reads[number, expert] += 1
            real(expert, buffers)

        layer.records.read = read
    return reads


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 11])
def test_a_prompt_reads_each_expert_once(folder: Path, slots: int) -> None:
    model = load(folder, slots)
    reads = count_reads(model)
    prefill(model, Session(model.make_caches()), PROMPT)
    layers = {layer for layer, _ in reads}
    assert layers == {0, 2} and len(reads) > 12 and set(reads.values()) == {1}


def test_chunk_by_chunk_would_read_most_experts_many_times(folder: Path) -> None:
    model, caches = load(folder, 3), None
    reads, caches = count_reads(model), model.make_caches()
    for start in range(0, 150, 16):
        mx.eval(model.hidden_state(mx.array([PROMPT[start : start + 16]]), caches))
    assert max(reads.values()) > 5


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_prompt_of_many_chunks_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "model", kind, packed=Quantization(4, 32))
    wanted = fingerprint(load(folder), prompt=150)
    assert {n: fingerprint(load(folder, n), prompt=150) for n in (1, 4, 9)} == dict.fromkeys(
        (1, 4, 9), wanted
    )


def test_a_prompt_in_segments_gives_the_same_bits_and_reads_once_a_segment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_layers, "SEGMENT_BYTES", 64 * 4 * 7 * 50)  # 50 tokens
    model = load(folder, 3)
    reads = count_reads(model)
    assert fingerprint(model, prompt=150, tokens=1) == fingerprint(
        load(folder), prompt=150, tokens=1
    )
    reads.clear()
    prefill(model, Session(model.make_caches()), PROMPT)
    assert max(reads.values()) == 4


@pytest.mark.parametrize(
    ("segment", "segments"), [(1, 11), (16, 11), (48, 4), (80, 2), (150, 1), (10**6, 1)]
)
def test_where_a_segment_ends_changes_no_bit_and_a_segment_reads_an_expert_once(
    folder: Path, segment: int, segments: int
) -> None:
    model = load(folder, 3)
    attached(model).segment = segment
    reads = count_reads(model)
    found = np.asarray(prefill(model, Session(model.make_caches()), PROMPT))
    assert segments // 2 < max(reads.values()) <= segments, "a segment has whole chunks"
    resident = load(folder)
    assert np.array_equal(
        found, np.asarray(prefill(resident, Session(resident.make_caches()), PROMPT))
    )
    assert fingerprint(model, prompt=150) == fingerprint(load(folder), prompt=150)


def test_a_prompt_that_goes_on_from_a_session_gives_the_same_bits(folder: Path) -> None:
    logits = []
    for slots in (None, 3):
        model = load(folder, slots)
        session = Session(model.make_caches())
        prefill(model, session, PROMPT[:40])
        logits.append(np.asarray(prefill(model, session, PROMPT)))
        assert session.tokens == PROMPT
    assert np.array_equal(*logits)


def test_a_padded_batch_gives_the_same_tokens(folder: Path) -> None:
    prompts = [PROMPT[:90], PROMPT[20:40], PROMPT[5:75]]
    found = [
        list(decode_batch(load(folder, n), prompts, Sampling(), 5, Timings())) for n in (None, 2, 8)
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 5


def test_the_experts_that_most_tokens_need_stay(folder: Path) -> None:
    model = load(folder, 4)
    layer = attached(model).layers[2]
    chosen = Counter[int]()
    run = layer.run

    def counted(calls: list[Call], decoding: bool = False) -> list[mx.array]:
        for call in calls:
            chosen.update(call.ids.tolist())
        return run(calls, decoding)

    layer.run = counted
    model.hidden_state(mx.array([PROMPT]), model.make_caches())
    kept = set(np.flatnonzero(layer._slot_of >= 0).tolist())
    assert {expert for expert, _ in chosen.most_common(2)} <= kept


def test_attention_is_itself_again_after_a_prompt_and_after_an_error(folder: Path) -> None:
    model = load(folder, 3)
    layers: list[Any] = list(model.layers)
    before = [layer.self_attn for layer in layers]
    prefill(model, Session(model.make_caches()), PROMPT)
    assert [layer.self_attn for layer in layers] == before
    attached(model).layers[0].records.read = lambda expert, buffers: 1 / 0
    with pytest.raises(ZeroDivisionError):
        prefill(model, Session(model.make_caches()), PROMPT)
    assert all(a is b for a, b in zip([layer.self_attn for layer in layers], before, strict=True))
