"""A prompt goes through a model layer by layer, all of it, so that each expert it needs is read once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxarch.blocks import CausalLM, Router, Step
from mlxarch.blocks.layer import Layer
from mlxarch.cache import Cache, last_cache, take_in
from mlxarch.streaming.experts import StreamedExperts

HELD = 256 << 20  # bytes of the experts' outputs and all else that is held for every token of a prompt, if need be
BEHIND = 3  # of these, arrays of the hidden size from attention on: state, attention's output, the experts' input


def token_bytes(chosen: int, hidden: int, float_bytes: int) -> int:
    """Bytes that are held for a token while its ``chosen`` experts run, their input in a row with all others' too."""
    return (BEHIND + 1 + chosen) * hidden * float_bytes


def segments(model: CausalLM, chunks: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """The chunks (B, L) of a prompt, so many together as was planned, or else as ``HELD`` allows; one at least.

    Where a segment ends changes no number: no product of experts depends on which other chunks it is carried out with.
    """
    most = model.streaming.segment
    if most is None:
        size = max(layer.dim for layer in model.streaming.layers.values())
        most = HELD // token_bytes(max(m.k for m in model.modules() if isinstance(m, Router)), size, 4)
    some: list[mx.array] = []
    for chunk in chunks:
        if some and sum(c.size for c in some) + chunk.size > most:
            yield some
            some = []
        some.append(chunk)
    if some:
        yield some


def prefill(
    model: CausalLM, chunks: Sequence[mx.array], caches: Sequence[Cache | None], only_caches: bool = False
) -> mx.array:
    """Token ids (B, L) of successive chunks of a prompt -> the state behind the last layer, of the last chunk.

    Every product has the shape that it has where the chunks pass through all layers one after the other; only what
    the experts do is put off until all chunks have chosen theirs. So the numbers are the same.

    Args:
        only_caches: compute what they take in, and no more; what is returned means nothing.
    """
    steps, before = list[Step](), 0
    for chunk in chunks:
        steps.append(Step(chunk.shape[1], caches))
        steps[-1].offset = steps[-1].offset + before  # the caches take the chunks before it in first
        before += chunk.shape[1]
    states = [model.embed(chunk, step) for chunk, step in zip(chunks, steps, strict=True)]
    last = last_cache(caches)
    for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        # from the last cache on only the last chunk is asked for: of the others, what the cache holds is computed
        first = 0 if number < last else len(chunks) - (not only_caches)
        experts = model.streaming.layers.get(number)
        for state, step in zip(states[:first], steps, strict=False):
            take_in(layer, state, step, cache)
            mx.eval(_arrays(cache))
        if first == len(chunks):
            continue
        if experts is None:
            _one_by_one(layer, states, steps, cache, first)
        else:
            _together(layer, experts, states, steps, cache, first)
    return states[-1]


def _one_by_one(layer: Layer, states: list[mx.array], steps: Sequence[Step], cache: Cache | None, first: int) -> None:
    """Replace the states from ``first`` on by those behind the layer."""
    for number in range(first, len(steps)):
        states[number] = layer(states[number], steps[number], cache)
        mx.eval(_arrays(cache), states[number])


def _together(
    layer: Layer,
    experts: StreamedExperts,
    states: list[mx.array],
    steps: Sequence[Step],
    cache: Cache | None,
    first: int,
) -> None:
    """As ``_one_by_one``; the experts are read once for all chunks.

    The layer runs twice over each chunk: up to the experts, to know which are chosen, and from there on. What attention
    gave the first time is kept for the second; nothing else that costs time is computed twice.
    """
    with experts.shared.lock, _remembering(layer) as kept:
        with experts.collecting() as calls:
            for number in range(first, len(steps)):
                layer(states[number], steps[number], cache)
                mx.eval(_arrays(cache), kept[steps[number]], calls[-1].x, calls[-1].chosen)
        with experts.replaying(experts.run(calls)):
            experts.shared.finish()  # which would hold the results until the next layer's experts run
            for number in range(first, len(steps)):
                states[number] = layer(states[number], steps[number], cache)
                mx.eval(states[number])
                del kept[steps[number]]


def _arrays(cache: Cache | None) -> list[mx.array]:
    return [] if cache is None else cache.arrays()


class _Remembered:
    """Attention that computes once for each step: whoever asks again gets the same."""

    def __init__(self, attention: Any) -> None:
        self._attention, self.kept = attention, dict[Step, mx.array]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)  # another thread may ask for a cache meanwhile

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        if step not in self.kept:
            self.kept[step] = self._attention(x, step, cache)
        return self.kept[step]


@contextmanager
def _remembering(layer: Any) -> Iterator[dict[Step, mx.array]]:
    """Within, the layer's attention is ``_Remembered``; gives what it keeps."""
    attention = layer["self_attn"]
    layer["self_attn"] = remembered = _Remembered(attention)
    try:
        yield remembered.kept
    finally:
        layer["self_attn"] = attention
