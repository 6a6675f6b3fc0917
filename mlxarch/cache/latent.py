"""A cache that keeps every token as one short vector, from which all heads' keys and values are made."""

import mlx.core as mx

from mlxarch.cache.base import Held
from mlxarch.cache.full import FullCache


class LatentCache(FullCache):
    """Keeps the keys only: the first features of a token's key are its value (arXiv:2405.04434 section 2.1).

    The key of multi-head latent attention is the normed latent and, behind it, the turned key that all heads share;
    the value is the latent.
    """

    def append(self, keys: mx.array, values: mx.array) -> tuple[Held, Held]:
        [held] = self._take(keys)
        size = values.shape[-1]
        return held, held[..., :size] if isinstance(held, mx.array) else held.first(size)
