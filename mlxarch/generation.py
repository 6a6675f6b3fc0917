"""Prefill and decode: from prompt tokens to new tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM, Quantization, Step
from mlxarch.cache import last_cache, take_in
from mlxarch.errors import ContextLengthError, InvalidInput, NonFiniteLogits
from mlxarch.sampling import Sampler, Sampling
from mlxarch.streaming.embeddings import late_rows
from mlxarch.streaming.prefill import prefill as prefill_by_layers
from mlxarch.streaming.prefill import segments

MARKS = 2  # states of the windows to which a session goes back: before the last prompt, and behind it
REWIND = 2**27  # bytes that they take at most


def prefill_chunk() -> int:
    """Tokens of a prompt that run at once: what bounds its activations. A CPU gains nothing from longer ones."""
    return 512 if mx.default_device() == mx.cpu else 2048


@dataclass
class Timings:
    """How long a generation took, in seconds, and over how many tokens.

    Attributes:
        prompt_tokens: of the whole prompt.
        reused_tokens: of these, held already from an earlier turn.
        generated_tokens: sampled, the end token included.
        prefill_seconds: until the first token was known.
        decode_seconds: from then to the last token.
        dropped_tokens: of prompt and answer, left out of a context that was full.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    dropped_tokens: int = 0

    def record(self, index: int, seconds: float, rows: int = 1) -> None:
        """Note that the ``index``-th token of each row is known, ``seconds`` after the call."""
        if index == 0:
            self.prefill_seconds = seconds
        self.generated_tokens, self.decode_seconds = (index + 1) * rows, seconds - self.prefill_seconds

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the call to the first token."""
        return self.prefill_seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, without those reused."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Session:
    """The caches of a conversation and the tokens that they hold, so that a turn prefills only what differs.

    Attributes:
        caches: one for each layer.
        tokens: what the caches hold.
        renew: makes empty caches, where what these hold cannot be computed.
        model: whose caches they are; None until the first turn.
        turn: counts the turns, so that an answer left unfinished notices that a later one has begun.
        rewind: bytes for copies of windows, with which a replaced last turn needs no new start. A turn has up to two:
            where its prompt begins to differ from what came before, and where its answer begins.
    """

    caches: list[Cache | None]
    tokens: list[int] = field(default_factory=list)
    renew: Callable[[], list[Cache | None]] | None = None
    model: CausalLM | None = None
    turn: int = 0
    rewind: int = REWIND

    def begin(self, model: CausalLM) -> int:
        """Start a turn, and return its number.

        Raises:
            InvalidInput: the session holds tokens of another model.
        """
        if self.model is not None and self.model is not model:
            raise InvalidInput("this session belongs to another model; take one from the session() of this model")
        self.model, self.renew, self.turn = model, self.renew or model.make_caches, self.turn + 1
        return self.turn

    def check(self, turn: int) -> None:
        """Refuse to go on with an earlier turn: the caches have moved on.

        Raises:
            InvalidInput: another turn has begun since.
        """
        if self.turn != turn:
            raise InvalidInput("another turn has begun in this session; an answer before it cannot go on any more")

    def settle(self) -> None:
        """After a pass that broke off: let the caches hold ``tokens`` and no more, with nothing left to compute."""
        try:
            del self.tokens[self._go_back(len(self.tokens)) :]
            evaluate(self.caches)
        except RuntimeError:  # what they hold cannot be computed
            if self.renew is not None:
                self.caches, self.tokens = self.renew(), []

    def _go_back(self, length: int) -> int:
        """Let all caches forget down to the same number of tokens: the largest, up to ``length``, that they can."""
        caches = [cache for cache in self.caches if cache is not None]
        while (found := min((cache.reachable(length) for cache in caches), default=length)) < length:
            length = found
        for cache in caches:
            cache.truncate(length)
        return length

    def keep_common(self, prompt: Sequence[int]) -> int:
        """Forget all but what ``prompt`` begins with, and return how many tokens that is.

        Windows have no past: they go back to where ``mark`` was called, or else to the beginning. The last token of
        the prompt is never kept: its logits are needed.
        """
        common = 0
        for held, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if held != wanted:
                break
            common += 1
        grows = common == len(self.tokens)
        common = self._go_back(common)
        del self.tokens[common:]
        if grows and common:
            self.mark()
        return common

    def mark(self) -> None:
        """Let later prompts go back to what is held now, as far as ``rewind`` bytes suffice for it."""
        size = sum(cache.mark_bytes for cache in self.caches if cache is not None)
        keep = min(MARKS, self.rewind // size) if size else 0
        for cache in self.caches:
            if cache is not None:
                cache.mark(keep)


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse what must never become an index.

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


def room(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """How many tokens may be generated.

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


def evaluate(caches: Sequence[Cache | None]) -> None:
    """Compute what the caches hold, and nothing else: not the head, whose logits nobody asked for."""
    mx.eval([cache.arrays() for cache in caches if cache is not None])


def prefill(model: CausalLM, session: Session, prompt: Sequence[int]) -> mx.array:
    """Feed what the session does not hold yet of ``prompt``, and return the logits (1, V) behind its last token."""
    chunks = [mx.array([chunk]) for chunk in _chunks(model, prompt[len(session.tokens) :])]

    def taken(count: int) -> None:
        session.tokens += prompt[len(session.tokens) :][:count]

    state = _feed(model, chunks, session.caches, taken)
    return model.head(state[:, -1:])[:, 0]


def _feed(
    model: CausalLM,
    chunks: Sequence[mx.array],
    caches: Sequence[Cache | None],
    taken: Callable[[int], None] = lambda count: None,
) -> mx.array:
    """Let the caches take in chunks (B, L) of tokens, and return the state behind the last layer, of the last chunk.

    ``taken`` is told whenever the caches hold so many tokens (L) more.
    """
    *before, last = segments(model, chunks) if model.streaming is not None else [[chunk] for chunk in chunks]
    for some in before:
        if len(some) > 1:
            prefill_by_layers(model, some, caches, only_caches=True)
        else:
            _take_in(model, some[0], caches)
        evaluate(caches)
        taken(sum(chunk.shape[1] for chunk in some))
    state = model.states(last[0], caches) if len(last) == 1 else prefill_by_layers(model, last, caches)
    taken(sum(chunk.shape[1] for chunk in last))
    return state


def _take_in(model: CausalLM, chunk: mx.array, caches: Sequence[Cache | None]) -> None:
    """Let the caches take in a chunk (B, L), and ask for nothing behind the last of them."""
    last, step = last_cache(caches), Step(chunk.shape[1], caches)
    state = model.embed(chunk, step)
    for layer, cache in zip(model.layers[:last], caches, strict=False):
        state = layer(state, step, cache)
    take_in(model.layers[last], state, step, caches[last])


def _chunks(model: CausalLM, tokens: Sequence[int]) -> list[list[int]]:
    """What of a prompt runs at once."""
    rest, size, chunks = list(tokens), model.chunk or prefill_chunk(), []
    # a pass for the caches alone skips what its last layer makes of them: where a pass for one token costs little,
    # all tokens but the last go that way
    last = 1 if mx.default_device() == mx.cpu else size
    while len(rest) > last:
        count = min(size, len(rest) - 1)
        chunks, rest = [*chunks, rest[:count]], rest[count:]
    return [*chunks, rest]


def decode(
    model: CausalLM, session: Session, prompt: Sequence[int], sampling: Sampling, limit: int
) -> Iterator[tuple[int, Timings]]:
    """Generate up to ``limit`` tokens; the caller stops earlier by closing the iterator.

    The next step's graph is queued before the current token is read, so the device never waits for the host. Where
    rows of embeddings come from the disk, it is built before and queued as soon as they are read.
    ``session`` holds at any time just the tokens that its caches have taken in.

    Yields:
        Each token with the timings so far; one object, updated as it goes.

    Raises:
        NonFiniteLogits: NaN or infinity instead of a token.
        InvalidInput: the session belongs to another model, or has begun another turn meanwhile.
    """
    begin, turn = time.perf_counter(), session.begin(model)
    timings = Timings(len(prompt), session.keep_common(prompt))
    sampler, late = Sampler(sampling, model.vocab_size, [prompt]), late_rows(model)
    try:
        logits = prefill(model, session, prompt)
        session.mark()
        token, checked = _sample(sampler, logits)
        for index in range(limit):
            following = None
            if index + 1 < limit:
                with late or nullcontext():
                    state = model.states(token[None], session.caches)
                following = _sample(sampler, model.head(state)[:, 0], begin=late is None)
            [value] = _read(checked, index)
            if following is not None:
                if late is not None:
                    late.fill([value])
                    mx.async_eval(following, sampler.state)
                session.tokens.append(value)
                token, checked = following
            timings.record(index, time.perf_counter() - begin)
            yield value, timings
            session.check(turn)
    except (Exception, KeyboardInterrupt):
        if session.turn == turn:
            session.settle()
        raise


def decode_batch(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limit: int,
    timings: Timings,
    kv: Quantization | None = None,
) -> Iterator[list[int]]:
    """Generate for several prompts at once, padded on the left to one length.

    ``timings`` is kept up to date; ``kv`` says how keys and values are packed.

    Yields:
        One token for each row, up to ``limit`` times.

    Raises:
        NonFiniteLogits: NaN or infinity instead of a token.
    """
    begin, longest = time.perf_counter(), max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = model.make_caches(padding=padding, kv=kv)
    sampler = Sampler(sampling, model.vocab_size, prompts)
    tokens = mx.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    size = model.chunk or prefill_chunk()
    chunks = [tokens[:, start : start + size] for start in range(0, longest, size)]
    for index in range(limit):
        state = _feed(model, chunks, caches)
        row, checked = _sample(sampler, model.head(state[:, -1:])[:, 0])
        values = _read(checked, index)
        timings.record(index, time.perf_counter() - begin, len(prompts))
        yield values
        chunks = [row[:, None]]


def _sample(sampler: Sampler, logits: mx.array, begin: bool = True) -> tuple[mx.array, mx.array]:
    """Queue the next tokens (B,), and the same with -1 where the logits of the row were not finite.

    The first are always safe to use as an index, the second tell in a single read from the device.
    """
    tokens = sampler(logits)
    # one pass in float32: not finite if a logit is NaN or +inf, or if all are -inf
    checked = mx.where(mx.isfinite(mx.logsumexp(logits, axis=-1)), tokens.astype(mx.int32), -1)
    # the sampler's state too: MLX's unevaluated arrays belong to the thread that made them, and between two tokens
    # nothing may be left to this one
    if begin:
        mx.async_eval(checked, sampler.state)
    return tokens, checked


def _read(checked: mx.array, index: int) -> list[int]:
    """Wait for the tokens of step ``index``."""
    values = [int(token) for token in checked.tolist()]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    if -1 in values:
        raise NonFiniteLogits(
            f"the model's output is not finite at generated token {index}: a weight file is damaged, or the precision "
            "too low; download it again, or load it with dtype='float32'"
        )
    return values
