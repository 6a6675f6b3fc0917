"""Decoding: generation of tokens after a prompt, for one conversation or a padded batch."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM
from mlxarch.errors import ContextLengthError, InvalidInput, NonFiniteLogits
from mlxarch.generation.logprobs import LogprobRecorder
from mlxarch.generation.pace import compute_state, pace_of
from mlxarch.generation.prefill import Report, feed, prefill
from mlxarch.generation.sampling import Sampler, Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.embeddings import late_rows
from mlxarch.ssd_streaming.experts import streaming_of
from mlxarch.structured_output.matcher import Matcher


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that would be read outside of the embedding table.

    Raises:
        InvalidInput: no tokens, or one outside of the vocabulary.
    """
    if not tokens:
        raise InvalidInput("the prompt is empty: it needs at least one token")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(t for t in tokens if not 0 <= t < vocab_size)
        raise InvalidInput(
            f"token {wrong} lies outside of the model's vocabulary, 0 … {vocab_size - 1}; "
            "tokenizer and weights belong to different models"
        )


def remaining_tokens(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """Number of tokens that may be generated: ``max_tokens``, or the rest of the context.

    Raises:
        ContextLengthError: the prompt fills the context, or ``max_tokens`` more would not fit.
    """
    left = context - prompt_tokens
    if left < 1 or (max_tokens or 0) > left:
        wanted = "" if max_tokens is None else f" and {max_tokens} to generate"
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens{wanted} do not fit into the context of {context} tokens; "
            "shorten the prompt, ask for fewer tokens, or load the model with a longer context if it has one"
        )
    return left if max_tokens is None else max_tokens


def decode(
    model: CausalLM,
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    limit: int,
    matcher: Matcher | None = None,
    report: Report | None = None,
    recorder: LogprobRecorder | None = None,
) -> Iterator[tuple[int, Timings]]:
    """Generate up to ``limit`` tokens; closing the iterator stops earlier.

    The graph of the next step is queued before the current token is read, so that the device never
    waits for the host, unless a step takes so long that it is evaluated in parts. Where embedding
    rows come from the SSD, the graph is built before the token is known and queued as soon as its
    row is read. With a matcher the network runs ahead in the same way, and only the choice of a
    token waits for the one before. ``session.tokens`` are at any time the tokens that its caches
    hold.

    Args:
        matcher: constraint on the answer, which ends when its grammar is complete; None for none.
        report: called with the tokens of the prompt that are processed, and their number.
        recorder: receives the log-probabilities of each token before it is yielded.

    Yields:
        Each token with the timings so far; one object, updated as it goes.

    Raises:
        NonFiniteLogits: NaN or infinity instead of a token.
        ConstraintError: the grammar cannot be continued.
        InvalidInput: the session belongs to another model, or has begun another turn meanwhile.
        SessionInUse: another thread computes with the session.
    """
    steps = _steps(model, session, prompt, sampling, limit, matcher, report, recorder)
    try:
        while True:
            with session.exclusive():
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        steps.close()


def _steps(
    model: CausalLM,
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    limit: int,
    matcher: Matcher | None,
    report: Report | None,
    recorder: LogprobRecorder | None,
) -> Generator[tuple[int, Timings]]:
    start = time.perf_counter()
    turn = session.begin_turn(model)
    timings = Timings(len(prompt), session.reuse_prefix(prompt))
    sampler = Sampler(sampling, model.vocab_size, [prompt])
    late = late_rows(model)
    pace = pace_of(model)
    try:
        logits = prefill(model, session, prompt, report)
        token, checked = _sample(sampler, logits, mask=_mask(matcher), recorder=recorder)
        for index in range(limit):
            following = None
            runs_on = index + 1 < limit
            runs_ahead = runs_on and pace.is_one_evaluation(1)
            if runs_ahead:
                with late or nullcontext():
                    state = model.hidden_state(token[None], session.caches)
                logits = model.head(state)[:, 0]
                if matcher is None:
                    following = _sample(sampler, logits, late is None, recorder=recorder)
                elif late is None:
                    mx.async_eval(logits)
            before = time.perf_counter()
            [value] = _read(checked, index)
            pace.record_pass(1, time.perf_counter() - before)
            if recorder is not None:
                recorder.read(value)
            if matcher is not None:
                matcher.consume(value)
            if runs_on:
                if not runs_ahead:
                    state = compute_state(model, mx.array([[value]]), session.caches)
                    logits = model.head(state)[:, 0]
                elif late is not None:
                    late.fill([value])
                    mx.async_eval(
                        following or logits, sampler.state, recorder.state if recorder else ()
                    )
                if following is None and not (matcher and matcher.stopped):
                    following = _sample(sampler, logits, mask=_mask(matcher), recorder=recorder)
                session.tokens.append(value)
            timings.record(index, time.perf_counter() - start)
            yield value, timings
            session.check_turn(turn)
            if following is None:
                return
            token, checked = following
    except (Exception, KeyboardInterrupt):
        if session.turn == turn:
            session.recover()
        raise


def decode_batch(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limit: int,
    timings: Timings,
    kv: Quantization | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[list[int]]:
    """Generate for several prompts at once, padded on the left to one length.

    Args:
        limit: maximum number of tokens for each prompt.
        timings: updated with every token.
        kv: quantization of keys and values; None keeps them as floats.
        prefill_chunk: tokens of each prompt that run in one pass; None takes the default.

    Yields:
        One token for each prompt, up to ``limit`` times.

    Raises:
        NonFiniteLogits: NaN or infinity instead of a token.
    """
    start = time.perf_counter()
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = model.make_caches(padding=padding, kv=kv)
    sampler = Sampler(sampling, model.vocab_size, prompts)
    tokens = mx.array(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    )
    streaming = streaming_of(model)
    for index in range(limit):
        state = feed(model, tokens, caches, streaming, prefill_chunk)
        row, checked = _sample(sampler, model.head(state[:, -1:])[:, 0])
        values = _read(checked, index)
        timings.record(index, time.perf_counter() - start, len(prompts))
        yield values
        tokens = row[:, None]


def _mask(matcher: Matcher | None) -> np.ndarray | None:
    return None if matcher is None else matcher.mask()


def _sample(
    sampler: Sampler,
    logits: mx.array,
    queue: bool = True,
    mask: np.ndarray | None = None,
    recorder: LogprobRecorder | None = None,
) -> tuple[mx.array, mx.array]:
    """Sample the next tokens, and check the logits in the same graph.

    Args:
        queue: start the evaluation now.
        mask: tokens that may be chosen (V,); None for all.
        recorder: receives the log-probabilities; None computes none.

    Returns:
        Tokens (B,), always safe to use as an index; and the same with -1 for a row whose logits
        were not finite, so that a single read from the device gives both.
    """
    tokens = sampler(logits if mask is None else mx.where(mx.array(mask), logits, -mx.inf))
    # Neither is finite if a logit is NaN or +inf, or if all are -inf. On a CPU the maximum is ten
    # times faster; whether it passes NaN on was not tested on Metal.
    on_cpu = mx.default_device() == mx.cpu
    total = logits.max(axis=-1) if on_cpu else mx.logsumexp(logits, axis=-1)
    checked = mx.where(mx.isfinite(total), tokens.astype(mx.int32), -1)
    # Unevaluated arrays of MLX belong to the thread that made them, and another thread may draw the
    # next token: the sampler's state is evaluated too
    if recorder is not None:
        recorder.compute(logits, tokens)
    if queue:
        mx.async_eval(checked, sampler.state, recorder.state if recorder else ())
    return tokens, checked


def _read(checked: mx.array, index: int) -> list[int]:
    """Wait for the tokens of step ``index``.

    Raises:
        NonFiniteLogits: the logits of a row were not finite.
    """
    values = [int(token) for token in checked.tolist()]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    if -1 in values:
        raise NonFiniteLogits(
            f"the model's output is not finite at generated token {index}: a weight file is damaged, or the precision "
            "too low; download it again, or load it with dtype='float32'"
        )
    return values
