"""Computations of the engine: a decoding step for all rows, and the next chunk of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM
from mlxarch.engine.row import ChosenToken, Row
from mlxarch.generation.logprobs import (
    LogprobArrays,
    TokenLogprobs,
    compute_logprobs,
    read_logprobs,
)
from mlxarch.generation.pace import compute_state, pace_of
from mlxarch.generation.prefill import default_chunk, fill_caches
from mlxarch.generation.sampling import RowSampler, sample
from mlxarch.kv_cache import CacheBatch, join_rows
from mlxarch.ssd_streaming.experts import streaming_of
from mlxarch.ssd_streaming.layerwise_prefill import prefill as prefill_by_layers
from mlxarch.ssd_streaming.layerwise_prefill import segments

HEAD_TOKENS = 64  # of a prompt whose logits exist at once, for log-probabilities
NOT_FINITE = -1


@dataclass(frozen=True)
class Choice:
    """Tokens chosen for some rows in one step, queued but not read yet.

    Attributes:
        rows: the rows.
        tokens: chosen tokens (B,), always safe to use as an index.
        checked: the same, with ``NOT_FINITE`` for a row whose logits were not finite.
        logprobs: log-probability of each chosen token (B,), and the most likely tokens (B, n) with
            theirs; None if no row asks for them.
    """

    rows: tuple[Row, ...]
    tokens: mx.array
    checked: mx.array
    logprobs: LogprobArrays | None

    def read(self) -> list[tuple[Row, int, TokenLogprobs | None]]:
        """Wait for the tokens; gives each row its token and, if it asked, the log-probabilities."""
        values = np.asarray(self.checked).tolist()
        found: list[TokenLogprobs | None] = [None] * len(values)
        if self.logprobs is not None:
            found = list(read_logprobs(values, self.logprobs))
        results: list[tuple[Row, int, TokenLogprobs | None]] = []
        for row, token, logprobs in zip(self.rows, values, found, strict=True):
            count = row.request.top_logprobs
            if count is None or logprobs is None:
                results.append((row, token, None))
            else:
                top = logprobs.top[:count]
                results.append((row, token, TokenLogprobs(token, logprobs.logprob, top)))
        return results


def forward(
    model: CausalLM, rows: Sequence[Row], batch: int, shared: CacheBatch | None = None
) -> mx.array:
    """Append the newest token of each row to its caches, and compute the logits (B, V) after it.

    Args:
        batch: rows of the pass; those beyond ``rows`` repeat one of them.
        shared: the caches of the rows in shared arrays; None attends row by row.
    """
    if shared is None:
        caches = rows[0].caches
        if batch > 1:
            caches = join_rows([row.caches for row in rows], batch)
        state = model.hidden_state(_newest_tokens(rows, batch)[:, None], caches)
        return model.head(state)[: len(rows), 0]
    places = shared.arrange([row.caches for row in rows], batch)
    by_place = [rows[0]] * batch
    for place, row in zip(places, rows, strict=True):
        by_place[place] = row
    state = model.hidden_state(_newest_tokens(by_place, batch)[:, None], shared.layers)
    shared.advance()
    logits = model.head(state)[:, 0]
    in_order = places == list(range(len(rows)))
    return logits[: len(rows)] if in_order else logits[mx.array(places)]


def _newest_tokens(rows: Sequence[Row], batch: int) -> mx.array:
    """Newest token of each row (B,); the last one is repeated to fill up the batch."""
    chosen = [row.chosen for row in rows if row.chosen is not None]
    chosen += chosen[-1:] * (batch - len(chosen))
    tokens = chosen[0].tokens
    if [each.index for each in chosen] == list(range(tokens.size)) and all(
        each.tokens is tokens for each in chosen
    ):
        return tokens  # of the step before, with the same rows
    return mx.concatenate([each.tokens[each.index : each.index + 1] for each in chosen])


def choose(rows: Sequence[Row], logits: mx.array, masks: Sequence[mx.array | None]) -> Choice:
    """Choose the next token of each row from logits (B, V), and start the computation.

    Args:
        masks: tokens (V,) that each row may take; None allows all.
    """
    samplers = [_sampler(row, logits.shape[-1]) for row in rows]
    tokens = sample(samplers, logits, masks)
    total = mx.logsumexp(logits.astype(mx.float32), axis=-1)
    # The sum is not finite if a logit is NaN or +inf, or if all are -inf
    checked = mx.where(mx.isfinite(total), tokens.astype(mx.int32), NOT_FINITE)
    wanted = [row.request.top_logprobs for row in rows if row.request.top_logprobs is not None]
    logprobs = compute_logprobs(logits, total, tokens, max(wanted)) if wanted else None
    for index, row in enumerate(rows):
        row.chosen = ChosenToken(tokens, index)
        row.chosen_count += 1
    states = [array for sampler in samplers for array in sampler.state]
    mx.async_eval(checked, logprobs or (), tokens, states)
    return Choice(tuple(rows), tokens, checked, logprobs)


def _sampler(row: Row, vocab_size: int) -> RowSampler:
    if row.sampler is None:
        row.sampler = RowSampler(row.request.sampling, vocab_size, row.request.prompt)
    return row.sampler


class Cancelled(Exception):
    """Raised between two evaluations of a pass when its request was cancelled."""


class PromptReader:
    """Reads prompts chunk by chunk into the caches of their rows.

    The borders of chunks are multiples of the chunk's size from the first token on, so that they
    do not depend on what else runs. Where the bits of a token do not depend on them, chunks are
    shorter if need be, to take a tenth of a second. Longer passes are evaluated in parts, and a
    request can be cancelled between two of them. A pass that only fills caches skips the rest of the last layer;
    on a CPU, where a pass over one token costs little, all tokens but the last go that way.

    Args:
        chunk: tokens of a chunk; None takes the default of the machine.
    """

    def __init__(self, model: CausalLM, chunk: int | None = None) -> None:
        self.model = model
        self.chunk = chunk or default_chunk()
        self._streaming = streaming_of(model)
        self._splits_last = mx.default_device() == mx.cpu

    @property
    def budget(self) -> int:
        """Largest number of tokens to read at once."""
        return pace_of(self.model).tokens(self.chunk)

    def next_tokens(self, row: Row) -> int:
        """Number of prompt tokens that ``read`` would read now."""
        return self._end(row, row.fed) - row.fed

    def _end(self, row: Row, start: int) -> int:
        length = len(row.request.prompt)
        end = min((start // self.chunk + 1) * self.chunk, length)
        end = min(end, start + self.budget)
        end = min([end, *(border for border in row.borders if border > start)])
        return length - 1 if end == length and self._splits_last and start < length - 1 else end

    def read(self, row: Row) -> mx.array | None:
        """Read the next chunk; with offloaded experts, the next segment of several chunks.

        Returns:
            Logits (1, V) after the last token of the prompt; None if there is more to read.

        Raises:
            Cancelled: the request was cancelled; the caches cannot be used any more.
        """

        def on_part(done: float) -> None:
            if row.handle.cancelled:
                raise Cancelled

        prompt = row.request.prompt
        length = len(prompt)
        ends = [self._end(row, row.fed)]
        if self._streaming is not None:
            while ends[-1] < length:
                ends.append(self._end(row, ends[-1]))
        starts = [row.fed, *ends[:-1]]
        chunks = [mx.array([prompt[start:end]]) for start, end in zip(starts, ends, strict=True)]
        if self._streaming is not None:
            chunks = next(segments(self.model, self._streaming, chunks))
        end = ends[len(chunks) - 1]
        state = None
        if row.request.prompt_logprobs:
            state = self._read_with_logprobs(row, chunks[0])
            end = ends[0]
        elif end < length:
            fill_caches(self.model, chunks, row.caches, self._streaming, on_part)
        elif self._streaming is not None and len(chunks) > 1:
            state = prefill_by_layers(self.model, self._streaming, chunks, row.caches)
        else:
            state = compute_state(self.model, chunks[0], row.caches, on_part)
        row.fed = end
        if end < length or state is None:
            return None
        return self.model.head(state[:, -1:])[:, 0]

    def _read_with_logprobs(self, row: Row, chunk: mx.array) -> mx.array:
        """Read a chunk (1, L) and note the log-probability of each following token of the prompt."""
        state = self.model.hidden_state(chunk, row.caches)
        if row.fed == 0:
            row.prompt_logprobs.append(None)
        prompt = row.request.prompt
        count = row.request.top_logprobs or 0
        length = chunk.shape[1]
        for start in range(0, length, HEAD_TOKENS):
            first = row.fed + start
            following = prompt[first + 1 : first + 1 + min(HEAD_TOKENS, length - start)]
            if not following:
                break
            logits = self.model.head(state[:, start : start + len(following)])[0]
            total = mx.logsumexp(logits.astype(mx.float32), axis=-1)
            arrays = compute_logprobs(logits, total, mx.array(following), count)
            mx.eval(arrays)
            row.prompt_logprobs += read_logprobs(following, arrays)
        return state
