"""Divergences of distributions: by hand, against all tokens, from what is kept, and how far that is off."""

import math

import numpy as np
import pytest

from mlxarch.quantize.evaluation.kl_divergence import (
    Comparison,
    compare_with_reference,
    concatenate,
    kl_error_bound,
    summarize_reference,
)
from mlxarch.quantize.evaluation.statistics import (
    comparison_metrics,
    mean_estimate,
    quantile_estimate,
)


def logits(
    rows: int = 64, vocabulary: int = 3000, seed: int = 0, spread: float = 3.0
) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * spread).astype(np.float32)


def near(p: np.ndarray, distance: float, seed: int = 1) -> np.ndarray:
    return p + np.float32(distance) * logits(*p.shape, seed=seed, spread=1.0)


def exact(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, written down as the definition has it."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    log_p = (
        p
        - np.log(np.exp(p - p.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - p.max(-1, keepdims=True)
    )
    log_q = (
        q
        - np.log(np.exp(q - q.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - q.max(-1, keepdims=True)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def compared(p: np.ndarray, q: np.ndarray, kept: int, draws: int = 64, seed: int = 0) -> Comparison:
    targets = np.zeros(len(p), int)
    return compare_with_reference(summarize_reference(p, targets, kept, draws, seed), q, targets)


def test_three_tokens_by_hand():
    p, q = (
        np.log(np.array([row], np.float64)).astype(np.float32)
        for row in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    )
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    found = compare_with_reference(summarize_reference(p, np.array([1]), 3, 0, 0), q, np.array([1]))
    # float32 rounds log(1/4); the distributions that are compared are those of the rounded logits
    rounded = [
        np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
        for row in (p[0], q[0])
    ]
    expected = sum(a * math.log(a / b) for a, b in zip(*rounded, strict=True))
    assert abs(found.kl[0] - expected) < 1e-12
    assert abs(found.kl[0] - by_hand) < 1e-7
    assert abs(found.nll[0] - math.log(4)) < 1e-7
    assert (
        abs(
            compare_with_reference(
                summarize_reference(q, np.array([1]), 3, 0, 0), p, np.array([1])
            ).kl[0]
            - by_hand
        )
        < 1e-7
    )  # symmetric here
    assert (
        found.top_token[0] == 2 and summarize_reference(p, np.array([1]), 3, 0, 0).top_token[0] == 0
    )


def test_logits_that_float32_holds_give_the_divergence_to_1e_9():
    p, q = np.array([[1.0, 0.0, -1.0]], np.float32), np.array([[0.0, 0.5, 0.25]], np.float32)
    total_p, total_q = (sum(math.exp(z) for z in row[0].tolist()) for row in (p, q))
    pairs = zip(p[0].tolist(), q[0].tolist(), strict=True)
    by_hand = sum(
        math.exp(a) / total_p * (a - math.log(total_p) - b + math.log(total_q)) for a, b in pairs
    )
    assert abs(compared(p, q, 3).kl[0] - by_hand) < 1e-9
    assert abs(compared(q, p, 3).kl[0] - by_hand) > 1e-3, "the direction matters"


def test_all_tokens_kept_is_the_definition():
    p = logits()
    q = near(p, 0.3)
    found = compared(p, q, p.shape[1])
    assert np.allclose(found.kl, exact(p, q), rtol=1e-9, atol=1e-12)
    assert kl_error_bound(found) == 0.0
    shifted = compared(p, q + np.float32(8), p.shape[1])
    assert np.allclose(shifted.kl, found.kl, atol=1e-5), "a constant on all logits changes nothing"


@pytest.mark.parametrize("kept", [1, 100, 3000])
def test_a_distribution_against_itself_is_exactly_0(kept):
    p = logits()
    found = compared(p, p.copy(), kept)
    assert (found.kl == 0).all() and kl_error_bound(found) == 0
    assert compared(p, near(p, 1e-3), kept).kl.mean() > 0


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kept", [16, 256])
def test_the_bound_holds_and_the_mean_has_no_bias(kept, distance):
    p = logits(rows=128)
    q = near(p, distance)
    true, means = exact(p, q).mean(), []
    for seed in range(12):
        found = compared(p, q, kept, seed=seed)
        assert abs(found.kl.mean() - true) <= kl_error_bound(found)
        means.append(found.kl.mean())
    spread = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means) - true) < 5 * spread


def test_more_kept_tokens_and_more_draws_narrow_the_bound():
    p = logits(rows=128)
    q = near(p, 0.1)
    few, many, drawn = (
        kl_error_bound(compared(p, q, *how)) for how in ((64, 64), (1024, 64), (64, 1024))
    )
    assert many < few / 3 and drawn < few


def test_mass_where_the_original_had_none_widens_the_bound():
    p = logits(rows=32, spread=1.0)
    p[:, :100] += 8
    p[:, 2999] = -30  # never drawn
    q = p.copy()
    q[:, 2999] = p[:, 100:].max(-1)
    tail = np.exp(q[:, 2999]) / np.exp(q[:, 100:]).sum(-1)
    found = compared(p, q, 100)
    assert kl_error_bound(found) >= abs(found.kl.mean() - exact(p, q).mean())
    assert (
        abs(found.ratio_error.mean())
        > 0.5 * (tail * np.exp(p[:, 100:]).sum(-1) / np.exp(p).sum(-1)).mean()
    )


def test_rows_may_come_in_any_portions():
    p, targets = logits(rows=10), np.arange(10)
    q = near(p, 0.2)
    whole = compare_with_reference(summarize_reference(p, targets, 32, 16, 7), q, targets)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        kept = summarize_reference(p[rows], targets[rows], 32, 16, 7, first_row=rows.start)
        parts.append(compare_with_reference(kept, q[rows], targets[rows]))
    apart = concatenate(parts)
    assert isinstance(apart, Comparison)
    assert np.array_equal(whole.kl, apart.kl) and np.array_equal(whole.nll, apart.nll)
    other = compare_with_reference(summarize_reference(p, targets, 32, 16, 8), q, targets)
    assert not np.array_equal(whole.kl, other.kl), "another seed draws other tokens"


def test_tokens_that_cannot_come_count_nothing():
    p = logits(rows=4, vocabulary=50)
    p[:, 7] = -np.inf
    q = near(p, 0.1)
    for kept in (10, 50):
        assert np.isfinite(compared(p, q, kept).kl).all()


def test_standard_errors_shrink_with_the_number_of_tokens():
    draw = np.random.default_rng(0).exponential(size=40_000)
    assert abs(mean_estimate(draw).value - 1) < 4 * (mean_estimate(draw).error or 0)
    assert mean_estimate(draw[:10_000]).error == pytest.approx(
        2 * (mean_estimate(draw).error or 0), rel=0.1
    )
    median = quantile_estimate(draw, 0.5)
    # the standard error of an exponential's median is 1 / sqrt(n)
    assert (
        median.error == pytest.approx(1 / 200, rel=0.3)
        and abs(median.value - math.log(2)) < 5 / 200
    )


def test_a_ratio_of_perplexities_comes_from_paired_differences():
    p = logits(rows=500, vocabulary=40)
    q, targets = near(p, 0.05), np.zeros(500, int)
    kept = summarize_reference(p, targets, 40, 0, 0)
    table = comparison_metrics(compare_with_reference(kept, q, targets), kept.nll, kept.top_token)
    assert table.perplexity_ratio and table.original_perplexity and table.perplexity.error
    assert table.perplexity_ratio.value == pytest.approx(
        table.perplexity.value / table.original_perplexity.value
    )
    assert (
        table.perplexity_ratio.error or 1
    ) < 0.1 * table.perplexity.error / table.perplexity.value
