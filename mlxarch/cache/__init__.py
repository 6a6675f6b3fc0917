"""Keys and values of the tokens seen so far, and where they stand."""

from mlxarch.cache.base import Cache, Held
from mlxarch.cache.full import FullCache
from mlxarch.cache.last import last_cache, take_in
from mlxarch.cache.latent import LatentCache
from mlxarch.cache.packed import Made, Packed
from mlxarch.cache.sliding import SlidingCache

__all__ = ["Cache", "FullCache", "Held", "LatentCache", "Made", "Packed", "SlidingCache", "last_cache", "take_in"]
