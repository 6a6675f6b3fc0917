"""Gated delta rule: a matrix of fast weights that each token decays, reads and corrects.

For every head, with decay exp(g), key k, value v and write strength beta:

    S <- exp(g) S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T q

Source: arXiv:2412.06464 (gated DeltaNet), arXiv:2406.06484 (parallel form over chunks). Everything
is computed in float32, as errors of the state accumulate.
"""

import mlx.core as mx

CHUNK = 64  # tokens that the parallel form solves together


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rule over L tokens, in the cheaper form.

    Shape:
        q, k (B, H, L, N), v (B, H, L, V), g and beta (B, H, L), state (B, H, N, V)
        -> outputs (B, H, L, V), new state
    """
    if q.shape[2] == 1:
        return step(q, k, v, g, beta, state)
    return chunked(q, k, v, g, beta, state)


def step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run the rule one token after the other; shapes as in ``delta_rule``."""
    outputs: list[mx.array] = []
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        state = state * mx.exp(g[:, :, token, None])
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
    decay = mx.cumsum(g, axis=-1)  # (B, H, n, C), logarithm of what is left of the first state
    between = mx.exp(mx.minimum(decay[..., :, None] - decay[..., None, :], 0))  # (B, H, n, C, C)
    before = mx.tril(mx.ones((size, size)), -1)
    up_to = mx.tril(mx.ones((size, size)))
    writes = beta[..., None] * k
    inverse = invert_unit_lower(before * between * (writes @ k.swapaxes(-1, -2)))
    new_values = inverse @ (beta[..., None] * v)  # (B, H, n, C, V)
    old_keys = inverse @ (writes * mx.exp(decay)[..., None])  # (B, H, n, C, N)
    scores = up_to * between * (q @ k.swapaxes(-1, -2))
    queries = q * mx.exp(decay)[..., None]
    last = decay[..., -1:]
    keys = k * mx.exp(last - decay)[..., None]
    outputs: list[mx.array] = []
    for n in range(count):
        corrections = new_values[:, :, n] - old_keys[:, :, n] @ state
        outputs.append(queries[:, :, n] @ state + scores[:, :, n] @ corrections)
        state = state * mx.exp(last[:, :, n, :, None])
        state = state + keys[:, :, n].swapaxes(-1, -2) @ corrections
    return mx.concatenate(outputs, axis=2)[:, :, :length], state


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
        corner = -(second @ diagonal[..., width:, :width] @ first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        bottom = mx.concatenate([corner, second], axis=-1)
        blocks = mx.concatenate([top, bottom], axis=-2)
        width *= 2
    return blocks[..., 0, :, :]
