"""KL divergence between the next-token distributions of two models, computed from logits.

The distributions of the reference model are large, so only a summary of each is stored. For a
distribution p over V tokens, ``ReferenceDistributions`` keeps the logits of the K most likely
tokens, the probability P of all the others (the tail) and the logits of M tokens sampled from the
tail with probabilities proportional to p. Let q be the distribution of the other model, Q its
probability of the same tail, p' = p / P and q' = q / Q on the tail. The chain rule of the KL
divergence gives

    KL(p || q) = sum over the K tokens of p log(p / q)  +  P log(P / Q)  +  P KL(p' || q')

The first two terms are exact. The third is not negative, so the first two are a lower bound. With r
= q' / p', E[r] = 1 under p', hence KL(p' || q') = E[r - 1 - log r]. These terms are never negative
and shrink with the square of the difference between p' and q', so their mean over few samples is an
unbiased estimate with small variance. ``kl_error_bound`` bounds the error of the mean over all
tokens by four standard errors of that mean plus the amount by which the same samples miss the known
average E[r] - 1 = 0; the latter shows whether q has probability where no sample fell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Array = np.ndarray
BOUND_STANDARD_ERRORS = 4.0  # standard errors of the mean KL within its error bound


@dataclass(frozen=True)
class ReferenceDistributions:
    """Summaries of N next-token distributions p of a reference model.

    Shape:
        top_ids, top_logits: (N, K) the K most likely tokens and their logits.
        tail_ids, tail_logits: (N, M) tokens sampled from all others (the tail); M = 0 where K is
            the whole vocabulary.
        logsumexp: (N,) log of the sum of exp(logits) over all tokens.
        tail_logsumexp: (N,) the same over the tail only; -inf where it is empty.
        nll: (N,) negative log-likelihood -log p of the token that follows in the text.
        top_token: (N,) id of the most likely token.
    """

    top_ids: Array
    top_logits: Array
    tail_ids: Array
    tail_logits: Array
    logsumexp: Array
    tail_logsumexp: Array
    nll: Array
    top_token: Array

    @property
    def complete(self) -> bool:
        """True if the logits of all tokens are kept, so that the KL divergence is exact."""
        return not self.tail_ids.shape[1]

    def rows(self, start: int, stop: int) -> "ReferenceDistributions":
        """The summaries of distributions ``start`` to ``stop``."""
        return ReferenceDistributions(
            *(getattr(self, name)[start:stop] for name in self.__dataclass_fields__)
        )


@dataclass(frozen=True)
class Comparison:
    """A model compared with reference distributions at N tokens. Every array has shape (N,).

    Attributes:
        kl: KL(reference || model) in nats.
        kl_variance: variance of the sampled part of ``kl``; 0 where nothing was sampled.
        ratio_error: P (mean of r over the samples - 1), whose expectation is 0; see the docstring
            of this module.
        nll: negative log-likelihood -log q of the token that follows in the text.
        top_token: id of the model's most likely token.
    """

    kl: Array
    kl_variance: Array
    ratio_error: Array
    nll: Array
    top_token: Array


_Arrays = TypeVar("_Arrays", ReferenceDistributions, Comparison)


def concatenate(parts: Sequence[_Arrays]) -> _Arrays:
    """Join consecutive summaries or comparisons of one kind along their first axis."""
    kind = type(parts[0])
    names = kind.__dataclass_fields__
    return kind(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def summarize_reference(
    logits: Array, targets: Array, kept: int, draws: int, seed: int, first_row: int = 0
) -> ReferenceDistributions:
    """Summarize the next-token distributions of a reference model.

    The samples of the tail are stratified: its probability is cut into ``draws`` equal intervals,
    and one token is drawn from each.

    Args:
        logits: (N, V) float32.
        targets: (N,) ids of the tokens that follow in the text.
        kept: K, the number of most likely tokens to keep; with V or more, all are kept and none is
            sampled.
        draws: M, the number of tokens to sample from the tail.
        seed: random seed of the samples.
        first_row: position of the first of the N rows among all rows; it selects their random
            numbers, so the result does not depend on how the rows are split into calls.
    """
    count, vocabulary = logits.shape
    rows = np.arange(count)
    if kept >= vocabulary:
        top_ids = np.tile(np.arange(vocabulary, dtype=np.int32), (count, 1))
        draws = 0
    else:
        largest = np.argpartition(-logits, kept, axis=-1)[:, :kept]
        top_ids = np.sort(largest, axis=-1).astype(np.int32)
    logsumexp, tail_logsumexp, tail_weights = _log_sums(logits, top_ids)
    tail_ids = np.zeros((count, draws), np.int32)
    for row in rows[: draws and count]:
        uniform = np.random.default_rng((seed, first_row + row)).random(draws)
        quantiles = (np.arange(draws) + uniform) / draws
        cumulative = np.cumsum(tail_weights[row])
        sampled = np.searchsorted(cumulative, quantiles * cumulative[-1], side="right")
        tail_ids[row] = sampled.clip(max=vocabulary - 1)
    return ReferenceDistributions(
        top_ids=top_ids,
        top_logits=np.take_along_axis(logits, top_ids, -1),
        tail_ids=tail_ids,
        tail_logits=np.take_along_axis(logits, tail_ids, -1),
        logsumexp=logsumexp,
        tail_logsumexp=tail_logsumexp,
        nll=logsumexp - logits[rows, targets],
        top_token=logits.argmax(-1),
    )


def compare_with_reference(
    reference: ReferenceDistributions, logits: Array, targets: Array
) -> Comparison:
    """Compute KL(reference || model) and the model's likelihood at N tokens.

    Args:
        reference: summaries of the reference model's N distributions.
        logits: (N, V) float32, of the other model at the same positions.
        targets: (N,) ids of the tokens that follow in the text.
    """
    logsumexp, tail_logsumexp, _ = _log_sums(logits, reference.top_ids)
    log_p = reference.top_logits.astype(np.float64) - reference.logsumexp[:, None]
    top_logits = np.take_along_axis(logits, reference.top_ids, -1)
    log_q = top_logits.astype(np.float64) - logsumexp[:, None]
    kl = _kl_terms(np.exp(log_p), log_p, log_q).sum(-1)
    kl_variance = np.zeros(len(logits))
    ratio_error = np.zeros(len(logits))
    if not reference.complete:
        log_tail_p = reference.tail_logsumexp - reference.logsumexp
        log_tail_q = tail_logsumexp - logsumexp
        tail_p = np.exp(log_tail_p)
        kl += _kl_terms(tail_p, log_tail_p, log_tail_q)
        tail_logits = np.take_along_axis(logits, reference.tail_ids, -1)
        log_p_in_tail = reference.tail_logits.astype(np.float64) - reference.tail_logsumexp[:, None]
        log_q_in_tail = tail_logits.astype(np.float64) - tail_logsumexp[:, None]
        log_r = np.where(tail_p[:, None] > 0, log_q_in_tail - log_p_in_tail, 0.0)
        r_minus_1 = np.expm1(log_r)
        terms = tail_p[:, None] * (r_minus_1 - log_r)
        kl += terms.mean(-1)
        kl_variance = terms.var(-1) / max(terms.shape[1] - 1, 1)
        ratio_error = tail_p * r_minus_1.mean(-1)
    nll = logsumexp - logits[np.arange(len(logits)), targets]
    return Comparison(kl, kl_variance, ratio_error, nll, logits.argmax(-1))


def kl_error_bound(comparison: Comparison) -> float:
    """Bound the error of the mean KL divergence from sampling the vocabulary, in nats.

    Distributions of the reference are stored as their most likely tokens and a sample of the rest.
    The bound is four standard errors of the mean, plus the mean of ``ratio_error``: a quantity
    whose expectation is 0, so that its mean shows the error of the sample. It is 0 if the
    reference distributions are stored completely.
    """
    standard_error = np.sqrt(comparison.kl_variance.sum()) / len(comparison.kl)
    return float(BOUND_STANDARD_ERRORS * standard_error + abs(comparison.ratio_error.mean()))


def _kl_terms(p: Array, log_p: Array, log_q: Array) -> Array:
    """p log(p / q), elementwise; 0 where p = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0.0)


def _log_sums(logits: Array, top_ids: Array) -> tuple[Array, Array, Array]:
    """Log-sum-exp over all tokens (N,) and over the tail (N,), and exp(logits) of the tail (N, V).

    The latter are scaled by an unknown factor per row. The tail is every token that is not in
    ``top_ids`` (N, K). Sums are taken in the same order for both models, so equal logits have equal
    sums, bit for bit.
    """
    largest = logits.max(-1, keepdims=True).astype(np.float64)
    weights = np.exp(logits - largest)
    top_sum = np.take_along_axis(weights, top_ids, -1).sum(-1)
    np.put_along_axis(weights, top_ids, 0.0, -1)
    tail_sum = weights.sum(-1)
    with np.errstate(divide="ignore"):
        logsumexp = np.log(top_sum + tail_sum) + largest[:, 0]
        tail_logsumexp = np.log(tail_sum) + largest[:, 0]
    return logsumexp, tail_logsumexp, weights
