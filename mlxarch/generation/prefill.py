"""Prefill: fill the KV caches with a prompt, chunk by chunk, and return the logits after its last token.

Chunks bound the memory of activations. Layers whose experts stay on the SSD process several chunks
together, so that each expert is read once for all of them (see
``ssd_streaming.layerwise_prefill``).
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM, ForwardContext
from mlxarch.generation.session import Session
from mlxarch.kv_cache import last_cached_layer, update_cache_only
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.ssd_streaming.experts import ExpertStreaming, streaming_of
from mlxarch.ssd_streaming.layerwise_prefill import prefill as prefill_by_layers
from mlxarch.ssd_streaming.layerwise_prefill import segments


def default_chunk() -> int:
    """Tokens of a prompt that run in one pass by default: 512 on a CPU, which gains nothing from
    more, else 2048.
    """
    return 512 if mx.default_device() == mx.cpu else 2048


def prefill(model: CausalLM, session: Session, prompt: Sequence[int]) -> mx.array:
    """Process the part of ``prompt`` that the session does not hold yet.

    Returns:
        Logits (1, V) after the last token of the prompt.
    """
    rest = prompt[len(session.tokens) :]
    chunks = [
        mx.array([chunk]) for chunk in _chunks(rest, session.prefill_chunk or default_chunk())
    ]

    def on_progress(count: int) -> None:
        session.tokens += prompt[len(session.tokens) :][:count]

    state = feed(model, chunks, session.caches, streaming_of(model), on_progress)
    return model.head(state[:, -1:])[:, 0]


def split_batch(tokens: mx.array, chunk: int | None) -> list[mx.array]:
    """Split padded prompts (B, L) into chunks of at most ``chunk`` tokens; None takes the default."""
    size = chunk or default_chunk()
    return [tokens[:, start : start + size] for start in range(0, tokens.shape[1], size)]


def feed(
    model: CausalLM,
    chunks: Sequence[mx.array],
    caches: Sequence[Cache | None],
    streaming: ExpertStreaming | None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> mx.array:
    """Append chunks (B, L) of tokens to the caches.

    Args:
        streaming: offloaded experts of the model, see ``streaming_of``.
        on_progress: called with the number of tokens (L) that the caches hold since the last call.

    Returns:
        Hidden states (B, L, hidden_size) after the last layer, of the last chunk.
    """
    groups = segments(model, streaming, chunks) if streaming else ([chunk] for chunk in chunks)
    *before, last = groups
    for group in before:
        fill_caches(model, group, caches, streaming)
        on_progress(sum(chunk.shape[1] for chunk in group))
    if streaming and len(last) > 1:
        state = prefill_by_layers(model, streaming, last, caches)
    else:
        state = model.hidden_state(last[0], caches)
    on_progress(sum(chunk.shape[1] for chunk in last))
    return state


def fill_caches(
    model: CausalLM,
    group: Sequence[mx.array],
    caches: Sequence[Cache | None],
    streaming: ExpertStreaming | None,
) -> None:
    """Append chunks (B, L) to the caches, and compute nothing after the last of them.

    Args:
        group: one chunk, or with offloaded experts the chunks of a segment.
    """
    if streaming and len(group) > 1:
        prefill_by_layers(model, streaming, group, caches, only_caches=True)
    else:
        _fill_with_chunk(model, group[0], caches)
    evaluate_caches(caches)


def _fill_with_chunk(model: CausalLM, chunk: mx.array, caches: Sequence[Cache | None]) -> None:
    last = last_cached_layer(caches)
    context = ForwardContext(chunk.shape[1], caches)
    state = model.embed(chunk, context)
    for layer, cache in zip(model.layers[:last], caches, strict=False):
        state = layer(state, context, cache)
    update_cache_only(model.layers[last], state, context, caches[last])


def _chunks(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Split a prompt into chunks of at most ``size`` tokens."""
    rest = list(tokens)
    chunks: list[list[int]] = []
    # A pass that only fills caches skips the rest of the last layer. On a CPU, where a pass over
    # one token costs little, all tokens but the last go that way.
    last = 1 if mx.default_device() == mx.cpu else size
    while len(rest) > last:
        count = min(size, len(rest) - 1)
        chunks.append(rest[:count])
        rest = rest[count:]
    return [*chunks, rest]
