"""Prefill and decode: what is computed, what a session keeps, and what stops a generation."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import parity
from mlxarch.blocks import CausalLM, ForwardContext
from mlxarch.errors import ContextLengthError, InvalidInput, NonFiniteLogits, SessionInUse
from mlxarch.generation import prefill as prefill_module
from mlxarch.generation.decode import check_tokens, decode, decode_batch, remaining_tokens
from mlxarch.generation.prefill import prefill
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.loading.load import load_model

PROMPT = [3, 99, 14, 15, 92, 65, 35, 89, 79]
OTHER = [27, 18, 28, 18, 28, 45, 90, 45]
DRAWN = Sampling(temperature=1.0, seed=5, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(parity.GOLDEN / "llama3", dtype="float32")[0]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every forward pass."""
    lengths: list[int] = []
    embed = CausalLM.embed

    def counted(self: CausalLM, tokens: mx.array, context: ForwardContext) -> mx.array:
        lengths.append(tokens.shape[1])
        return embed(self, tokens, context)

    monkeypatch.setattr(CausalLM, "embed", counted)
    return lengths


def prompt_passes(count: int) -> list[int]:
    """How ``count`` tokens of a prompt run: on a CPU the last one apart, behind those that only fill the caches."""
    return [count - 1, 1] if count > 1 and mx.default_device() == mx.cpu else [count]


def begun(model: CausalLM) -> Session:
    return Session(model.make_caches())


def tokens_of(
    model: CausalLM,
    prompt: Sequence[int],
    count: int,
    session: Session | None = None,
    sampling: Sampling | None = None,
) -> list[int]:
    steps = decode(model, session or begun(model), prompt, sampling or Sampling(), count)
    return [token for token, _ in steps]


def taken(steps: Iterator[tuple[int, Timings]], count: int) -> list[int]:
    """The first tokens, after which the iterator is closed."""
    found = [next(steps)[0] for _ in range(count)]
    steps.close()  # type: ignore[attr-defined]
    return found


def deviation(model: CausalLM, session: Session) -> float:
    """Largest difference between the logits after the caches' tokens and after ``session.tokens``; changes nothing."""
    lengths = {cache.length for cache in session.caches if cache}
    if lengths != {len(session.tokens)}:
        return float("inf")
    found = model(mx.array([[7]]), session.caches)[0, -1]
    for cache in session.caches:
        assert cache is None or cache.truncate(len(session.tokens))
    return float(mx.abs(found - model(mx.array([[*session.tokens, 7]]))[0, -1]).max())


# Sessions


TURNS = {
    "goes on": lambda held: [*held, 5, 6, 7],
    "goes on behind the last token": lambda held: [*held[:-1], 5, 6],
    "the same again": lambda held: PROMPT,
    "all that is held": lambda held: list(held),
    "a beginning of it": lambda held: held[:4],
    "a single token": lambda held: held[:1],
    "parts in the answer": lambda held: [*held[:11], (held[11] + 1) % 128, 5],
    "parts in the prompt": lambda held: [*held[:4], (held[4] + 1) % 128, *held[5:]],
    "another altogether": lambda held: [(held[0] + 1) % 128, *held[1:]],
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_runs_only_what_differs_and_answers_as_a_fresh_session_does(
    turn: str, model: CausalLM, passes: list[int]
) -> None:
    session = begun(model)
    answer = tokens_of(model, PROMPT, 6, session)
    assert session.tokens == PROMPT + answer[:-1]  # the last is sampled and never fed
    held = list(session.tokens)
    prompt = TURNS[turn](held)
    common = len(os.path.commonprefix([held, prompt]))
    reused = min(common, len(prompt) - 1)
    passes.clear()
    steps = list(decode(model, session, prompt, Sampling(), 8))
    found, timings = [token for token, _ in steps], steps[-1][1]
    assert (timings.prompt_tokens, timings.reused_tokens, timings.generated_tokens) == (
        len(prompt),
        reused,
        8,
    )
    assert passes == prompt_passes(len(prompt) - reused) + [1] * 7
    assert found == tokens_of(model, prompt, 8)
    assert session.tokens == prompt + found[:-1]
    assert deviation(model, session) <= 1e-4


def test_caches_that_hold_something_else_would_show(model: CausalLM) -> None:
    session = begun(model)
    tokens_of(model, OTHER, 6, session)
    session.tokens = PROMPT[: len(session.tokens)]
    assert deviation(model, session) > 1e-2
    assert tokens_of(model, [*session.tokens, 5], 8, session) != tokens_of(
        model, [*session.tokens[:9], 5], 8
    )


def test_a_session_closed_at_any_step_goes_on_as_if_it_were_fresh(model: CausalLM) -> None:
    whole = tokens_of(model, PROMPT, 8)
    for sampling in (Sampling(), DRAWN):
        fresh = tokens_of(model, [*PROMPT, 1, 2], 6, sampling=sampling)
        for count in range(9):
            session = begun(model)
            found = taken(decode(model, session, PROMPT, Sampling(), 8), count)
            assert found == whole[:count]
            assert session.tokens == (
                [] if count == 0 else PROMPT + found[: 7 if count == 8 else count]
            )
            assert deviation(model, session) <= 1e-4 or not count
            assert tokens_of(model, [*PROMPT, 1, 2], 6, session, sampling) == fresh


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_session_survives_an_interruption_in_any_layer_of_any_pass(
    error: type[BaseException], chunk: int, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_module, "default_chunk", lambda: chunk)
    layer = type(model.layers[0])
    run, calls = layer.__call__, 0
    fresh = tokens_of(model, [*PROMPT, 1, 2], 4)
    kept = set()
    for moment in range(1, 14):

        def interrupted(self: Any, *arguments: Any, moment: int = moment) -> mx.array:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise error("now")
            return run(self, *arguments)

        session, calls = begun(model), 0
        with monkeypatch.context() as patch:
            patch.setattr(layer, "__call__", interrupted)
            with pytest.raises(error, match="now"):
                tokens_of(model, PROMPT, 8, session)
        assert deviation(model, session) <= 1e-4 or not session.tokens
        kept.add(len(session.tokens))
        # in another thread, which can use nothing that was left unevaluated in this one
        with ThreadPoolExecutor(1) as other:
            assert other.submit(tokens_of, model, [*PROMPT, 1, 2], 4, session).result() == fresh
    assert len(kept) >= 5  # what was computed before is not lost


def test_an_answer_left_unfinished_cannot_go_on_after_the_next_turn(model: CausalLM) -> None:
    session = begun(model)
    first = decode(model, session, PROMPT, Sampling(), 8)
    next(first)
    later = tokens_of(model, OTHER, 4, session)
    with pytest.raises(InvalidInput, match="another turn"):
        next(first)
    assert later == tokens_of(model, OTHER, 4)
    assert session.tokens == OTHER + later[:-1]
    assert deviation(model, session) <= 1e-4


def test_a_session_of_another_model_is_refused(model: CausalLM) -> None:
    other, _ = load_model(parity.GOLDEN / "llama3_tied", dtype="float32")
    session = begun(model)
    tokens_of(model, PROMPT, 2, session)
    with pytest.raises(InvalidInput, match="another model"):
        tokens_of(other, PROMPT, 2, session)
    assert tokens_of(model, PROMPT, 4, session) == tokens_of(model, PROMPT, 4)


# What is computed


@pytest.mark.parametrize("count", [1, 2, 7])
def test_nothing_is_computed_behind_the_last_token(
    count: int, model: CausalLM, passes: list[int]
) -> None:
    tokens_of(model, PROMPT, count)
    assert passes == prompt_passes(len(PROMPT)) + [1] * (count - 1)
    passes.clear()
    assert len(list(decode_batch(model, [PROMPT, OTHER], Sampling(), count, Timings()))) == count
    assert passes == [len(PROMPT)] + [1] * (count - 1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 13, 39, 64])
def test_prefill_in_chunks_of_any_size_is_as_good_as_at_once(
    chunk: int, model: CausalLM, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = np.random.default_rng(1).integers(0, 128, 40).tolist()
    whole, generated = prefill(model, begun(model), prompt), tokens_of(model, prompt, 6)
    assert passes[0] == prompt_passes(40)[0]
    passes.clear()
    monkeypatch.setattr(prefill_module, "default_chunk", lambda: chunk)
    session = begun(model)
    logits = prefill(model, session, prompt)
    assert sum(passes) == 40 and max(passes) == min(chunk, prompt_passes(40)[0])
    assert float(mx.abs(logits - whole).max()) <= 1e-4
    assert deviation(model, session) <= 1e-4
    assert tokens_of(model, prompt, 6) == generated
    assert [row for [row] in decode_batch(model, [prompt], Sampling(), 6, Timings())] == generated
    changed = prefill(model, begun(model), [(prompt[0] + 1) % 128, *prompt[1:]])
    assert float(mx.abs(changed - whole).max()) > 1e-2


BATCH = [PROMPT, [5], list(range(20)), [*OTHER, 100, 101]]


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize(
    "sampling", [Sampling(), DRAWN, Sampling(repetition_penalty=1.3, logit_bias={9: 2.0})]
)
def test_a_batch_of_unequal_lengths_gives_the_tokens_of_single_runs(
    sampling: Sampling, chunk: int, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [tokens_of(model, prompt, 10, sampling=sampling) for prompt in BATCH]
    assert len({tuple(tokens) for tokens in alone}) == 4
    monkeypatch.setattr(prefill_module, "default_chunk", lambda: chunk)
    timings = Timings()
    together = list(decode_batch(model, BATCH, sampling, 10, timings))
    assert [list(row) for row in zip(*together, strict=True)] == alone
    assert timings.generated_tokens == 40


def test_padding_that_is_taken_for_text_would_show(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [tokens_of(model, prompt, 10) for prompt in BATCH]
    make_caches = CausalLM.make_caches
    monkeypatch.setattr(
        CausalLM, "make_caches", lambda self, padding=None, **kw: make_caches(self, **kw)
    )
    together = list(decode_batch(model, BATCH, Sampling(), 10, Timings()))
    assert [list(row) for row in zip(*together, strict=True)] != alone


# What stops a generation


def nan_at(row: int) -> Callable[[np.ndarray], np.ndarray]:
    """One NaN in a tensor: in a row of a matrix, or at the beginning of a vector."""

    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[(row, 0) if array.ndim == 2 else 0] = np.nan
        return changed

    return change


def generates(model: CausalLM, way: str) -> None:
    sampling = DRAWN if way == "sampled" else Sampling()
    if way == "batch":
        for _ in decode_batch(model, [PROMPT, [5]], sampling, 3, Timings()):
            pass
    else:
        tokens_of(model, PROMPT, 3, sampling=sampling)


LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYER += (
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
TENSORS = [f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in LAYER]
TENSORS += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_one_nan_in_any_tensor_is_found(tmp_path: Path, model: CausalLM) -> None:
    names = {
        name for file in (parity.GOLDEN / "llama3").glob("model-*") for name in load_file(file)
    }
    assert names == set(TENSORS)
    for number, name in enumerate(TENSORS):
        folder = tmp_path / str(number)
        folder.mkdir()
        broken = parity.copy(
            "llama3", "config.json", folder, parity.weight(name, nan_at(PROMPT[0]))
        )
        damaged, _ = load_model(broken, dtype="float32")
        for way in ("greedy", "sampled", "batch"):
            generates(model, way)  # as it is, it generates
            with pytest.raises(NonFiniteLogits, match="token 0: a weight file is damaged"):
                generates(damaged, way)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_logits_that_break_down_on_the_way_stop_it_there(
    value: float, step: int, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, calls = CausalLM.head, 0

    def breaking(self: CausalLM, state: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        logits = head(self, state)
        return (
            mx.where(mx.arange(logits.shape[-1]) == 40, value, logits)
            if calls == step + 1
            else logits
        )

    whole = tokens_of(model, PROMPT, 6)
    monkeypatch.setattr(CausalLM, "head", breaking)
    found, session = [], begun(model)
    with pytest.raises(NonFiniteLogits, match=f"token {step}:"):
        for token, _ in decode(model, session, PROMPT, Sampling(), 6):
            found.append(token)
    assert found == whole[:step]
    monkeypatch.undo()
    assert deviation(model, session) <= 1e-4
    assert tokens_of(model, PROMPT, 6, session) == whole


def test_a_logit_of_minus_infinity_is_no_breakdown(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = CausalLM.head

    def banning(self: CausalLM, state: mx.array) -> mx.array:
        logits = head(self, state)
        return mx.where(mx.arange(logits.shape[-1]) == whole[0], -mx.inf, logits)

    whole = tokens_of(model, PROMPT, 6)
    monkeypatch.setattr(CausalLM, "head", banning)
    assert whole[0] not in tokens_of(model, PROMPT, 6)


def test_what_does_not_fit_into_the_context_is_refused_with_the_numbers() -> None:
    assert remaining_tokens(10, None, 64) == 54
    assert remaining_tokens(10, 54, 64) == 54
    assert remaining_tokens(63, None, 64) == 1
    for prompt, wanted in ((64, None), (200, None), (10, 55), (64, 1)):
        with pytest.raises(ContextLengthError) as error:
            remaining_tokens(prompt, wanted, 64)
        assert all(str(n) in str(error.value) for n in (prompt, 64, wanted or 64))


def test_no_id_outside_of_any_vocabulary_passes() -> None:
    draw = np.random.default_rng(2)
    refused = 0
    for _ in range(10_000):
        size = int(draw.integers(1, 200))
        ids = draw.integers(-3, 203, int(draw.integers(1, 6))).tolist()
        outside = [token for token in ids if token < 0 or token >= size]
        if not outside:
            check_tokens(ids, size)
            continue
        refused += 1
        with pytest.raises(
            InvalidInput, match=rf"token {outside[0]} lies outside .* 0 … {size - 1};"
        ):
            check_tokens(ids, size)
    assert 1_000 < refused < 9_900


# Threads


def test_any_thread_may_generate_and_a_session_may_change_threads(model: CausalLM) -> None:
    prompts = [PROMPT, [*PROMPT, 1, 2], OTHER, [*OTHER, 9]]
    fresh = [tokens_of(model, prompt, 6) for prompt in prompts]
    session = begun(model)
    for turn, prompt in enumerate(prompts):
        if turn % 2:
            found = tokens_of(model, prompt, 6, session)
        else:
            with ThreadPoolExecutor(1) as other:  # gone before the next turn
                found = other.submit(tokens_of, model, prompt, 6, session).result()
        assert found == fresh[turn]


@pytest.mark.parametrize(
    "sampling", [Sampling(), DRAWN, Sampling(temperature=1, seed=1, repetition_penalty=1.5)]
)
def test_every_piece_may_be_taken_in_another_thread(sampling: Sampling, model: CausalLM) -> None:
    steps = decode(model, begun(model), PROMPT, sampling, 8)
    found = []
    for _ in range(8):
        with ThreadPoolExecutor(1) as other:
            found.append(other.submit(next, steps).result()[0])
    assert found == tokens_of(model, PROMPT, 8, sampling=sampling)


def test_threads_with_sessions_of_their_own_do_not_disturb_each_other(model: CausalLM) -> None:
    prompts = [PROMPT, OTHER, [5], list(range(20))] * 4
    fresh = [tokens_of(model, prompt, 12, sampling=DRAWN) for prompt in prompts]
    with ThreadPoolExecutor(4) as others:
        found = list(
            others.map(lambda prompt: tokens_of(model, prompt, 12, sampling=DRAWN), prompts)
        )
    assert found == fresh


def test_what_is_unevaluated_belongs_to_its_thread() -> None:
    """Why nothing may be left unevaluated between two tokens."""
    sums: list[mx.array] = []
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: sums.append(mx.array([1.0]) + 1)).result()
    with pytest.raises(RuntimeError, match="Stream"):
        sums[0].tolist()


def test_a_session_in_use_refuses_another_thread_and_is_unharmed(model: CausalLM) -> None:
    session, whole = begun(model), tokens_of(model, PROMPT, 6)
    refused: list[BaseException | None] = []

    def meanwhile(_done: int, _total: int) -> None:
        with ThreadPoolExecutor(1) as other:
            refused.append(other.submit(tokens_of, model, OTHER, 2, session).exception())

    steps = decode(model, session, PROMPT, Sampling(), 6, report=meanwhile)
    assert [token for token, _ in steps] == whole
    assert refused and all(isinstance(error, SessionInUse) for error in refused)
    # between two tokens nobody is inside: another thread may begin the next turn
    assert tokens_of(model, OTHER, 2, session) == tokens_of(model, OTHER, 2)
