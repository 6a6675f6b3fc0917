"""Two models' next-token distributions against each other, from their logits alone. NumPy, in float64.

The reference is not kept whole. Of each distribution p over V tokens, ``Kept`` holds the logits of the K likeliest
tokens, the mass of the rest (the tail, P), and the logits of M tokens drawn from the tail by p. With q the other
distribution, Q its mass on the same tail, p' = p / P and q' = q / Q, the chain rule of the divergence says

    KL(p || q) = sum over the K of p log(p / q)  +  P log(P / Q)  +  P KL(p' || q')

All but the last term is computed exactly, and the last is never negative: what is known is a lower bound. As
E[r] = 1 for r = q' / p' under p', KL(p' || q') = E[r - 1 - log r], whose terms are never negative and shrink with the
square of the difference of the two, so that a few draws do: their mean is an estimate without bias. ``error`` of a
``Comparison`` bounds how far the mean over all tokens is off: four standard errors of that mean, plus the amount by
which the same draws miss the one average that is known, E[r] - 1 = 0; that shows if q has mass where no draw fell.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
CONFIDENCE = 4.0  # standard errors


@dataclass(frozen=True)
class Kept:
    """What is held of N reference distributions.

    Shape:
        ids, logits: (N, K) of the likeliest tokens; drawn, drawn_logits: (N, M) of the tail, M = 0 where there is none
        total, tail: (N,) log of the sum of exp(logits), over all tokens and over the tail (-inf if it is empty)
        surprise: (N,) -log p of the token that follows; top: (N,) the likeliest token
    """

    ids: Array
    logits: Array
    drawn: Array
    drawn_logits: Array
    total: Array
    tail: Array
    surprise: Array
    top: Array

    @property
    def whole(self) -> bool:
        """Whether all tokens were kept, so that nothing is estimated."""
        return not self.drawn.shape[1]

    def rows(self, start: int, stop: int) -> "Kept":
        """Some of the N."""
        return Kept(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Comparison:
    """Of N tokens, (N,) each: the divergence in nats, the variance of its estimated part, how far the draws miss their
    known average, -log q of the token that follows, and q's likeliest token.
    """

    divergence: Array
    spread: Array
    miss: Array
    surprise: Array
    top: Array


def joined(parts: list) -> "Kept | Comparison":
    """Several of one kind, one behind the other."""
    kind = type(parts[0])
    return kind(*(np.concatenate([getattr(part, name) for part in parts]) for name in kind.__dataclass_fields__))


def keep(logits: Array, targets: Array, kept: int, draws: int, seed: int, first: int = 0) -> Kept:
    """Reduce the distributions of a reference.

    Args:
        logits: (N, V) float32.
        targets: (N,) the tokens that follow.
        kept: K; V or more keeps all.
        draws: M, from the tail; the ``u``-th of them falls into its own M-th of the tail's mass.
        seed, first: of the random numbers; ``first`` is the position of the first row, so that rows can come in
            any portions.
    """
    count, vocabulary = logits.shape
    rows = np.arange(count)
    if kept >= vocabulary:
        ids = np.tile(np.arange(vocabulary, dtype=np.int32), (count, 1))
        draws = 0
    else:
        ids = np.sort(np.argpartition(-logits, kept, axis=-1)[:, :kept], axis=-1).astype(np.int32)
    total, tail, weights = _sums(logits, ids)
    drawn = np.zeros((count, draws), np.int32)
    for row in rows[: draws and count]:
        even = (np.arange(draws) + np.random.default_rng((seed, first + row)).random(draws)) / draws
        reached = np.cumsum(weights[row])
        drawn[row] = np.searchsorted(reached, even * reached[-1], side="right").clip(max=vocabulary - 1)
    return Kept(
        ids,
        np.take_along_axis(logits, ids, -1),
        drawn,
        np.take_along_axis(logits, drawn, -1),
        total,
        tail,
        total - logits[rows, targets],
        logits.argmax(-1),
    )


def compare(reference: Kept, logits: Array, targets: Array) -> Comparison:
    """The other model's logits (N, V) for the same rows, against what was kept."""
    total, tail, _ = _sums(logits, reference.ids)
    log_p = reference.logits.astype(np.float64) - reference.total[:, None]
    log_q = np.take_along_axis(logits, reference.ids, -1).astype(np.float64) - total[:, None]
    divergence = _weighted(np.exp(log_p), log_p, log_q).sum(-1)
    spread, miss = np.zeros(len(logits)), np.zeros(len(logits))
    if not reference.whole:
        log_mass, log_mass_q = reference.tail - reference.total, tail - total
        mass = np.exp(log_mass)
        divergence += _weighted(mass, log_mass, log_mass_q)
        inside_p = reference.drawn_logits.astype(np.float64) - reference.tail[:, None]
        inside_q = np.take_along_axis(logits, reference.drawn, -1).astype(np.float64) - tail[:, None]
        log_r = np.where(mass[:, None] > 0, inside_q - inside_p, 0.0)
        excess = np.expm1(log_r)  # r - 1
        terms = mass[:, None] * (excess - log_r)
        divergence += terms.mean(-1)
        spread, miss = terms.var(-1) / max(terms.shape[1] - 1, 1), mass * excess.mean(-1)
    surprise = total - logits[np.arange(len(logits)), targets]
    return Comparison(divergence, spread, miss, surprise, logits.argmax(-1))


def _weighted(p: Array, log_p: Array, log_q: Array) -> Array:
    """p log(p / q), which is 0 where p is."""
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0.0)


def bound(comparison: Comparison) -> float:
    """How far the mean divergence may be off, in nats; 0 where everything was kept. See the head of this file."""
    count = len(comparison.divergence)
    return float(CONFIDENCE * np.sqrt(comparison.spread.sum()) / count + abs(comparison.miss.mean()))


def _sums(logits: Array, ids: Array) -> tuple[Array, Array, Array]:
    """log of the sum of exp over all tokens and over those outside of ``ids``; and exp of the latter, up to a factor.

    Both models' sums are taken in one order, so that equal logits have equal sums, bit for bit.
    """
    highest = logits.max(-1, keepdims=True).astype(np.float64)
    weights = np.exp(logits - highest)
    inside = np.take_along_axis(weights, ids, -1).sum(-1)
    np.put_along_axis(weights, ids, 0.0, -1)
    outside = weights.sum(-1)
    with np.errstate(divide="ignore"):
        return np.log(inside + outside) + highest[:, 0], np.log(outside) + highest[:, 0], weights
