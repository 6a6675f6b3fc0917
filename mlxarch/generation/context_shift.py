"""Context shift: policy for prompts and answers that exceed the context window.

Either they are refused, or tokens in the middle are dropped, behind the instructions.
"""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal, cast, get_args

from mlxarch.blocks import CausalLM
from mlxarch.errors import InvalidInput, MlxArchError
from mlxarch.generation.decode import decode
from mlxarch.generation.logprobs import LogprobRecorder
from mlxarch.generation.prefill import Report
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.structured_output.matcher import Matcher

logger = logging.getLogger(__name__)
Overflow = Literal["refuse", "keep-ends"]
KEPT_TOKENS = 64  # kept at the beginning of a prompt without messages
INSTRUCTION_ROLES = ("system", "developer")


def check_overflow(overflow: str) -> None:
    """Refuse an unknown policy.

    Raises:
        InvalidInput: ``overflow`` is none of ``Overflow``.
    """
    if overflow not in get_args(Overflow):
        raise InvalidInput(
            f"overflow must be {' or '.join(get_args(Overflow))}, found {overflow!r}"
        )


def protected_tokens(
    prompt: Any, tokens: Sequence[int], tokenize: Callable[[list[Mapping[str, Any]]], list[int]]
) -> int:
    """Number of tokens at the beginning of ``prompt`` that are never dropped: those of its instructions.

    Args:
        prompt: text, messages or token ids.
        tokens: token ids of the prompt.
        tokenize: converts messages to token ids.
    """
    if isinstance(prompt, str) or not isinstance(prompt[0], Mapping):
        return KEPT_TOKENS
    instructions = list(takewhile(lambda message: message.get("role") in INSTRUCTION_ROLES, prompt))
    try:
        other = tokenize([*instructions, {"role": "user", "content": "\n"}])
    except MlxArchError:  # the template may require more messages than these
        return KEPT_TOKENS
    return len(os.path.commonprefix([list(tokens), other]))


def shift(tokens: Sequence[int], protected: int, context: int) -> list[int]:
    """Drop tokens after the ``protected`` ones until fewer than ``context`` remain.

    A quarter of the context is dropped at a time, and at most a quarter is protected. Most turns
    then only append to the tokens of the turn before, so that the KV cache stays of use.
    """
    if len(tokens) < context:
        return list(tokens)
    quarter = max(context // 4, 1)
    kept = min(protected, quarter)
    dropped = quarter * (1 + (len(tokens) - context) // quarter)
    return [*tokens[:kept], *tokens[kept + dropped :]]


def decode_with_shift(
    model: CausalLM,
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    limit: int,
    context: int,
    protected: int,
    matcher: Matcher | None = None,
    report: Report | None = None,
    recorder: LogprobRecorder | None = None,
) -> Iterator[tuple[int, Timings]]:
    """Generate like ``decode``; whenever the context is full, shift it, prefill the rest and continue."""
    start = time.perf_counter()
    tokens = list(prompt)
    timings = None
    turn = None
    while len(tokens) < len(prompt) + limit:
        window = shift(tokens, protected, context)
        dropped = len(tokens) - len(window)
        if turn is not None:
            session.check_turn(turn)
            # Another seed, or the same random numbers would be drawn again
            seed = None if sampling.seed is None else (sampling.seed + 1) % 2**64
            sampling = replace(sampling, seed=seed)
        if dropped:
            message = "the context of %d tokens is full: %d of %d are left out, behind the opening"
            logger.info(message, context, dropped, len(tokens))
        count = min(len(prompt) + limit - len(tokens), context - len(window))
        decoding = decode(model, session, window, sampling, count, matcher, report, recorder)
        with closing(cast(Generator[tuple[int, Timings]], decoding)) as steps:
            for token, step_timings in steps:
                turn = session.turn
                timings = timings or Timings(len(prompt), step_timings.reused_tokens)
                timings.record(len(tokens) - len(prompt), time.perf_counter() - start)
                timings.dropped_tokens = dropped
                tokens.append(token)
                yield token, timings
