"""Sessions: KV caches of a conversation that are reused from turn to turn."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlxarch.blocks import Cache, CausalLM
from mlxarch.errors import InvalidInput, SessionInUse
from mlxarch.kv_cache import StateCache
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.system.backend import claim_process

SNAPSHOTS = 2  # of windows and states in each turn: before the prompt and after it
SNAPSHOT_BYTES = 2**27  # memory for these snapshots
RESUME_TOKENS = 16  # more than chat templates write at the head of an answer


def snapshot_count(size: int, has_states: bool, limit: int = SNAPSHOT_BYTES) -> int:
    """Number of snapshots of ``size`` bytes that a session keeps.

    Args:
        has_states: whether there are recurrent layers. Without a snapshot, a conversation would be
            read from its beginning whenever a turn changes a token; one is kept at any size.
        limit: bytes for all of them.
    """
    if not size or not limit:
        return 0
    return min(SNAPSHOTS, max(limit // size, int(has_states)))


@dataclass
class Session:
    """KV caches of a conversation and the tokens they hold; each turn prefills only what differs.

    Attributes:
        caches: cache of each layer; None for a layer that reads another layer's.
        tokens: tokens that the caches hold.
        renew: makes empty caches, for when the present ones cannot be evaluated.
        model: network that the caches belong to; None until the first turn.
        turn: number of the turn, by which an unfinished answer notices that a later one has begun.
        rewind: bytes for snapshots of sliding windows. With them, replacing the last turn needs no
            new prefill of the whole conversation. A turn takes up to two: where its prompt begins
            to differ from the tokens held, and where its answer begins.
        prefill_chunk: tokens of a prompt per forward pass; None takes the default of the machine.
    """

    caches: list[Cache | None]
    tokens: list[int] = field(default_factory=list)
    renew: Callable[[], list[Cache | None]] | None = None
    model: CausalLM | None = None
    turn: int = 0
    rewind: int = SNAPSHOT_BYTES
    prefill_chunk: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads out while the caches change.

        Raises:
            SessionInUse: another thread is inside. Waiting for it would mix two conversations.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionInUse(
                "another thread generates with this session; a session holds one conversation, so "
                "take one from session() for each thread, or wait for the answer"
            )
        try:
            yield
        finally:
            self._lock.release()

    def begin_turn(self, model: CausalLM) -> int:
        """Start a turn and return its number.

        Raises:
            InvalidInput: the session holds tokens of another model.
            ForkedProcess: the model was loaded before this process was forked.
        """
        claim_process()
        if self.model is not None and self.model is not model:
            raise InvalidInput(
                "this session belongs to another model; take one from the session() of this model"
            )
        self.model = model
        self.renew = self.renew or model.make_caches
        self.turn += 1
        return self.turn

    def check_turn(self, turn: int) -> None:
        """Refuse to continue an earlier turn, since the caches have moved on.

        Raises:
            InvalidInput: another turn has begun since.
        """
        if self.turn != turn:
            raise InvalidInput(
                "another turn has begun in this session; an answer before it cannot go on any more"
            )

    def recover(self) -> None:
        """After an interrupted forward pass, make the caches hold ``tokens`` and evaluate them."""
        try:
            del self.tokens[self._truncate(len(self.tokens)) :]
            evaluate_caches(self.caches)
        except RuntimeError:  # the caches cannot be evaluated
            if self.renew is not None:
                self.caches = self.renew()
                self.tokens = []

    def reuse_prefix(self, prompt: Sequence[int]) -> int:
        """Drop all held tokens but the longest prefix shared with ``prompt``, and return its length.

        A sliding window has overwritten its past: it goes back to a snapshot, or else to the
        beginning. The last token of the prompt is never reused, because its logits are needed.
        """
        common = 0
        for held, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if held != wanted:
                break
            common += 1
        extends = common == len(self.tokens)
        common = self._truncate(common)
        del self.tokens[common:]
        if extends and common:
            self.save_snapshot()
        return common

    @property
    def has_states(self) -> bool:
        """Whether there are recurrent layers, which return to a snapshot only."""
        parts = [part for cache in self.caches if cache is not None for part in cache.parts]
        return any(isinstance(part, StateCache) for part in parts)

    @property
    def resume_tokens(self) -> int:
        """Tokens at the end of a prompt before which a snapshot is taken.

        A chat template ends a prompt with the head of the answer, and the next prompt may write it
        in another way. Keys and values can be cut there, but not a state.
        """
        return RESUME_TOKENS if self.has_states and self.rewind else 0

    def save_snapshot(self) -> None:
        """Let later prompts go back to the present tokens, as far as ``rewind`` bytes allow."""
        size = sum(cache.snapshot_bytes for cache in self.caches if cache is not None)
        count = snapshot_count(size, self.has_states, self.rewind)
        for cache in self.caches:
            if cache is not None:
                cache.snapshot(count)

    def _truncate(self, length: int) -> int:
        """Truncate all caches to the largest common number of tokens up to ``length``, and return it."""
        caches = [cache for cache in self.caches if cache is not None]
        while True:
            reachable = [cache.truncatable_length(length) for cache in caches]
            shortest = min(reachable, default=length)
            if shortest >= length:
                break
            length = shortest
        for cache in caches:
            cache.truncate(length)
        return length
