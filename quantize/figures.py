"""Figures over many tokens, each with its standard error; NumPy."""

from dataclasses import dataclass

import numpy as np

from mlxarch.quantize.distributions import Array, Comparison, bound


@dataclass(frozen=True)
class Figure:
    """A value and its standard error; None where there is none, as of a largest value."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Table:
    """What is said of some tokens. All but the first two need an original.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the mean of -log q.
        original_perplexity: the same of the original; ``perplexity_ratio`` is the quotient, from paired differences.
        kl_mean, kl_median, kl_p99, kl_max: of KL(original || model), nats per token.
        kl_bound: how far ``kl_mean`` may be off because the original was not kept whole.
        top1_agreement: share of tokens at which both find the same token the likeliest.
    """

    tokens: int
    perplexity: Figure
    original_perplexity: Figure | None = None
    perplexity_ratio: Figure | None = None
    kl_mean: Figure | None = None
    kl_median: Figure | None = None
    kl_p99: Figure | None = None
    kl_max: Figure | None = None
    kl_bound: float | None = None
    top1_agreement: Figure | None = None


def by_itself(surprise: Array) -> Table:
    """Of a model without an original: ``surprise`` is -log q of each token."""
    return Table(len(surprise), _exponential(surprise))


def beside(comparison: Comparison, surprise: Array, top: Array) -> Table:
    """Of a model and its original, whose -log p and likeliest tokens are given."""
    kl = comparison.divergence
    return Table(
        len(kl),
        _exponential(comparison.surprise),
        _exponential(surprise),
        _exponential(comparison.surprise - surprise),
        mean(kl),
        quantile(kl, 0.5),
        quantile(kl, 0.99),
        Figure(float(kl.max())),
        bound(comparison),
        mean(comparison.top == top),
    )


def mean(values: Array) -> Figure:
    """With the standard deviation over the square root of their number."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return Figure(float(values.mean()), None if error is None else float(error))


def quantile(values: Array, share: float) -> Figure:
    """With half the distance of the order statistics one standard error of the rank above and below."""
    ordered, middle = np.sort(values), share * (len(values) - 1)
    spread = np.sqrt(len(values) * share * (1 - share))
    low, high = np.interp((middle - spread, middle + spread), np.arange(len(values)), ordered)
    return Figure(float(np.interp(middle, np.arange(len(values)), ordered)), float(high - low) / 2)


def _exponential(logarithms: Array) -> Figure:
    figure = mean(logarithms)
    value = float(np.exp(figure.value))
    return Figure(value, None if figure.error is None else value * figure.error)
