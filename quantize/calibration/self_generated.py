"""Calibration data that the model generates itself, so that no text has to be supplied.

Random tokens show correlations between channels and the propagation of errors less well than
coherent text. Short passages suffice: passages of 8 tokens achieve three quarters of the gain of
passages of 128.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxarch.blocks import ForwardContext
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration.layerwise import LayerwiseModel, ignore_float_errors
from mlxarch.quantize.calibration.numpy_attention import use_numpy_attention

PASSAGE_LENGTH = 8  # tokens, the given first one included
MAX_LOGITS = 16 << 20  # logits computed at once


def generate_continuations(
    resolved: Resolved, batches: Sequence[mx.array], seed: int = 0, progress: Progress = silent
) -> list[mx.array]:
    """Replace all but every ``PASSAGE_LENGTH``-th token by tokens sampled from the model.

    The tokens that stay are the first tokens of passages, which the model continues. The weights
    are read once for each position of a passage.

    Args:
        batches: token ids (B, L); the shapes of the result are the same.
        seed: seed of the sampling.
        progress: receives the number of positions generated.
    """
    if not batches:
        return []
    sizes = [batch.size for batch in batches]
    tokens = np.concatenate([np.asarray(batch).ravel() for batch in batches])
    length = min(PASSAGE_LENGTH, resolved.model.context_length)
    with ignore_float_errors():
        passages = _generate_passages(
            resolved, tokens[::length], length, np.random.default_rng(seed), progress
        )
    pieces = np.split(passages.ravel()[: len(tokens)], np.cumsum(sizes)[:-1])
    return [
        mx.array(piece).reshape(batch.shape) for piece, batch in zip(pieces, batches, strict=True)
    ]


def _generate_passages(
    resolved: Resolved,
    first_tokens: np.ndarray,
    length: int,
    rng: np.random.Generator,
    progress: Progress,
) -> np.ndarray:
    """Return passages (N, length) that continue ``first_tokens`` (N,)."""
    layerwise = LayerwiseModel(resolved, [])
    model = layerwise.model
    use_numpy_attention(model)
    caches = model.make_caches(length)
    columns = [first_tokens]
    batch = max(MAX_LOGITS // model.vocab_size, 1)
    for position in range(1, length):
        progress("writing passages", position - 1, length - 1)
        context = ForwardContext(1, caches)
        with layerwise.loaded_parameters(None):
            state = model.embed(mx.array(columns[-1][:, None]), context)
            mx.eval(state)
        for index, layer in enumerate(model.layers):
            with layerwise.loaded_parameters(index):
                state = layer(state, context, caches[index])
                shared = [v for v in context.shared.values() if isinstance(v, mx.array)]
                mx.eval(state, *shared)
        with layerwise.loaded_parameters(None):
            samples = [
                _sample_tokens(layerwise, rng, state[start : start + batch])
                for start in range(0, len(first_tokens), batch)
            ]
        columns.append(np.concatenate(samples))
    return np.stack(columns, axis=1)


def _sample_tokens(
    layerwise: LayerwiseModel, rng: np.random.Generator, state: mx.array
) -> np.ndarray:
    """Sample one token for each hidden state (N, 1, …) from the softmax of its logits."""
    logits = np.array(layerwise.model.head(state).astype(mx.float32))[:, 0]
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    return np.array([sample_token(row, rng) for row in logits], np.int64)


def sample_token(probabilities: np.ndarray, rng: np.random.Generator) -> int:
    """Sample a token id from probabilities (V,), which need not be normalized."""
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"))
    return min(index, len(cumulative) - 1)
