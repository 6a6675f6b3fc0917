"""Caches of earlier tokens, one per layer: keys and values of attention, states of other layers.

base            the interface ``Cache``, and append, truncate and snapshot
full            every token
sliding         the newest tokens of a sliding window, in a ring buffer
latent          one latent vector per token (multi-head latent attention)
parallel        a state, and keys and values, of one layer
recording       keys and values with an integer for each token
state           a state of fixed size (linear attention, state-space models, convolutions), and a
                window with one entry for several older tokens (compressed attention)
quantized       vectors in 8 or 4 bits, rotated before they are quantized
rows            caches of several rows with different numbers of tokens, one for each row
batched         caches of several rows in shared arrays
prefill_only    update a cache without computing the rest of its layer
"""

from mlxarch.kv_cache.base import Cache, KVArray
from mlxarch.kv_cache.batched import BatchedCache, BatchedStateCache, CacheBatch, can_batch
from mlxarch.kv_cache.full import FullCache
from mlxarch.kv_cache.latent import LatentCache
from mlxarch.kv_cache.parallel import ParallelCache
from mlxarch.kv_cache.prefill_only import last_cached_layer, update_cache_only
from mlxarch.kv_cache.quantized import QuantizedVectors, UpProjectedLatents
from mlxarch.kv_cache.rows import PerRow, RowCaches, by_row, join_rows
from mlxarch.kv_cache.sliding import SlidingCache
from mlxarch.kv_cache.state import CompressedCache, CompressedSizes, EntrySizes, StateCache

__all__ = [
    "BatchedCache",
    "BatchedStateCache",
    "Cache",
    "CacheBatch",
    "CompressedCache",
    "CompressedSizes",
    "EntrySizes",
    "FullCache",
    "KVArray",
    "LatentCache",
    "ParallelCache",
    "PerRow",
    "QuantizedVectors",
    "RowCaches",
    "SlidingCache",
    "StateCache",
    "UpProjectedLatents",
    "by_row",
    "can_batch",
    "join_rows",
    "last_cached_layer",
    "update_cache_only",
]
