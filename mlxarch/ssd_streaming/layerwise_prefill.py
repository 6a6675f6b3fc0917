"""Layer-wise prefill: all chunks of a prompt pass a layer together, so that each expert is read once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxarch.blocks import CausalLM, ForwardContext, Router
from mlxarch.blocks.layer import Layer, mixer_name
from mlxarch.kv_cache import Cache, last_cached_layer, update_cache_only
from mlxarch.ssd_streaming.experts import ExpertStreaming, StreamedExperts

SEGMENT_BYTES = 256 << 20  # of hidden states and outputs of experts, for the tokens of a segment
HIDDEN_ARRAYS = 3  # of each token: state, attention output, input of the experts


def segment_token_bytes(chosen: int, hidden: int, float_bytes: int) -> int:
    """Bytes held for a token while its ``chosen`` experts run; the input is copied once more for
    the product.
    """
    return (HIDDEN_ARRAYS + 1 + chosen) * hidden * float_bytes


def segments(
    model: CausalLM, streaming: ExpertStreaming, chunks: Sequence[mx.array]
) -> Iterator[list[mx.array]]:
    """Group the chunks (B, L) of a prompt into segments that pass a layer together.

    A segment has as many tokens as planned, or as fit into ``SEGMENT_BYTES``, and at least one
    chunk. The division does not change any result: no product of experts depends on the other
    chunks of its segment.
    """
    most = streaming.segment
    if most is None:
        size = max(layer.dim for layer in streaming.layers.values())
        most = SEGMENT_BYTES // segment_token_bytes(
            max(m.k for m in model.modules() if isinstance(m, Router)), size, 4
        )
    segment: list[mx.array] = []
    for chunk in chunks:
        if segment and sum(c.size for c in segment) + chunk.size > most:
            yield segment
            segment = []
        segment.append(chunk)
    if segment:
        yield segment


def prefill(
    model: CausalLM,
    streaming: ExpertStreaming,
    chunks: Sequence[mx.array],
    caches: Sequence[Cache | None],
    only_caches: bool = False,
) -> mx.array:
    """Process successive chunks of a prompt layer by layer.

    Every product has the shape it has when the chunks pass all layers one after the other, and
    experts are computed once all chunks have chosen theirs. The results are therefore bitwise
    equal.

    Args:
        chunks: token ids (B, L) of each chunk.
        only_caches: compute only the keys and values; the returned state is then meaningless.

    Returns:
        Hidden states (B, L, hidden_size) after the last layer, of the last chunk.
    """
    contexts: list[ForwardContext] = []
    before = 0
    for chunk in chunks:
        context = model.begin_pass(chunk, caches)
        context.offset = context.offset + before  # the caches will hold the chunks before it
        contexts.append(context)
        before += chunk.shape[1]
    states = [model.embed(chunk, context) for chunk, context in zip(chunks, contexts, strict=True)]
    last = last_cached_layer(caches)
    for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        # From the last cache on, only the last chunk is needed; the others just fill that cache
        first = 0 if number < last else len(chunks) - (not only_caches)
        experts = streaming.layers.get(number)
        for state, context in zip(states[:first], contexts, strict=False):
            update_cache_only(layer, state, context, cache)
            mx.eval(_arrays(cache))
        if first == len(chunks):
            continue
        if experts is None:
            _one_by_one(layer, states, contexts, cache, first)
        else:
            _run_experts_once(layer, experts, states, contexts, cache, first)
    return states[-1]


def _one_by_one(
    layer: Layer,
    states: list[mx.array],
    contexts: Sequence[ForwardContext],
    cache: Cache | None,
    first: int,
) -> None:
    """Run the layer on the chunks from ``first`` on, one after the other, and replace their states."""
    for number in range(first, len(contexts)):
        states[number] = layer(states[number], contexts[number], cache)
        mx.eval(_arrays(cache), states[number])


def _run_experts_once(
    layer: Layer,
    experts: StreamedExperts,
    states: list[mx.array],
    contexts: Sequence[ForwardContext],
    cache: Cache | None,
    first: int,
) -> None:
    """Run the layer on the chunks from ``first`` on, reading each expert once for all of them.

    The layer runs twice on each chunk: up to the experts, to learn which are chosen, and from there
    on. The output of attention is kept from the first run for the second; nothing else that costs
    time is computed twice.
    """
    with experts.shared.lock, _cached_mixer(layer) as kept:
        with experts.collecting() as calls:
            for number in range(first, len(contexts)):
                layer(states[number], contexts[number], cache)
                mixed = [] if kept is None else kept[contexts[number]]
                mx.eval(_arrays(cache), mixed, calls[-1].x, calls[-1].chosen)
        with experts.replaying(experts.run(calls)):
            experts.shared.finish()  # releases results that it would hold until the next layer
            for number in range(first, len(contexts)):
                states[number] = layer(states[number], contexts[number], cache)
                mx.eval(states[number])
                if kept is not None:
                    del kept[contexts[number]]


def _arrays(cache: Cache | None) -> list[mx.array]:
    return [] if cache is None else cache.arrays()


class _CachedMixer:
    """Token mixer of a layer that computes its output once for each forward context."""

    def __init__(self, mixer: Any) -> None:
        self._mixer = mixer
        self.outputs: dict[ForwardContext, mx.array] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)  # another thread may make a cache meanwhile

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        if context not in self.outputs:
            self.outputs[context] = self._mixer(x, context, cache)
        return self.outputs[context]


@contextmanager
def _cached_mixer(layer: Any) -> Iterator[dict[ForwardContext, mx.array] | None]:
    """Replace the token mixer of a layer by ``_CachedMixer`` in the block; gives its outputs.

    None for a layer without one.
    """
    name = mixer_name(layer)
    if name is None:
        yield None
        return
    mixer = layer[name]
    layer[name] = cached = _CachedMixer(mixer)
    try:
        yield cached.outputs
    finally:
        layer[name] = mixer
