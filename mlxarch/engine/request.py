"""Requests to the engine, their handles, and the outputs that each step gives them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from mlxarch.errors import InvalidInput, MlxArchError
from mlxarch.generation.logprobs import TokenLogprobs, check_top_logprobs
from mlxarch.generation.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenMatcher(Protocol):
    """Constraint on the tokens of one answer, such as a grammar."""

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next, bool (V,); None if all may."""
        ...

    def consume(self, token: int) -> None:
        """Advance by a token of the answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt, and how to continue it.

    Attributes:
        prompt: token ids.
        max_tokens: maximum number of generated tokens; 0 only computes ``prompt_logprobs``.
        sampling: sampling parameters.
        end_tokens: tokens after which the answer ends; the token itself is delivered.
        top_logprobs: number of most likely tokens to report at each step, beside the chosen one; None
            reports no log-probabilities.
        prompt_logprobs: whether to report log-probabilities of the prompt's tokens.
        matcher: constraint on the tokens of the answer.
        conversation: name of the conversation, a hint for the prefix cache.

    Raises:
        InvalidInput: a value is out of its range.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    end_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    matcher: TokenMatcher | None = None
    conversation: str | None = None

    def __post_init__(self) -> None:
        lowest = 0 if self.prompt_logprobs else 1
        if type(self.max_tokens) is not int or self.max_tokens < lowest:
            raise InvalidInput(
                f"max_tokens must be a whole number from {lowest} on, found {self.max_tokens!r}"
            )
        check_top_logprobs(self.top_logprobs)


@dataclass(frozen=True)
class PromptReport:
    """Facts about a prompt that are known once it is read.

    Attributes:
        tokens: tokens of the prompt.
        cached_tokens: tokens at its beginning that the prefix cache held.
        first_difference: index of the first token that differs from the cached tokens that begin
            most alike; None if the cache held nothing alike, or all that could be held.
        logprobs: for each token of the prompt, None for the first; empty unless asked for.
    """

    tokens: int
    cached_tokens: int = 0
    first_difference: int | None = None
    logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True)
class RequestTimings:
    """Seconds that a request spent waiting, reading its prompt, and decoding."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class RowOutput:
    """Output of one step for one request.

    Attributes:
        tokens: new tokens.
        logprobs: one for each new token if asked for.
        finish_reason: set in the last output.
        error: set with the finish reason "error".
        progress: tokens of the prompt read so far and in all, while it is read.
        prompt: set in the first output after the prompt has been read.
        timings: set in the last output.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: MlxArchError | None = None
    progress: tuple[int, int] | None = None
    prompt: PromptReport | None = None
    timings: RequestTimings | None = None


class RequestHandle:
    """A submitted request.

    Attributes:
        id: name of the request, unique in its engine.
        done: set once the last output has been delivered.
        cancelled: whether it was told to end.
        paused: whether it generates nothing for now, because its reader is behind; its caches stay.
    """

    def __init__(self, id: str, wake: Callable[[], None]) -> None:
        self.id = id
        self.done = threading.Event()
        self.cancelled = False
        self.paused = False
        self._wake = wake

    def pause(self) -> None:
        """Generate nothing more after the step under way, until ``resume``."""
        self.paused = True

    def resume(self) -> None:
        """Go on generating."""
        self.paused = False
        self._wake()

    def cancel(self) -> None:
        """End the request after the step under way; its last output has the reason "cancelled"."""
        self.cancelled = True
        self._wake()


@dataclass(frozen=True)
class EngineStatus:
    """State of an engine.

    Attributes:
        alive: whether it accepts and runs requests.
        running: requests that decode.
        reading: requests whose prompt is read.
        waiting: requests in the queue, and those that were set aside.
        row_bytes: bytes of the caches of all running requests.
        room_bytes: bytes that rows and prefix cache may take; None without a limit.
        prefix_bytes: bytes of the prefix cache in memory.
        rows_independent: whether a probe at the start found that the bits of a row do not depend on
            the rows beside it; False until it has run.
        counters: totals since the start, by name.
    """

    alive: bool
    running: int
    reading: int
    waiting: int
    row_bytes: int
    room_bytes: int | None
    prefix_bytes: int
    rows_independent: bool
    counters: Mapping[str, int] = field(default_factory=dict)
