"""Fraction of a matrix's error that remains after error feedback, predicted from its inputs alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.calibration.input_stats import InputStats, random_tokens
from mlxarch.quantize.methods.gptq import ColumnFeedback, quantize_with_feedback
from mlxarch.quantize.methods.matrix_quantizer import MAX_CHANNELS_PER_TOKEN, FeedbackCache
from mlxarch.quantize.methods.scale_search import search_and_quantize as searched
from mlxarch.quantize.mixed_precision import feedback_gain
from mlxarch.quantize.mixed_precision.feedback_gain import remaining_error_fractions
from parity import GOLDEN

ROWS, COLUMNS, TOKENS = 64, 192, 1000
TO = Quantization(8, 64)  # codes far from the ends of their grids, where they can follow


def mixed(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """Inputs that are mixed from few directions, the same for every seed, as large in some channels as in others."""
    draw = np.random.default_rng(seed)
    directions = np.random.default_rng(77).standard_normal((24, COLUMNS))
    few = draw.standard_normal((tokens, 24)) @ directions
    return (few + 4 * draw.standard_normal((tokens, COLUMNS))).astype(np.float32)


def apart(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40 * TOKENS, COLUMNS)).astype(np.float32)


def lost(parts: dict[str, mx.array], x: np.ndarray, rows: mx.array) -> float:
    unpacked = mx.dequantize(
        parts["weight"], parts["scales"], parts["biases"], TO.group_size, TO.bits
    )
    return float(np.square(x @ np.array(unpacked - rows).T).sum())


@pytest.mark.parametrize("inputs", [mixed, apart])
def test_the_predicted_fraction_is_that_of_quantization(inputs) -> None:
    heard, judged = inputs(1), inputs(2)
    rows = mx.array(np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    fed, _, _ = quantize_with_feedback(
        ColumnFeedback(heard, static_groups=True), rows, TO, mx.float32
    )
    plain = searched(rows, TO, mx.float32, mx.array(np.square(heard).mean(0)))
    share = lost(fed, judged, rows) / lost(plain, judged, rows)
    foretold = feedback_gain._remaining_error_fraction(
        InputStats.from_inputs(heard, keep=True),
        InputStats.from_inputs(judged, keep=True),
        FeedbackCache(),
    )
    assert foretold == pytest.approx(share, rel=0.1)
    assert (share < 0.75) == (inputs is mixed) and (0.97 < share < 1.03) == (inputs is apart)


def test_on_its_own_tokens_feedback_seems_to_do_more() -> None:
    """So that others must tell; the fewer it has heard, the wider the gap."""
    few, many, judged = mixed(1, 100), mixed(1), InputStats.from_inputs(mixed(2), keep=True)
    own = [
        feedback_gain._remaining_error_fraction(
            InputStats.from_inputs(x, keep=True),
            InputStats.from_inputs(x, keep=True),
            FeedbackCache(),
        )
        for x in (few, many)
    ]
    true = [
        feedback_gain._remaining_error_fraction(
            InputStats.from_inputs(x, keep=True), judged, FeedbackCache()
        )
        for x in (few, many)
    ]
    assert true[0] - own[0] > 2 * (true[1] - own[1]) > 0 and true[0] > true[1]


def test_experts_with_too_few_tokens_have_a_fraction_of_1() -> None:
    least = COLUMNS // MAX_CHANNELS_PER_TOKEN
    heard = [mixed(1), mixed(3, least), mixed(4, least - 1), mixed(5, 0)]
    shares = [
        feedback_gain._remaining_error_fraction(
            InputStats.from_inputs(x, keep=True),
            InputStats.from_inputs(mixed(2), keep=True),
            FeedbackCache(),
        )
        for x in heard
    ]
    assert shares[0] < shares[1] < shares[2] == shares[3] == 1
    both = feedback_gain._remaining_error_fraction(
        InputStats.from_inputs(heard[0], heard[3], keep=True),
        InputStats.from_inputs(mixed(2), mixed(2), keep=True),
        FeedbackCache(),
    )
    assert both == pytest.approx((1 + shares[0]) / 2)


def test_inputs_that_are_not_finite_or_zero_have_a_fraction_of_1() -> None:
    for x in (
        np.full((TOKENS, COLUMNS), np.nan, np.float32),
        np.zeros((TOKENS, COLUMNS), np.float32),
    ):
        assert (
            feedback_gain._remaining_error_fraction(
                InputStats.from_inputs(mixed(1), keep=True),
                InputStats.from_inputs(x, keep=True),
                FeedbackCache(),
            )
            == 1
        )


@pytest.mark.parametrize(
    "name", ["llama3", "gemma3n_text", "qwen3_moe", "deepseek_v3", "gpt2", "gpt_oss"]
)
def test_every_matrix_that_is_multiplied_has_a_fraction(name: str) -> None:
    resolved = resolve(open_checkpoint(GOLDEN / name))
    heard = random_tokens(resolved.model.vocab_size, 64, 512)
    judged = random_tokens(resolved.model.vocab_size, 64, 128, seed=1)
    told: list[int] = []
    found = remaining_error_fractions(
        resolved, heard, judged, lambda label, done, total: told.append(done)
    )
    assert all(
        "embed" in path or "wte" in path or "wpe" in path
        for path in resolved.matrices - found.keys()
    )
    assert all(0 < share < 1.2 for share in found.values()) and any(
        share < 0.98 for share in found.values()
    )
    assert told == sorted(told) and len(told) > 1
