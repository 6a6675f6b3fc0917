"""KV cache of multi-head latent attention: one latent vector per token."""

import mlx.core as mx

from mlxarch.kv_cache.base import KVArray
from mlxarch.kv_cache.full import FullCache


class LatentCache(FullCache):
    """KV cache without values of its own: the first features of a key are the value.

    The key of a token is its normalised latent followed by the RoPE key that all heads share; the
    value is the latent alone (arXiv:2405.04434 section 2.1). Further vectors are stored as they are.
    """

    def append(self, keys: mx.array, values: mx.array, *others: mx.array) -> tuple[KVArray, ...]:
        cached, *visible = self._append(keys, *others)
        size = values.shape[-1]
        if isinstance(cached, mx.array):
            return cached, cached[..., :size], *visible
        return cached, cached.first_features(size), *visible
