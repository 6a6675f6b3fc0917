"""Memory for the caches of rows: how much a row takes, and whether a request can ever run."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM, ForwardContext
from mlxarch.errors import DoesNotFit
from mlxarch.kv_cache import update_cache_only
from mlxarch.progress import format_size

MakeCaches = Callable[[], list[Cache | None]]


def one_token_caches(model: CausalLM, make_caches: MakeCaches) -> list[Cache | None]:
    """Caches that hold one token; their shapes are known, their contents are never computed."""
    caches = make_caches()
    context = ForwardContext(1, caches)
    state = model.embed(mx.array([[0]]), context)
    for layer, cache in zip(model.layers, caches, strict=True):
        update_cache_only(layer, state, context, cache)
    return caches


class MemoryRoom:
    """Memory that rows and the prefix cache share.

    A row reserves room for its prompt and the first tokens of its answer, and more as it grows.
    Reserving the longest possible answer would leave most of the memory unused.

    Args:
        total: bytes; None without a limit.
        sample: caches that hold one token.
    """

    first_tokens = 2048  # of an answer that are reserved at first
    more_tokens = 1024  # that are reserved whenever these are used up

    def __init__(self, total: int | None, sample: Sequence[Cache | None]) -> None:
        self.total = total
        self._sample = [cache for cache in sample if cache is not None]

    def bytes_for(self, tokens: int) -> int:
        """Bytes of the caches of a row with that many tokens."""
        return sum(cache.bytes_at(tokens) for cache in self._sample)

    def first_reservation(self, prompt: int, max_tokens: int) -> int:
        """Tokens to reserve for a request before it runs."""
        return prompt + min(max_tokens, self.first_tokens)

    def next_reservation(self, reserved: int, prompt: int, max_tokens: int) -> int:
        """Tokens to reserve for a row that has used up its reservation."""
        return min(reserved + self.more_tokens, prompt + max_tokens)

    def check(self, prompt: int, max_tokens: int) -> None:
        """Refuse a request that cannot run even if nothing else does.

        Raises:
            DoesNotFit: it takes more than the whole room.
        """
        needed = self.bytes_for(prompt + max_tokens)
        if self.total is not None and needed > self.total:
            raise DoesNotFit(
                f"{prompt} tokens of prompt and {max_tokens} to generate take "
                f"{format_size(needed)} of KV cache, and all requests together may take "
                f"{format_size(self.total)}; shorten the prompt, ask for fewer tokens, or load the "
                "model with kv_bits=8"
            )
