"""Gated delta rule: a matrix of fast weights that each token decays, reads and corrects.

For every head, with decay exp(g), key k, value v and write strength beta:

    S <- exp(g) S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T q

g is one number for a head (gated DeltaNet), or one for each feature of its keys, which decay
separately (KDA). Source: arXiv:2412.06464 (gated DeltaNet), arXiv:2510.26692 (KDA),
arXiv:2406.06484 (parallel form over chunks). Everything is computed in float32, as errors of the
state accumulate.
"""

import mlx.core as mx

CHUNK = 64  # tokens that the parallel form solves together


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rule over L tokens, in the cheaper form.

    Shape:
        q, k (B, H, L, N), v (B, H, L, V), g (B, H, L) or (B, H, L, N), beta (B, H, L),
        state (B, H, N, V) -> outputs (B, H, L, V), new state
    """
    if q.shape[2] == 1:
        return step(q, k, v, g, beta, state)
    return chunked(q, k, v, g, beta, state)


def step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rule one token after the other; shapes as in ``delta_rule``."""
    outputs: list[mx.array] = []
    g = g[..., None] if g.ndim == 3 else g  # (B, H, L, 1 or N)
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        state = state * mx.exp(g[:, :, token]).swapaxes(-1, -2)
        error = v[:, :, token] - k[:, :, token] @ state  # (B, H, 1, V)
        state = state + k[:, :, token].swapaxes(-1, -2) @ (beta[:, :, token, None] * error)
        outputs.append(q[:, :, token] @ state)
    return mx.concatenate(outputs, axis=2), state


def chunked(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rule a chunk of tokens at a time; shapes as in ``delta_rule``.

    Within a chunk the corrections d of all tokens solve a triangular system.
    """
    length = q.shape[2]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    count = -(-length // size)
    # tokens of padding change nothing: they neither decay nor write
    q, k, v, g, beta = (_split_chunks(x, count, size) for x in (q, k, v, g, beta))
    g = g[..., None] if g.ndim == 4 else g
    # (B, H, n, C, 1 or N), logarithm of what is left of the first state
    decay = mx.cumsum(g, axis=-2)
    writes = beta[..., None] * k
    products = decayed_products if g.shape[-1] > 1 else _products_of_heads
    inverse = invert_unit_lower(mx.tril(products(writes, k, g), -1))  # (B, H, n, C, C)
    new_values = inverse @ (beta[..., None] * v)  # (B, H, n, C, V)
    old_keys = inverse @ (writes * mx.exp(decay))  # (B, H, n, C, N)
    scores = products(q, k, g)
    queries = q * mx.exp(decay)
    last = decay[..., -1:, :]
    keys = k * mx.exp(mx.cumsum(g, axis=-2, reverse=True, inclusive=False))
    outputs: list[mx.array] = []
    for n in range(count):
        corrections = new_values[:, :, n] - old_keys[:, :, n] @ state
        outputs.append(queries[:, :, n] @ state + scores[:, :, n] @ corrections)
        state = state * mx.exp(last[:, :, n]).swapaxes(-1, -2)
        state = state + keys[:, :, n].swapaxes(-1, -2) @ corrections
    return mx.concatenate(outputs, axis=2)[:, :, :length], state


def _products_of_heads(a: mx.array, b: mx.array, g: mx.array) -> mx.array:
    """``decayed_products`` with one decay for all features, (…, C, 1)."""
    decay = mx.cumsum(g, axis=-2)
    between = mx.exp(mx.minimum(decay - decay.swapaxes(-1, -2), 0))  # (…, C, C)
    return mx.tril(between * (a @ b.swapaxes(-1, -2)))


def decayed_products(a: mx.array, b: mx.array, g: mx.array) -> mx.array:
    """Products of each a with all b up to it, of which each feature has decayed in between.

    Element (i, j) is sum a_i b_j exp(g_(j+1) + … + g_i) for j up to i, else 0. Sums from the first
    token on would be large, and their exponentials overflow. Here they begin at a token between i
    and j: the later half of a block times the earlier one, for blocks of twice the size each time.

    Shape:
        a, b, g (…, C, N), with C a power of two -> (…, C, C)
    """
    size = a.shape[-2]
    blocks = (a * b).sum(-1)[..., None, None]  # (…, C, 1, 1)
    width = 1
    while width < size:
        later, earlier, logs = (mx.unflatten(x, -2, (-1, 2 * width)) for x in (a, b, g))
        since = mx.cumsum(logs[..., width:, :], axis=-2)
        until = mx.cumsum(logs[..., :width, :], axis=-2, reverse=True, inclusive=False)
        later = later[..., width:, :] * mx.exp(since)
        earlier = earlier[..., :width, :] * mx.exp(until)
        corner = later @ earlier.swapaxes(-1, -2)  # (…, pairs, width, width)
        blocks = _join_pairs(blocks, corner)
        width *= 2
    return blocks[..., 0, :, :]


def _join_pairs(blocks: mx.array, corner: mx.array) -> mx.array:
    """Join pairs of blocks on the diagonal, (…, 2 n, w, w), with the corners (…, n, w, w) below."""
    first = blocks[..., 0::2, :, :]
    top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    bottom = mx.concatenate([corner, blocks[..., 1::2, :, :]], axis=-1)
    return mx.concatenate([top, bottom], axis=-2)


def _split_chunks(x: mx.array, count: int, size: int) -> mx.array:
    """Pad (B, H, L, …) with zeros, and split it into ``count`` chunks: (B, H, count, size, …)."""
    missing = count * size - x.shape[2]
    if missing:
        x = mx.pad(x, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * (x.ndim - 3)])
    return mx.unflatten(x, 2, (count, size))


def invert_unit_lower(a: mx.array) -> mx.array:
    """Invert I + A for strictly lower triangular A (…, C, C), with C a power of two.

    Blocks on the diagonal are inverted in pairs, of twice the size each time. Other than with powers
    of A, no intermediate number is larger than those of the result's blocks.
    """
    size = a.shape[-1]
    blocks = mx.ones((*a.shape[:-2], size, 1, 1), a.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        tiles = a.reshape(*a.shape[:-2], pairs, 2 * width, pairs, 2 * width)
        diagonal = mx.moveaxis(mx.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)
        first = blocks[..., 0::2, :, :]
        second = blocks[..., 1::2, :, :]
        blocks = _join_pairs(blocks, -(second @ diagonal[..., width:, :width] @ first))
        width *= 2
    return blocks[..., 0, :, :]
