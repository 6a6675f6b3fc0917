"""Selective state space: a state that decays for every token and takes up an outer product.

For every head, with decay exp(g), input vector k, value v and output vector q:

    S <- exp(g) S + k v^T;   o = S^T q

Source: arXiv:2405.21060 section 6 (state space duality), where k is B, q is C and v is dt x. The
heads of a group share q and k. Everything is computed in float32.
"""

import mlx.core as mx

CHUNK = 128  # tokens that the parallel form processes together


def state_space(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run L tokens, in the cheaper form.

    Shape:
        q, k (B, G, L, N), v (B, G, R, L, P), g (B, G, R, L), state (B, G, R, N, P)
        -> outputs (B, G, R, L, P), new state; for G groups of R heads
    """
    if q.shape[2] == 1:
        return step(q, k, v, g, state)
    return chunked(q, k, v, g, state)


def step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run one token after the other; shapes as in ``state_space``."""
    outputs: list[mx.array] = []
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        written = k[:, :, None, token].swapaxes(-1, -2) * v[..., token, :]  # (B, G, R, N, P)
        state = state * mx.exp(g[..., token, None]) + written
        outputs.append(q[:, :, None, token] @ state)
    return mx.concatenate(outputs, axis=-2), state


def chunked(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Run a chunk of tokens at a time; shapes as in ``state_space``."""
    outputs: list[mx.array] = []
    for start in range(0, q.shape[2], CHUNK):
        tokens = slice(start, start + CHUNK)
        queries = q[:, :, None, tokens]  # (B, G, 1, C, N)
        keys = k[:, :, None, tokens]
        values = v[..., tokens, :]
        decay = mx.cumsum(g[..., tokens], axis=-1)  # (B, G, R, C)
        between = mx.exp(mx.minimum(decay[..., :, None] - decay[..., None, :], 0))
        scores = mx.tril(between * (queries @ keys.swapaxes(-1, -2)))  # (B, G, R, C, C)
        kept = mx.exp(decay)[..., None]
        outputs.append(scores @ values + kept * (queries @ state))
        last = decay[..., -1:]
        weighted = values * mx.exp(last - decay)[..., None]
        state = state * mx.exp(last)[..., None] + keys.swapaxes(-1, -2) @ weighted
    return mx.concatenate(outputs, axis=-2), state
