"""Answers do not depend on what else runs: for each kind of cache, equal to the same request alone."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
import streamed
import tiny_gemma3n
import tiny_moe
from mlxarch.blocks import CausalLM
from mlxarch.engine import Engine, GenerationRequest, RowOutput
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization

Maker = Callable[[Path], CausalLM]


def golden(name: str) -> Maker:
    return lambda folder: load_model(parity.GOLDEN / name)[0]


def rows_on_the_ssd(folder: Path) -> CausalLM:
    return tiny_gemma3n.load(tiny_gemma3n.make_gemma3n(folder / "model"), tiny_gemma3n.SSD)


def experts_on_the_ssd(folder: Path) -> CausalLM:
    return streamed.load(tiny_moe.make_moe(folder / "model"), 4)


KINDS: dict[str, tuple[Maker, int | None]] = {
    "full": (golden("qwen3"), None),
    "full, 8 bits": (golden("qwen3"), 8),
    "sliding": (golden("gemma3_text"), None),
    "sliding, 4 bits": (golden("gemma3_text"), 4),
    "chunked": (golden("llama4_scout"), None),
    "latent": (golden("deepseek_v3"), None),
    "latent, 4 bits": (golden("deepseek_v3"), 4),
    "chosen keys": (golden("deepseek_v32"), None),
    "shared": (golden("gemma3n_text"), None),
    "recurrent states": (golden("qwen3_5"), None),
    "sinks": (golden("gpt_oss"), None),
    "embeddings from the SSD": (rows_on_the_ssd, 8),
    "experts from the SSD": (experts_on_the_ssd, None),
}


def requests(vocab_size: int) -> list[GenerationRequest]:
    rng = np.random.default_rng(5)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    ]
    return [
        GenerationRequest(
            prompt=tuple(rng.integers(0, vocab_size, 1 + index * 7 % 40).tolist()),
            max_tokens=3 + index * 5 % 8,
            sampling=Sampling(seed=index, **samplings[index % len(samplings)]),
        )
        for index in range(16)
    ]


def alone(model: CausalLM, request: GenerationRequest, kv: Quantization | None) -> list[int]:
    session = Session(model.make_caches(kv=kv), prefill_chunk=16)
    steps = decode(model, session, request.prompt, request.sampling, request.max_tokens)
    return [token for token, _ in steps]


def together(engine: Engine, wanted: list[GenerationRequest]) -> list[list[int]]:
    """Answers of all requests, which join at random moments, beside others that are cancelled."""
    rng = random.Random(1)
    answers: list[list[int]] = [[] for _ in wanted]
    handles = []
    for request, answer in zip(wanted, answers, strict=True):
        begun = threading.Event()

        def deliver(
            output: RowOutput, answer: list[int] = answer, begun: threading.Event = begun
        ) -> None:
            answer.extend(output.tokens)
            begun.set()

        handles.append(engine.submit(request, deliver))
        if rng.random() < 0.5:
            begun.wait(20)
        if rng.random() < 0.3:
            other = engine.submit(request, lambda output: None)
            begun.wait(20)
            other.cancel()
    assert all(handle.done.wait(30) for handle in handles)
    return answers


@pytest.mark.parametrize("share_arrays", [False, True], ids=["a cache a row", "shared arrays"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_is_that_of_the_request_alone(
    kind: str, share_arrays: bool, tmp_path: Path
) -> None:
    make, bits = KINDS[kind]
    kv = None if bits is None else Quantization(bits, 64)
    model = make(tmp_path)
    mx.eval(model.parameters())
    wanted = requests(model.vocab_size)
    with Engine(model, max_rows=6, kv=kv, chunk=16, share_arrays=share_arrays) as engine:
        answers = together(engine, wanted)
        # longer neighbours lengthen shared arrays, and with them the sums of the softmax
        assert engine.status().rows_independent or share_arrays
    assert answers == [alone(model, request, kv) for request in wanted]


def test_a_row_that_sees_its_neighbours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = CausalLM.head

    def leaking(self: CausalLM, state: mx.array) -> mx.array:
        logits = head(self, state)
        return logits + 0.5 * logits[::-1] * (len(logits) > 1)

    model = load_model(parity.GOLDEN / "qwen3")[0]
    wanted = requests(model.vocab_size)
    expected = [alone(model, request, None) for request in wanted]
    monkeypatch.setattr(CausalLM, "head", leaking)
    with Engine(model, max_rows=6, chunk=16) as engine:
        assert together(engine, wanted) != expected
        assert not engine.status().rows_independent


def test_a_deterministic_engine_fills_up_passes_to_sizes_with_equal_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A product that gives other bits below four rows: every pass then has at least four."""
    head = CausalLM.head
    sizes: list[int] = []

    def by_size(self: CausalLM, state: mx.array) -> mx.array:
        sizes.append(len(state))
        return head(self, state) * (1.001 if len(state) < 4 else 1.0)

    monkeypatch.setattr(CausalLM, "head", by_size)
    model = load_model(parity.GOLDEN / "qwen3")[0]
    request = requests(model.vocab_size)[5]
    with Engine(model, max_rows=6, deterministic=True) as engine:
        list(engine.stream(request))
        assert engine.status().rows_independent
    assert set(sizes[-request.max_tokens + 1 :]) == {4}
