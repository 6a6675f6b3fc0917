"""KV caches that store an integer for each token, such as its id, beside its keys and values."""

import mlx.core as mx

from mlxarch.kv_cache.full import FullCache
from mlxarch.kv_cache.sliding import SlidingCache

RECORDS = 2  # index of their buffer, beside those of keys (0) and values (1)


class RecordingCache(FullCache):
    """KV cache of every token with an integer for each.

    Attributes:
        recorded_at: what the owner of the integers wants to remember, with the length to which it
            belongs.
    """

    recorded_at: tuple[int, object] | None = None

    def record(self, numbers: mx.array) -> None:
        """Store an integer for each new token, (B, L); call it before its keys are appended."""
        [stored] = self._buffers.get(RECORDS, (None,))
        buffer, _ = self._write(stored, numbers[:, None, :, None])
        self._buffers = {**self._buffers, RECORDS: (buffer,)}

    def recorded(self) -> mx.array | None:
        """Integers of all tokens, (B, S); None if those of older tokens are no longer stored."""
        [stored] = self._buffers[RECORDS]
        return stored[:, 0, : self.length, 0]


class RecordingSlidingCache(RecordingCache, SlidingCache):
    """KV cache of the newest tokens with an integer for each."""

    def recorded(self) -> mx.array | None:
        return None if self._overwritten else super().recorded()
