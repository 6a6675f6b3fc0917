"""Pace of evaluation: forward passes in parts of a fraction of a second, so that interrupts take effect.

Python handles a signal only between two evaluations of MLX. A pass is therefore evaluated a few
layers at a time. How many is measured: on a fast machine a whole pass is one evaluation, on a slow
one each layer is.
"""

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_reduce

from mlxarch.blocks import Cache, CausalLM
from mlxarch.blocks.layer import Layer
from mlxarch.cpu_kernels import native
from mlxarch.kv_cache import last_cached_layer, update_cache_only
from mlxarch.kv_cache.base import evaluate_caches

EVALUATION_SECONDS = 0.1  # aim of an evaluation
FIRST_BYTES = 50e6  # weights times tokens of the first evaluation, 0.1 s on one slow CPU core
KERNEL_SPEEDUP = 10  # at least, with the CPU kernels
KERNEL_TOKENS = 64  # with the CPU kernels at least: fewer would unpack the weights too often

OnPart = Callable[[float], None]
"""Callback after each evaluation of a pass, with the part of the layers that is done, 0 to 1. An
exception that it raises ends the pass."""


class Pace:
    """Measured speed of a network: tokens times layers per second.

    On a CPU the time of a layer is proportional to its tokens, and a row's result does not depend
    on the other rows, so the tokens of a pass follow the speed as well. With the CPU kernels, passes
    of up to 16 rows round otherwise than longer ones; there the tokens follow the size of a layer
    alone, so that results do not depend on the speed. Elsewhere only the layers
    of an evaluation do, and the speed is kept for each power of two of the number of tokens.

    Args:
        layers: layers of the network.
        layer_bytes: bytes of the weights of a layer.
    """

    def __init__(self, layers: int, layer_bytes: int) -> None:
        self._layers = layers
        first_bytes = FIRST_BYTES * (KERNEL_SPEEDUP if native.is_used() else 1)
        self._first_tokens = max(1, int(first_bytes / max(layer_bytes, 1)))
        if native.is_used():
            self._first_tokens = max(self._first_tokens, KERNEL_TOKENS)
        self._rates: dict[int, float] = {}

    def tokens(self, most: int, batch: int = 1) -> int:
        """Number of tokens of each prompt of a batch for the next pass, at most ``most``."""
        if not _is_cpu():
            return most
        rate = None if native.is_used() else self._rates.get(0)
        count = self._first_tokens if rate is None else int(rate * EVALUATION_SECONDS)
        return max(1, min(count // batch, most))

    def layers(self, tokens: int) -> int:
        """Number of layers to evaluate at once in a pass over ``tokens`` tokens."""
        rate = self._rates.get(_size_class(tokens))
        if rate is None:
            return 1
        return max(1, min(int(rate * EVALUATION_SECONDS / tokens), self._layers))

    def is_one_evaluation(self, tokens: int) -> bool:
        """Whether a pass over ``tokens`` tokens is fast enough to be evaluated at once."""
        return self.layers(tokens) == self._layers

    def record_pass(self, tokens: int, seconds: float) -> None:
        """Note a pass that was evaluated at once and took longer than an evaluation should.

        How long a quick one took is not known exactly: it may have been finished before.
        """
        if seconds > EVALUATION_SECONDS:
            self.record(tokens, self._layers, seconds)

    def record(self, tokens: int, layers: int, seconds: float) -> None:
        """Note how long an evaluation took."""
        self._rates[_size_class(tokens)] = tokens * layers / max(seconds, 1e-6)


def pace_of(model: CausalLM) -> Pace:
    """Pace of a network; every session of the network shares it."""
    attributes = model.__dict__
    if "_pace" not in attributes:
        first = model.layers[0].parameters()
        size: int = tree_reduce(lambda total, array: total + array.nbytes, first, 0) or 0
        attributes["_pace"] = Pace(len(model.layers), size)
    return attributes["_pace"]


def compute_state(
    model: CausalLM,
    tokens: mx.array,
    caches: Sequence[Cache | None],
    on_part: OnPart = lambda done: None,
) -> mx.array:
    """Compute what ``CausalLM.hidden_state`` does, evaluated in parts where that takes long.

    A pass that is fast enough is returned unevaluated, so that more can be queued behind it.
    """
    if pace_of(model).is_one_evaluation(tokens.size):
        return model.hidden_state(tokens, caches)
    parts = _Parts(model, tokens, caches, on_part)
    for layer, cache in zip(model.layers, caches, strict=True):
        parts.run(layer, cache)
    parts.evaluate(parts.state)
    return parts.state


def compute_caches(
    model: CausalLM,
    tokens: mx.array,
    caches: Sequence[Cache | None],
    on_part: OnPart = lambda done: None,
) -> None:
    """Append tokens (B, L) to the caches in parts, and compute nothing after the last cache."""
    last = last_cached_layer(caches)
    parts = _Parts(model, tokens, caches, on_part)
    for layer, cache in zip(model.layers[:last], caches, strict=False):
        parts.run(layer, cache)
    update_cache_only(model.layers[last], parts.state, parts.context, caches[last])
    parts.evaluate()


class _Parts:
    """A forward pass over tokens (B, L), evaluated a few layers at a time.

    Attributes:
        context: context of the pass.
        state: hidden state after the layers run so far, (B, L, hidden_size).
    """

    def __init__(
        self,
        model: CausalLM,
        tokens: mx.array,
        caches: Sequence[Cache | None],
        on_part: OnPart,
    ) -> None:
        self.context = model.begin_pass(tokens, caches)
        self.state = model.embed(tokens, self.context)
        self._caches = caches
        self._pace = pace_of(model)
        self._tokens = tokens.size
        self._total = len(model.layers)
        self._on_part = on_part
        self._done = 0
        self._waiting = 0  # layers that are not evaluated yet
        self._start = time.perf_counter()

    def run(self, layer: Layer, cache: Cache | None) -> None:
        """Run the next layer; evaluate first what waits, if that is enough for one evaluation."""
        if self._waiting >= self._pace.layers(self._tokens):
            self.evaluate(self.state)
        self.state = layer(self.state, self.context, cache)
        self._waiting += 1

    def evaluate(self, *state: mx.array) -> None:
        """Evaluate the caches, and ``state`` if given."""
        evaluate_caches(self._caches, *state)
        now = time.perf_counter()
        self._pace.record(self._tokens, max(self._waiting, 1), now - self._start)
        self._start = now
        self._done += self._waiting
        self._waiting = 0
        self._on_part(self._done / self._total)


def _size_class(tokens: int) -> int:
    return 0 if _is_cpu() else tokens.bit_length()


def _is_cpu() -> bool:
    return mx.default_device() == mx.cpu
