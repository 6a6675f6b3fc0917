"""Routers against the same choice written with loops."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks.moe.routers import GroupLimitedSigmoid, GroupLimitedSoftmax

DIM, EXPERTS, TOKENS = 12, 16, 40
CASES = [(1, 1, 4), (4, 2, 4), (4, 1, 3), (4, 4, 5), (8, 3, 6)]  # groups, open ones, experts chosen


def chosen_by_loops(scores: np.ndarray, groups: int, kept: int, k: int, best: int) -> set[int]:
    members = np.arange(EXPERTS).reshape(groups, -1)
    ratings = [sum(sorted(scores[group], reverse=True)[:best]) for group in members]
    open_ones = sorted(range(groups), key=lambda group: -ratings[group])[:kept]
    allowed = [expert for group in open_ones for expert in members[group]]
    return set(sorted(allowed, key=lambda expert: -scores[expert])[:k])


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight of the router, its bias, and tokens."""
    source = np.random.default_rng(seed)
    weight = source.normal(size=(EXPERTS, DIM)).astype(np.float32)
    bias = (source.normal(size=EXPERTS) * 0.3 - 0.6).astype(np.float32)
    return weight, bias, source.normal(size=(TOKENS, DIM)).astype(np.float32)


def as_rows(chosen: mx.array, weights: mx.array) -> list[dict[int, float]]:
    found = zip(np.array(chosen)[0].tolist(), np.array(weights)[0].tolist(), strict=True)
    return [dict(zip(experts, shares, strict=True)) for experts, shares in found]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sigmoid_scores_choose_with_the_bias_and_weigh_without(
    renormalise: bool, case: tuple[int, int, int]
) -> None:
    groups, kept, k = case
    router = GroupLimitedSigmoid(
        DIM, EXPERTS, k, groups=groups, kept=kept, renormalise=renormalise, scale=2.5
    )
    weight, bias, tokens = draw(groups)
    router.weight, router.e_score_correction_bias = mx.array(weight), mx.array(bias)
    without_bias = 0
    for token, found in zip(tokens, as_rows(*router(mx.array(tokens[None]))), strict=True):
        scores = 1 / (1 + np.exp(-(weight.astype(np.float64) @ token)))
        wanted = chosen_by_loops(scores + bias, groups, kept, k, best=2)
        assert found.keys() == wanted
        total = sum(scores[expert] for expert in wanted) if renormalise else 1.0
        assert all(abs(found[expert] - 2.5 * scores[expert] / total) < 1e-5 for expert in wanted)
        without_bias += chosen_by_loops(scores, groups, kept, k, best=2) != wanted
    assert without_bias > 3  # negative control


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_softmax_over_all_experts_chooses_within_the_best_groups(
    renormalise: bool, case: tuple[int, int, int]
) -> None:
    groups, kept, k = case
    router = GroupLimitedSoftmax(
        DIM, EXPERTS, k, groups=groups, kept=kept, renormalise=renormalise, scale=16.0
    )
    weight, _, tokens = draw(groups)
    router.weight = mx.array(weight)
    ungrouped = 0
    for token, found in zip(tokens, as_rows(*router(mx.array(tokens[None]))), strict=True):
        scores = np.exp(weight.astype(np.float64) @ token)
        scores /= scores.sum()
        wanted = chosen_by_loops(scores, groups, kept, k, best=1)
        assert found.keys() == wanted
        total = sum(scores[expert] for expert in wanted) if renormalise else 1.0
        assert all(abs(found[expert] - 16 * scores[expert] / total) < 1e-4 for expert in wanted)
        ungrouped += chosen_by_loops(scores, 1, 1, k, best=1) != wanted
    assert ungrouped > 3 or kept == groups  # negative control


def test_scores_are_float32_whatever_the_model_computes_in() -> None:
    router = GroupLimitedSigmoid(DIM, EXPERTS, 4, groups=4, kept=2, renormalise=True)
    weight, _, tokens = draw(5)
    router.weight = mx.array(weight).astype(mx.bfloat16)
    x = mx.array(tokens[None]).astype(mx.bfloat16)
    _, weights = router(x)
    assert weights.dtype == mx.float32
    assert mx.allclose(weights.sum(-1), mx.array(1.0), atol=1e-6)
    exact = x.astype(mx.float32) @ router.weight.astype(mx.float32).T
    assert mx.allclose(router.logits(x), exact, atol=1e-5)
    assert not mx.allclose((x @ router.weight.T).astype(mx.float32), exact, atol=1e-5)
