"""State of one request while it runs: its caches, its sampler, its tokens."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxarch.blocks import Cache
from mlxarch.engine.parking import ParkedCaches
from mlxarch.engine.request import (
    FinishReason,
    GenerationRequest,
    PromptReport,
    RequestHandle,
    RequestTimings,
    RowOutput,
)
from mlxarch.errors import MlxArchError
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.generation.sampling import RowSampler

logger = logging.getLogger(__name__)
Deliver = Callable[[RowOutput], None]


@dataclass(frozen=True)
class ChosenToken:
    """One token of those that a step has chosen for all its rows (B,)."""

    tokens: mx.array
    index: int


class Row:
    """A request from its arrival to its last output.

    Attributes:
        caches: KV cache of each layer.
        sampler: state of its sampling; None until its prompt is read.
        fed: tokens of the prompt that the caches hold.
        borders: positions in the prompt at which a chunk must end, because the caches are stored there.
        reserved: tokens for which it has reserved memory.
        parked: its caches while it is set aside; None while it runs.
        tokens: generated tokens that have been delivered.
        chosen: newest chosen token, which the host may not know yet.
        chosen_count: tokens chosen so far, delivered or not.
        reason: why the row has ended; None before.
        prompt_logprobs: of the tokens of the prompt read so far.
    """

    def __init__(self, request: GenerationRequest, handle: RequestHandle, deliver: Deliver) -> None:
        self.request = request
        self.handle = handle
        self._deliver = deliver
        self.caches: list[Cache | None] = []
        self.sampler: RowSampler | None = None
        self.fed = 0
        self.reserved = 0
        self.borders: set[int] = set()
        self.parked: ParkedCaches | None = None
        self.cached_tokens = 0
        self.first_difference: int | None = None
        self.tokens: list[int] = []
        self.chosen: ChosenToken | None = None
        self.chosen_count = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.reason: FinishReason | None = None
        self._reported = False
        self._arrived = time.perf_counter()
        self._admitted: float | None = None
        self._first_token: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the last output has been delivered."""
        return self.handle.done.is_set()

    @property
    def prompt_is_read(self) -> bool:
        """Whether the caches hold the whole prompt."""
        return self.fed == len(self.request.prompt)

    @property
    def may_choose(self) -> bool:
        """Whether another token is within the limit, counting those that are not delivered yet."""
        return self.chosen_count < self.request.max_tokens

    @property
    def arrived(self) -> float:
        """Time of its arrival; the youngest row has the largest."""
        return self._arrived

    @property
    def seconds(self) -> float:
        """Seconds since it was admitted."""
        return 0.0 if self._admitted is None else time.perf_counter() - self._admitted

    @property
    def held(self) -> int:
        """Tokens that its caches hold."""
        return self.fed + max(self.chosen_count - 1, 0)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of its caches."""
        return sum(cache.nbytes for cache in self.caches if cache is not None)

    def admit(self, caches: list[Cache | None], reserved: int) -> None:
        """Take empty caches, with which the row begins to run."""
        self.caches = caches
        self.reserved = reserved
        self._admitted = time.perf_counter()

    def set_aside(self, folder: Path | None) -> None:
        """Move the caches out of the way, to a file in ``folder`` or to the host's memory."""
        self.parked = ParkedCaches(self.caches, folder)
        self.caches = []

    def resume(self, caches: list[Cache | None]) -> None:
        """Continue where it was set aside, with caches that are still empty."""
        if self.parked is not None:
            self.parked.restore(caches)
            self.parked = None
        self.caches = caches

    def next_mask(self) -> mx.array | None:
        """Tokens (V,) that its matcher allows next; None if it has none or all are allowed."""
        matcher = self.request.matcher
        allowed = None if matcher is None else matcher.mask()
        return None if allowed is None else mx.array(allowed)

    def report_progress(self) -> None:
        """Deliver how much of the prompt has been read."""
        self._send(RowOutput(progress=(self.fed, len(self.request.prompt))))

    def add(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Deliver a chosen token, and end the row if it was the last."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self.tokens.append(token)
        matcher = self.request.matcher
        if matcher is not None and token not in self.request.end_tokens:
            matcher.consume(token)
        reason: FinishReason | None = None
        if token in self.request.end_tokens or (matcher is not None and matcher.stopped):
            reason = "stop"
        elif len(self.tokens) >= self.request.max_tokens:
            reason = "length"
        self._output((token,), () if logprobs is None else (logprobs,), reason)

    def finish(self, reason: FinishReason, error: MlxArchError | None = None) -> None:
        """Deliver the last output, without a token."""
        if not self.finished:
            self._output((), (), reason, error)

    def _output(
        self,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        error: MlxArchError | None = None,
    ) -> None:
        prompt = None
        if not self._reported and self.prompt_is_read:
            self._reported = True
            prompt = PromptReport(
                len(self.request.prompt),
                self.cached_tokens,
                self.first_difference,
                tuple(self.prompt_logprobs),
            )
        timings = None if reason is None else self._timings()
        self._send(RowOutput(tokens, logprobs, reason, error, None, prompt, timings))
        if reason is not None:
            self.reason = reason
            if self.parked is not None:
                self.parked.discard()
            self.handle.done.set()

    def _timings(self) -> RequestTimings:
        end = time.perf_counter()
        admitted = self._admitted or end
        first = self._first_token or end
        return RequestTimings(admitted - self._arrived, first - admitted, end - first)

    def _send(self, output: RowOutput) -> None:
        try:
            self._deliver(output)
        except Exception:  # the receiver's fault must not reach the other rows
            logger.exception("the receiver of request %s failed; the request ends", self.handle.id)
            self.handle.cancel()
