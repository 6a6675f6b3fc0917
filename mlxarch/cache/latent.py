"""A cache that keeps every token as one short vector, from which all heads' keys and values are made."""

import mlx.core as mx

from mlxarch.cache.full import FullCache


class LatentCache(FullCache):
    """Keeps the keys only: the first features of a token's key are its value (arXiv:2405.04434 section 2.1).

    The key of multi-head latent attention is the normed latent and, behind it, the turned key that all heads share;
    the value is the latent.
    """

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + keys.shape[2]
        self._keys = self._room(self._keys, keys, end)
        self._keys[..., self.length : end, :] = keys
        self.length = end
        held = self._keys[..., :end, :]
        return held, held[..., : values.shape[-1]]
