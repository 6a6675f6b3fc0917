"""Numbers of rows in a decoding pass for which a row's result does not depend on its neighbours.

A kernel may add in another order for another number of rows. At start, one token is therefore
computed alone and beside others, and the logits are compared bit by bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Cache, CausalLM
from mlxarch.kv_cache import CacheBatch, can_batch, join_rows

CUDA_ROWS = 8  # a packed product of as many rows takes as long there as one of a single row
PROBE_TOKENS = 4
LONGER_PROMPT = 300  # so that the keys of a batch with shared arrays have another number


@dataclass(frozen=True)
class BatchSizes:
    """Allowed numbers of rows of a pass; a pass of fewer rows is filled up with copies.

    Attributes:
        sizes: allowed numbers, in ascending order.
        independent: whether the probe found the bits of a row equal in passes of all these sizes.
    """

    sizes: tuple[int, ...]
    independent: bool

    def at_least(self, rows: int) -> int:
        """Smallest allowed number that is at least ``rows``."""
        return next((size for size in self.sizes if size >= rows), rows)


def candidates(max_rows: int) -> list[int]:
    """Numbers of rows that a pass may have on this machine, without regard to bits."""
    if mx.default_device() == mx.cpu or mx.metal.is_available():
        return list(range(1, max_rows + 1))
    return [1, *range(CUDA_ROWS, max_rows + CUDA_ROWS, CUDA_ROWS)] if max_rows > 1 else [1]


def probe_batch_sizes(
    model: CausalLM, max_rows: int, deterministic: bool, shares_arrays: bool = False
) -> BatchSizes:
    """Find the numbers of rows to use.

    Args:
        max_rows: largest number of rows that must run together.
        deterministic: allow only sizes that give the same bits as the largest, whatever they cost.
        shares_arrays: whether rows that decode together have their caches in shared arrays.
    """
    sizes = candidates(max_rows)
    if deterministic:
        logits = {size: _probe_logits(model, size) for size in sizes}
        wanted = logits[sizes[-1]]
        same = tuple(size for size in sizes if _all_rows_equal(logits[size], wanted))
        return BatchSizes(same or (sizes[-1],), independent=bool(same))
    # on a CPU the rows of a product are computed one by one: two of them show it
    probed = sizes[:2] if mx.default_device() == mx.cpu else _spread(sizes)
    wanted = _probe_logits(model, sizes[0])
    compute = _shared_logits if shares_arrays and can_batch(model.make_caches()) else _probe_logits
    equal = (_all_rows_equal(compute(model, size), wanted) for size in probed[1:])
    return BatchSizes(tuple(sizes), independent=all(equal))


def _spread(sizes: Sequence[int]) -> list[int]:
    """The smallest size, and each that is at least twice the one before; the largest as well."""
    spread = [sizes[0]]
    for size in sizes:
        if size >= 2 * spread[-1] or (size == sizes[-1] and size != spread[-1]):
            spread.append(size)
    return spread


def _shared_logits(model: CausalLM, rows: int) -> np.ndarray:
    """The same for rows with shared arrays, beside one with a longer prompt, which is left out."""
    caches = [_filled_caches(model, PROBE_TOKENS) for _ in range(rows - 1)]
    caches.append(_filled_caches(model, LONGER_PROMPT))
    shared = CacheBatch()
    places = shared.arrange(caches, rows)
    state = model.hidden_state(mx.zeros((rows, 1), mx.uint32), shared.layers)
    logits = np.asarray(model.head(state)[:, 0].astype(mx.float32))
    return logits[places[:-1]]


def _probe_logits(model: CausalLM, rows: int) -> np.ndarray:
    """Logits (rows, V), float32, of the same token after the same prompt in every row."""
    caches = _filled_caches(model, PROBE_TOKENS)
    tokens = mx.zeros((rows, 1), mx.uint32)
    state = model.hidden_state(tokens, join_rows([caches], rows))
    return np.asarray(model.head(state)[:, 0].astype(mx.float32))


def _filled_caches(model: CausalLM, length: int) -> list[Cache | None]:
    prompt = [index % model.vocab_size for index in range(1, 1 + length)]
    caches = model.make_caches()
    mx.eval(model.hidden_state(mx.array([prompt]), caches))
    return caches


def _all_rows_equal(logits: np.ndarray, wanted: np.ndarray) -> bool:
    first = wanted[:1].view(np.uint32)
    return bool((logits.view(np.uint32) == first).all())
