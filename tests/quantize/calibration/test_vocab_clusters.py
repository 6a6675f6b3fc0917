"""Clusters of rows of an LM head, and their quantization with a Hessian for each cluster."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.calibration import vocab_clusters as module
from mlxarch.quantize.calibration.input_stats import InputStats
from mlxarch.quantize.calibration.vocab_clusters import (
    TopTokens,
    VocabClusters,
    cluster_vocabulary,
    max_clusters,
)
from mlxarch.quantize.methods.gptq import ClusteredFeedback, ColumnFeedback, quantize_with_feedback
from mlxarch.quantize.methods.matrix_quantizer import MatrixQuantizer
from mlxarch.quantize.methods.row_chunks import ErrorStats

KINDS, EACH, CHANNELS, PLACES = 4, 24, 64, 1600
ROWS, TO = KINDS * EACH, Quantization(3, 64)
KIND_OF_ROW, KIND_OF_PLACE = np.arange(ROWS) % KINDS, np.arange(PLACES) % KINDS


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head() -> tuple[np.ndarray, np.ndarray]:
    """Rows of four kinds, and states at which those of one kind are likely, each with channels of its own."""
    towards, spread = normal(KINDS, CHANNELS, seed=0), 4 ** normal(KINDS, CHANNELS, seed=1)
    states = towards[KIND_OF_PLACE] + 0.4 * spread[KIND_OF_PLACE] * normal(PLACES, CHANNELS, seed=2)
    return 0.1 * towards[KIND_OF_ROW] + 0.04 * normal(ROWS, CHANNELS, seed=3), states


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def found(rows: int = ROWS, count: int = KINDS) -> VocabClusters:
    weights, states = head()
    return cluster_vocabulary(
        states, TopTokens.from_probabilities(softmax(states @ weights.T)), rows, count
    )


def test_the_likeliest_tokens_of_a_place_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOP_K", 3)
    likely = TopTokens.from_probabilities(np.array([[0.1, 0.4, 0.0, 0.2, 0.3]]))
    assert sorted(zip(likely.ids[0].tolist(), likely.probabilities[0].tolist(), strict=True)) == [
        (1, 0.4),
        (3, 0.2),
        (4, 0.3),
    ]
    assert np.allclose(likely.logit_fisher, likely.probabilities * (1 - likely.probabilities))
    assert TopTokens.from_probabilities(np.array([[0.5, 0.5]])).ids.shape == (1, 2)


def test_rows_that_are_likely_at_the_same_places_come_together_and_weigh_these_most() -> None:
    own = found(rows=ROWS + 7)
    assert (own.assignments[ROWS:] == 0).all() and (own.assignments[:ROWS] > 0).all()
    purest = [
        np.bincount(own.assignments[:ROWS][kind == KIND_OF_ROW]).max() for kind in range(KINDS)
    ]
    assert sum(purest) > 0.9 * ROWS
    assert (
        np.allclose(own.position_weights.mean(1), 1, atol=1e-3)
        and (own.position_weights[0] == 1).all()
    )
    for row in range(KINDS):
        weights = own.position_weights[own.assignments[row]]
        assert weights[row == KIND_OF_PLACE].mean() > 1.5 > 1 > weights[row != KIND_OF_PLACE].mean()


def test_a_cluster_of_few_positions_weighs_nearly_as_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sure = found().position_weights[1:].std()
    monkeypatch.setattr(module, "SHRINKAGE_POSITIONS", 1e6)
    assert found().position_weights[1:].std() < 0.05 * sure


def divergence(packed: dict[str, mx.array]) -> float:
    """KL divergence of the logits, in nats per position."""
    weights, states = head()
    own = np.array(
        mx.dequantize(packed["weight"], packed["scales"], packed["biases"], TO.group_size, TO.bits)
    )
    exact, moved = softmax(states @ weights.T), softmax(states @ own.T)
    return float((exact * np.log(exact / moved)).sum(1).mean())


def packed_by(related: VocabClusters | None) -> float:
    weights, states = head()
    inputs, none = InputStats.from_inputs(states, keep=True), np.zeros((0, ROWS), np.float32)
    quantizer = MatrixQuantizer(
        inputs, ROWS, lambda expert, start, stop: none[:, start:stop], clusters=related
    )
    loss, rows = ErrorStats(), mx.array(weights)
    pieces = [
        quantizer.quantize_rows(rows[part : part + 40], part, TO, mx.float32, loss)
        for part in range(0, ROWS, 40)
    ]
    return divergence(
        {name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    )


def test_a_head_quantized_by_clusters_diverges_less_and_by_wrong_ones_more() -> None:
    own, alone = found(), packed_by(None)
    assert packed_by(own) < 0.9 * alone
    wrong = own._replace(assignments=np.random.default_rng(5).permutation(own.assignments))
    assert packed_by(wrong) > alone


def test_several_pack_each_row_as_its_own_feedback_does() -> None:
    weights, states = head()
    feedbacks = [ColumnFeedback(states[kind == KIND_OF_PLACE]) for kind in range(KINDS)]
    together, error, plain = quantize_with_feedback(
        ClusteredFeedback(feedbacks, KIND_OF_ROW), mx.array(weights), TO, mx.float32
    )
    for kind in range(KINDS):
        rows = np.flatnonzero(kind == KIND_OF_ROW)
        parts, own_error, own_plain = quantize_with_feedback(
            feedbacks[kind], mx.array(weights[rows]), TO, mx.float32
        )
        assert mx.array_equal(together["weight"][mx.array(rows)], parts["weight"])
        assert np.allclose(error[rows], own_error, rtol=1e-4) and np.allclose(
            plain[rows], own_plain, rtol=1e-4
        )
        other = quantize_with_feedback(
            feedbacks[kind - 1], mx.array(weights[rows]), TO, mx.float32
        )[0]
        assert not mx.array_equal(other["weight"], parts["weight"])


def test_what_rows_are_looked_up_for_counts_more_where_tokens_are_certain() -> None:
    """Beside a token that is certain, an error of a logit costs little, and an error of a lookup as much as ever."""
    states = np.repeat(normal(2, CHANNELS, seed=6), 50, axis=0)
    ids = np.repeat([[0, 1], [2, 3]], 50, axis=0)
    own = cluster_vocabulary(
        states, TopTokens(ids, np.repeat([[0.98, 0.02], [0.5, 0.5]], 50, axis=0)), 4, 2
    )
    certain, open_ = own.lookup_weights[own.assignments[0]], own.lookup_weights[own.assignments[2]]
    assert own.assignments[0] == own.assignments[1] != own.assignments[2]
    assert certain > 5 * open_ and own.lookup_weights[0] == 1


def test_wide_rows_have_as_many_clusters_as_memory_allows() -> None:
    assert max_clusters(256) == module.MAX_CLUSTERS
    assert module.MAX_FACTOR_BYTES // (8 * 1536**2) == max_clusters(1536) < module.MAX_CLUSTERS
    assert max_clusters(8192) == 0


def test_states_that_are_not_finite_still_give_clusters() -> None:
    weights, states = head()
    likely = TopTokens.from_probabilities(softmax(states @ weights.T))
    states[3] = np.inf
    assert cluster_vocabulary(states, likely, ROWS, KINDS).assignments.shape == (ROWS,)
