"""More tokens than the context has room for: refused, or the middle is left out."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal, get_args

from mlxarch.blocks import CausalLM
from mlxarch.errors import InvalidInput, MlxArchError
from mlxarch.generation import Session, Timings, decode
from mlxarch.sampling import Sampling

logger = logging.getLogger(__name__)
Overflow = Literal["refuse", "keep-ends"]
OPENING = 64  # tokens that are kept of a text without messages
INSTRUCTIONS = ("system", "developer")  # roles


def check_overflow(overflow: str) -> None:
    """Refuse what is no policy.

    Raises:
        InvalidInput: it is none.
    """
    if overflow not in get_args(Overflow):
        raise InvalidInput(f"overflow must be {' or '.join(get_args(Overflow))}, found {overflow!r}")


def opening(prompt: Any, tokens: Sequence[int], tokens_of: Callable[[list[Mapping[str, Any]]], list[int]]) -> int:
    """How many tokens at the beginning of ``prompt`` are never left out: those of its instructions, or some."""
    if isinstance(prompt, str) or not isinstance(prompt[0], Mapping):
        return OPENING
    instructions = list(takewhile(lambda message: message.get("role") in INSTRUCTIONS, prompt))
    try:
        other = tokens_of([*instructions, {"role": "user", "content": "\n"}])
    except MlxArchError:  # a template may want more than that
        return OPENING
    return len(os.path.commonprefix([list(tokens), other]))


def ends(tokens: Sequence[int], first: int, context: int) -> list[int]:
    """``tokens`` without so many behind the ``first`` that they are fewer than ``context``.

    Of the context a quarter is left out at a time, and the ``first`` are a quarter at most: most turns, and most
    tokens, then only add to what the last one left, and its keys and values go on to be of use.
    """
    if len(tokens) < context:
        return list(tokens)
    step = max(context // 4, 1)
    kept = min(first, step)
    return [*tokens[:kept], *tokens[kept + step * (1 + (len(tokens) - context) // step) :]]


def decode_ends(
    model: CausalLM,
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    limit: int,
    context: int,
    first: int,
) -> Iterator[tuple[int, Timings]]:
    """As ``decode``; where the context is full it goes on behind ``ends`` of all tokens so far, which run anew."""
    begin, tokens, timings, turn = time.perf_counter(), list(prompt), None, None
    while len(tokens) < len(prompt) + limit:
        view = ends(tokens, first, context)
        if turn is not None:
            session.check(turn)
            seed = None if sampling.seed is None else (sampling.seed + 1) % 2**64
            sampling = replace(sampling, seed=seed)  # or the same draws would come again
        if len(view) < len(tokens):
            left_out = "the context of %d tokens is full: %d of %d are left out, behind the opening"
            logger.info(left_out, context, len(tokens) - len(view), len(tokens))
        count, dropped = min(len(prompt) + limit - len(tokens), context - len(view)), len(tokens) - len(view)
        with closing(decode(model, session, view, sampling, count)) as steps:  # pyright: ignore[reportArgumentType]
            for token, own in steps:
                turn = session.turn
                timings = timings or Timings(len(prompt), own.reused_tokens)
                timings.record(len(tokens) - len(prompt), time.perf_counter() - begin)
                timings.dropped_tokens = dropped
                tokens.append(token)
                yield token, timings
