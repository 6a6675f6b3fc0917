"""Evaluation metrics and their standard errors: perplexity, KL divergence and top-1 agreement.

Each metric is a statistic (a mean, a quantile, a maximum) of one value per predicted token,
computed with NumPy in float64. Standard errors treat the N tokens as independent samples. Tokens of
one text are not quite independent, so the true uncertainty about other texts is larger.
"""

from dataclasses import dataclass

import numpy as np

from mlxarch.quantize.evaluation.kl_divergence import Array, Comparison, kl_error_bound


@dataclass(frozen=True)
class Estimate:
    """A statistic of per-token values with its standard error.

    Attributes:
        value: the statistic.
        error: its standard error in the unit of ``value``; None where there is none: for a maximum,
            or for the mean of a single token.
    """

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Metrics:
    """Quality of a model over a set of predicted tokens, alone or compared with its original.

    Below, q is the probability that the model gives to the token that follows in the text, and p
    the probability that the original gives to it. All metrics but ``tokens`` and ``perplexity``
    need an original and are None without one.

    Attributes:
        tokens: number of predicted tokens.
        perplexity: exp of the mean of -log q over the tokens.
        original_perplexity: exp of the mean of -log p over the tokens.
        perplexity_ratio: perplexity / original_perplexity. Its standard error comes from the
            differences log p - log q of each token, in which what both models find hard cancels.
        kl_mean, kl_median, kl_p99, kl_max: mean, median, 99th percentile and maximum over the
            tokens of KL(original || model) between the next-token distributions, in nats per token.
        kl_bound: estimated bound, in nats, on the error of ``kl_mean`` that comes from sampling the
            less likely tokens of the original's distributions; 0 where all tokens were kept. See
            ``kl_error_bound``.
        top1_agreement: fraction of the tokens for which both models rank the same token first, from
            0 to 1.
    """

    tokens: int
    perplexity: Estimate
    original_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    kl_max: Estimate | None = None
    kl_bound: float | None = None
    top1_agreement: Estimate | None = None


def perplexity_metrics(nll: Array) -> Metrics:
    """Compute the metrics of a model evaluated without an original: tokens and perplexity.

    Args:
        nll: negative log-likelihood -log q of each token, (N,), in nats.
    """
    return Metrics(len(nll), _exp_of_mean(nll))


def comparison_metrics(
    comparison: Comparison, original_nll: Array, original_top_token: Array
) -> Metrics:
    """Compute all metrics of a model evaluated against its original.

    Args:
        comparison: KL divergence, negative log-likelihood and most likely token of the model at N
            tokens.
        original_nll: negative log-likelihood -log p of these tokens under the original, (N,), in
            nats.
        original_top_token: id of the original's most likely token at each of them, (N,).
    """
    kl = comparison.kl
    return Metrics(
        tokens=len(kl),
        perplexity=_exp_of_mean(comparison.nll),
        original_perplexity=_exp_of_mean(original_nll),
        perplexity_ratio=_exp_of_mean(comparison.nll - original_nll),
        kl_mean=mean_estimate(kl),
        kl_median=quantile_estimate(kl, 0.5),
        kl_p99=quantile_estimate(kl, 0.99),
        kl_max=Estimate(float(kl.max())),
        kl_bound=kl_error_bound(comparison),
        top1_agreement=mean_estimate(comparison.top_token == original_top_token),
    )


def mean_estimate(values: Array) -> Estimate:
    """Compute the mean of values (N,) and its standard error: their deviation over sqrt(N)."""
    error = None
    if len(values) > 1:
        error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(float(values.mean()), error)


def quantile_estimate(values: Array, fraction: float) -> Estimate:
    """Compute a quantile of values (N,) and its standard error.

    The number of values below the quantile is binomial, with standard deviation sqrt(N fraction (1
    - fraction)). The standard error of the quantile is half the distance between the order
    statistics that lie so many ranks below and above it.

    Args:
        fraction: rank of the quantile, from 0 to 1; 0.5 is the median.
    """
    ordered = np.sort(values)
    ranks = np.arange(len(values))
    rank = fraction * (len(values) - 1)
    rank_error = np.sqrt(len(values) * fraction * (1 - fraction))
    low, high = np.interp((rank - rank_error, rank + rank_error), ranks, ordered)
    return Estimate(float(np.interp(rank, ranks, ordered)), float(high - low) / 2)


def _exp_of_mean(log_values: Array) -> Estimate:
    """exp of the mean of (N,) values; its standard error is exp(mean) times that of the mean."""
    mean = mean_estimate(log_values)
    value = float(np.exp(mean.value))
    return Estimate(value, None if mean.error is None else value * mean.error)
