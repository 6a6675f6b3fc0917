"""What the packed model's states are off by, and how much of it the matrices that are still to be packed can take away.

Errors of earlier matrices have come to the states of a layer by the time its own outputs are added to them. Part of
that error e can be told from what these outputs are made of, the inputs x̃ of a matrix in the packed model: with
W + E[e x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ in place of W the matrix takes that part away. So every layer makes up for those before it.
Matching the original's activations with those of the packed model: arXiv:2504.02692, which looks at the product of a
matrix alone; here it is the sum with the states that is matched, into which all errors so far have gone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import Linear
from mlxarch.quantize import host_attention
from mlxarch.quantize.walk import Product, Walk, quiet
from mlxarch.tensors import Tensor
from mlxarch.weights import Resolved

LEAST, SPARSE = 1.0, 4.0  # damping by the mean of the inputs' squares: always, and for each channel over the tokens
SHARES = (1.0, 0.5, 0.25, 0.0)  # of what is owed, that are tried in front of a norm
FAINT = 0.05  # of a norm's median weight, below which nothing is to be won by what it weighs

AsPacked = Callable[[str], Tensor | None]
"""A parameter, by its path, as it is stored; None as long as it is not."""


@dataclass(frozen=True)
class End:
    """A matrix whose products are added to the states of a layer: of its attention or, ``last``, of its feed-forward.

    Attributes:
        norm: path of the norm that they pass before.
    """

    path: str
    norm: str | None = None
    last: bool = False


class Trail:
    """The way that tokens take through a model as far as it is packed, beside that through the original.

    They must not be the tokens that the matrices are packed by: on those its errors are smaller than on any others.

    Args:
        batches: token ids (B, L).
        packed: see AsPacked.

    Attributes:
        count: layers to be passed; 0 if there is nothing that could take errors away.
    """

    def __init__(self, resolved: Resolved, batches: Sequence[mx.array], packed: AsPacked) -> None:
        self._tensors = {path: _Latest(path, tensor, packed) for path, tensor in resolved.parameters.items()}
        self._original, self._packed = _Way(resolved, batches), _Way(resolved, batches, self._tensors)
        layers = self._original.walk.model.layers
        names = {id(module): path for path, module in self._original.walk.model.named_modules()}
        self._ends = [{end.path: end for end in ends(layer, names[id(layer)])} for layer in layers]
        self.count, self._index = len(layers) if any(self._ends) else 0, 0

    def begin(self) -> None:
        """To be called once the tables are packed."""
        if self.count:
            self._original.begin()
            self._packed.begin()

    def owed(self, path: str) -> np.ndarray | None:
        """What is to be added to a matrix of the layer that is under way, before it is packed: (out, in), or None.

        All that stands before it in the layer must be packed.
        """
        end = self._ends[self._index].get(path) if self._index < self.count else None
        if end is None:
            return None
        states, reached = self._exact()
        if end.last:
            behind, own = self._with_original(end)
            error = _rows(states) - _rows(behind)
        else:
            own = self._packed.reach(self._index, path)
            error = _rows(self._original.states) - _rows(self._packed.states)
            error += self._added(end, reached[path]) - self._added(end, own)
        owed = _told(own, *self._in_front_of_norm(end, own, error))
        return owed if owed is None or end.norm is None else self._kept_small(end, own, error, owed)

    def advance(self) -> None:
        """To be called once the layer that is under way is packed."""
        last = next((end for end in self._ends[self._index].values() if end.last), None)
        if last is None:
            states, _ = self._packed.passed(self._index, ())
        else:
            behind, own = self._with_original(last)
            moved = self._added(last, own, packed=True) - self._added(last, own)
            parts = np.split(moved, np.cumsum([state.size // state.shape[-1] for state in behind])[:-1])
            states = [state + mx.array(part).reshape(state.shape) for state, part in zip(behind, parts, strict=True)]
        self._original.advance(self._exact()[0])
        self._packed.advance(states)
        self._index += 1

    def _exact(self) -> tuple[list[mx.array], dict[str, np.ndarray]]:
        """The original's states behind the layer, and the inputs of the matrix of its attention."""
        wanted = [path for path, end in self._ends[self._index].items() if not end.last]
        return self._original.passed(self._index, wanted)

    def _with_original(self, end: End) -> tuple[list[mx.array], np.ndarray]:
        """What is behind the layer as if its last matrix were not packed, and the inputs of that.

        By these the states go on, whether the matrix was packed in this run or before it: so a resume changes nothing.
        """
        self._tensors[end.path].original = True
        states, inputs = self._packed.passed(self._index, (end.path,))
        self._tensors[end.path].original = False
        return states, inputs[end.path]

    def _added(self, end: End, inputs: np.ndarray, packed: bool = False) -> np.ndarray:
        """What a matrix adds to the states for inputs (T, in), but for its bias, which no norm follows: (T, out)."""
        latest = self._tensors[end.path]
        return np.asarray(self._normed(end, Product(latest if packed else latest.stored)(mx.array(inputs))))

    def _normed(self, end: End, x: mx.array) -> mx.array:
        if end.norm is None:
            return x
        walk = self._original.walk
        with walk.weights(self._index):
            made = dict(walk.model.named_modules())[end.norm](x)
            mx.eval(made)
        return made

    def _kept_small(self, end: End, inputs: np.ndarray, error: np.ndarray, owed: np.ndarray) -> np.ndarray | None:
        """So much of what is owed as serves best: where a norm follows, a slope does not tell of large steps."""
        made = np.asarray(Product(self._tensors[end.path].stored)(mx.array(inputs)))
        step = inputs @ owed.T
        before = np.asarray(self._normed(end, mx.array(made)))

        def left(share: float) -> float:
            added = np.asarray(self._normed(end, mx.array(made + np.float32(share) * step)))
            return float(np.square(error + before - added).sum())

        best = min(SHARES, key=left)
        return np.float32(best) * owed if best else None

    def _in_front_of_norm(
        self, end: End, inputs: np.ndarray, error: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """An error (T, out) as it would be in front of a norm, and the weight (T,) of each token's, if they differ.

        A norm divides by the root of the mean square of x and multiplies by its weights: the slope that counts here.
        """
        if end.norm is None:
            return error, None
        slopes = np.asarray(self._normed(end, mx.ones((1, error.shape[1]))))
        made = np.asarray(Product(self._tensors[end.path].stored)(mx.array(inputs)))
        root = np.sqrt(np.square(made).mean(1)) + np.finfo(np.float32).tiny
        heard = np.abs(slopes) > FAINT * np.median(np.abs(slopes))
        return np.where(heard, error / np.where(heard, slopes, 1), 0) * root[:, None], 1 / root


class _Way:
    """Tokens on their way through a model, of which some matrices are listened to.

    Attributes:
        states: in front of the layer that is under way.
    """

    def __init__(
        self, resolved: Resolved, batches: Sequence[mx.array], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.walk = Walk(resolved, batches, self._observe, tensors)
        host_attention.install(self.walk.model)
        self.states: list[mx.array] = []
        self._wanted: Collection[str] = ()
        self._stop = False
        self._inputs = dict[str, list[np.ndarray]]()
        self._passed: tuple[list[mx.array], dict[str, np.ndarray]] | None = None

    def begin(self) -> None:
        """Stand in front of the first layer."""
        with quiet():
            self.states = self.walk.embed()

    def advance(self, states: list[mx.array]) -> None:
        """Stand in front of the next layer."""
        self.states, self._passed = states, None

    def passed(self, index: int, wanted: Collection[str]) -> tuple[list[mx.array], dict[str, np.ndarray]]:
        """The states behind the layer, which is passed once, and the inputs (T, in) of some of its matrices."""
        if self._passed is None:
            self._wanted, self._inputs = wanted, {}
            with quiet():
                states = self.walk.layer(index, self.states)
            self._passed = states, {path: np.concatenate(parts) for path, parts in self._inputs.items()}
            self._wanted, self._inputs = (), {}
        return self._passed

    def reach(self, index: int, path: str) -> np.ndarray:
        """The inputs (T, in) of a matrix; the layer is passed no further."""
        self._wanted, self._inputs, self._stop = (path,), {}, True
        with quiet(), self.walk.weights(index):
            for state, step in zip(self.states, self.walk.steps, strict=True):
                with suppress(_Enough):
                    self.walk.model.layers[index](state, step, None)
        self._wanted, self._stop = (), False
        return np.concatenate(self._inputs.pop(path))

    def _observe(self, path: str, x: mx.array, chosen: mx.array | None) -> None:
        if path in self._wanted:
            self._inputs.setdefault(path, []).append(_rows([x]))
            if self._stop:
                raise _Enough


class _Enough(Exception):
    """The inputs that were asked for are there."""


class _Latest(Tensor):
    """A parameter as it is packed, or before that, and while ``original`` is set, as it was."""

    def __init__(self, path: str, stored: Tensor, packed: AsPacked) -> None:
        self.path, self.stored, self._packed = path, stored, packed
        self.shape, self.dtype, self.original = stored.shape, stored.dtype, False
        self._found: Tensor | None = None

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor."""
        if self.original:
            return self.stored.rows(start, stop)
        self._found = self._found or self._packed(self.path)
        return (self._found or self.stored).rows(start, stop)


def ends(layer: Any, name: str) -> list[End]:
    """The matrices of a layer whose products are added to its states, one of the attention and one of the feed-forward.

    Routed experts are left out, for what a token gets of them is weighed; so is what is added in other ways.
    """
    if "altup" in layer:  # several streams of states
        return []
    attention = layer.self_attn
    own = next(path for path, module in layer.named_modules() if module is attention)
    sandwich, grok = "post_feedforward_layernorm" in layer, "post_attn_norm" in layer
    norms = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwich else (None, None)
    norms = ("post_attn_norm", None) if grok else norms  # two branches share the norm behind its feed-forward
    found = [(_linear(attention, own), norms[0], False)]
    for path in () if grok else ("mlp", "feed_forward"):
        if path in layer:
            found.append((_of_feed_forward(layer[path], path), norms[1], True))
    return [
        End(f"{name}.{path}.weight", f"{name}.{norm}" if norm else None, last) for path, norm, last in found if path
    ]


def _of_feed_forward(module: Any, path: str) -> str | None:
    for shared in ("shared_experts", "shared_expert"):
        if shared in module:
            return None if "shared_expert_gate" in module else _linear(module[shared], f"{path}.{shared}")
    return _linear(module, path)


def _linear(module: nn.Module, path: str) -> str | None:
    names = (name for name in ("o_proj", "down_proj", "c_proj") if name in module and isinstance(module[name], Linear))
    return next((f"{path}.{name}" for name in names), None)


def _rows(states: Sequence[mx.array]) -> np.ndarray:
    """(T, hidden_size) of the batches together."""
    return np.concatenate([np.asarray(state.astype(mx.float32)).reshape(-1, state.shape[-1]) for state in states])


def _told(inputs: np.ndarray, error: np.ndarray, weight: np.ndarray | None) -> np.ndarray | None:
    """The matrix (out, in) that tells an error (T, out) by inputs (T, in), damped; None if there is none."""
    tokens, channels = inputs.shape
    if weight is not None:
        inputs, error = inputs * weight[:, None], error * weight[:, None]
    damping = float(np.vdot(inputs, inputs)) / channels * (LEAST + SPARSE * channels / max(tokens, 1))
    if not 0 < damping < np.inf or not np.isfinite(error).all():
        return None
    if tokens < channels:  # the same by way of the smaller matrix
        pairs = inputs @ inputs.T
        np.fill_diagonal(pairs, pairs.diagonal() + np.float32(damping))
        return np.linalg.solve(pairs, error).T @ inputs
    moments = inputs.T @ inputs
    np.fill_diagonal(moments, moments.diagonal() + np.float32(damping))
    return np.ascontiguousarray(np.linalg.solve(moments, inputs.T @ error).T)
