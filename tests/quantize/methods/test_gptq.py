"""Error feedback: nearer to the products of the inputs than any other choice of codes here."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert
from mlxarch.quantize.methods import gptq, hessian
from mlxarch.quantize.methods.gptq import ColumnFeedback, quantize_with_feedback
from mlxarch.quantize.methods.hessian import ColumnBlock, _activation_order
from mlxarch.quantize.methods.rounding import round_to_nearest as rounded
from mlxarch.quantize.methods.scale_search import search_and_quantize as searched
from tiny_llama import contents, make_llama

ROWS, COLUMNS, TOKENS = 40, 192, 600


def inputs(seed: int = 0) -> np.ndarray:
    """Channels that are mixed from few, as those of models are, with noise."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((TOKENS, 24)) @ random.standard_normal((24, COLUMNS))
    return (mixed + 0.3 * random.standard_normal((TOKENS, COLUMNS))).astype(np.float32)


def weights() -> mx.array:
    return mx.array(np.random.default_rng(9).standard_normal((ROWS, COLUMNS)), mx.float32)


def unpacked(parts: dict[str, mx.array], to: Quantization) -> np.ndarray:
    scales, biases = parts["scales"].astype(mx.float32), parts["biases"].astype(mx.float32)
    return np.array(mx.dequantize(parts["weight"], scales, biases, to.group_size, to.bits))


def product_errors(parts: dict[str, mx.array], x: np.ndarray, to: Quantization) -> np.ndarray:
    """Mean square of what each row's products are off by."""
    return np.square(x @ (unpacked(parts, to) - np.array(weights())).T).mean(0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("static_groups", [False, True])
def test_products_are_nearer_than_by_search_alone_and_no_row_is_worse_than_rounded(
    bits: int, dtype: mx.Dtype, static_groups: bool
) -> None:
    x, to = inputs(), Quantization(bits, 64)
    parts, error, plain = quantize_with_feedback(
        ColumnFeedback(x, static_groups), weights(), to, dtype
    )
    own = product_errors(parts, x, to)
    by_search = product_errors(
        searched(weights(), to, dtype, mx.array(np.square(x).mean(0))), x, to
    )
    by_rounding = product_errors(rounded(weights(), to, dtype), x, to)
    assert own.mean() < 0.7 * by_search.mean() < 0.7 * by_rounding.mean()
    assert (own <= by_rounding * 1.001).all()
    assert np.allclose(own, error, rtol=1e-2) and np.allclose(by_rounding, plain, rtol=1e-2)


def test_grids_found_ahead_are_those_of_search_and_errors_stay_among_the_columns_of_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptq, "BLOCK_WIDTH", 64)
    x, other, to = inputs(), inputs(), Quantization(3, 64)
    other[:, :64] = inputs(seed=7)[:, :64] * 3
    own, changed, whole = (
        feedback.quantize(np.array(weights()), to, mx.bfloat16)
        for feedback in (
            ColumnFeedback(x, static_groups=True),
            ColumnFeedback(other, static_groups=True),
            ColumnFeedback(x),
        )
    )
    by_search = searched(weights(), to, mx.bfloat16, mx.array(np.square(x).mean(0)))
    assert np.array_equal(
        np.array(own[0].scales)[..., 0], np.array(by_search["scales"].astype(mx.float32))
    )
    assert not np.array_equal(np.array(whole[0].scales), np.array(own[0].scales))
    assert not np.array_equal(own[1], unpacked(by_search, to))
    assert np.array_equal(own[1][:, 64:], changed[1][:, 64:]) and not np.array_equal(
        own[1], changed[1]
    )
    assert not np.array_equal(own[1][:, 64:], whole[1][:, 64:])


def test_without_correlation_nothing_is_gained() -> None:
    x, to = (
        np.random.default_rng(3).standard_normal((50_000, COLUMNS)).astype(np.float32),
        Quantization(4, 64),
    )
    own = product_errors(
        quantize_with_feedback(ColumnFeedback(x), weights(), to, mx.float32)[0], x, to
    )
    by_search = product_errors(
        searched(weights(), to, mx.float32, mx.array(np.square(x).mean(0))), x, to
    )
    assert own.mean() == pytest.approx(by_search.mean(), rel=0.03)


def test_the_step_of_a_column_is_the_best_answer_to_its_error() -> None:
    block = ColumnBlock(inputs(), 0, COLUMNS)
    moments = block.hessian.astype(np.float64)
    pairs = moments - np.diag(moments.diagonal())
    damped = moments - pairs * (2 * COLUMNS) / (TOKENS + 2 * COLUMNS)
    damped += 0.1 * moments.diagonal().mean() * np.eye(COLUMNS)
    order, steps = block.ordered_factor(COLUMNS)
    damped = damped[np.ix_(order, order)]
    j = 100  # the best change of the columns behind it, by least squares under H
    best = -np.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j])
    assert np.allclose(steps[j, j + 1 :] / steps[j, j], -best * -1, atol=1e-3)
    assert (np.diff(moments.diagonal()[order]) <= 0).all()


@pytest.mark.parametrize("static_groups", [False, True])
def test_columns_with_large_inputs_are_taken_first(
    static_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lose most: in their own order, or the other way round, products are farther off."""
    monkeypatch.setattr(gptq, "DESCENT_PASSES", 0)
    x, to = inputs(), Quantization(3, 64)
    x *= np.random.default_rng(8).permutation(np.geomspace(0.1, 10, COLUMNS)).astype(np.float32)
    right = product_errors(
        quantize_with_feedback(ColumnFeedback(x, static_groups), weights(), to, mx.float32)[0],
        x,
        to,
    ).mean()
    for other in (
        lambda squares, size: np.arange(len(squares)),
        lambda squares, size: _activation_order(-squares, size),
    ):
        monkeypatch.setattr(hessian, "_activation_order", other)
        wrong = product_errors(
            quantize_with_feedback(ColumnFeedback(x, static_groups), weights(), to, mx.float32)[0],
            x,
            to,
        ).mean()
        assert right < 0.7 * wrong


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_channels_are_enough_to_go_on(tokens: int) -> None:
    to = Quantization(4, 64)
    parts, error, plain = quantize_with_feedback(
        ColumnFeedback(inputs()[:tokens]), weights(), to, mx.float32
    )
    assert np.isfinite(unpacked(parts, to)).all() and (error <= plain).all()


def test_silent_inputs_leave_the_rows_rounded_or_better() -> None:
    to = Quantization(4, 64)
    parts, _, _ = quantize_with_feedback(
        ColumnFeedback(np.zeros((8, COLUMNS), np.float32)), weights(), to, mx.float32
    )
    assert np.abs(unpacked(parts, to) - np.array(weights())).max() < 0.5


def test_the_fewer_tokens_the_less_is_made_of_pairs_of_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs that are not correlated, and seem so where few were seen."""
    x, to = (
        np.random.default_rng(5).standard_normal((COLUMNS // 2, COLUMNS)).astype(np.float32),
        Quantization(4, 64),
    )
    own = np.square(
        unpacked(quantize_with_feedback(ColumnFeedback(x), weights(), to, mx.float32)[0], to)
        - np.array(weights())
    ).mean()
    monkeypatch.setattr(hessian, "_shrinkage", lambda *_: np.float32(1))
    believed = np.square(
        unpacked(quantize_with_feedback(ColumnFeedback(x), weights(), to, mx.float32)[0], to)
        - np.array(weights())
    ).mean()
    assert own < 0.9 * believed


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_grids_and_codes_that_settle_bring_products_nearer(
    bits: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On inputs they have not seen, too, and more so in the second pass."""
    (x, other), to, errors = np.split(inputs(), [TOKENS * 2 // 3]), Quantization(bits, 64), []
    for passes in (0, 1, 2):
        monkeypatch.setattr(gptq, "DESCENT_PASSES", passes)
        parts, error, _ = quantize_with_feedback(ColumnFeedback(x), weights(), to, dtype)
        own = product_errors(parts, x, to)
        assert np.allclose(own, error, rtol=1e-2), "scales and biases are those that are stored"
        errors.append((own.mean(), product_errors(parts, other, to).mean()))
    for none, once, twice in zip(*errors, strict=True):
        assert twice < once < 0.97 * none


def test_no_code_and_no_grid_that_has_settled_could_move_for_the_better() -> None:
    """By the slopes of the cost, and its curves: and before that some could."""
    block, to, exact = ColumnBlock(inputs(), 0, COLUMNS), Quantization(4, 64), np.array(weights()).T
    share, alone = block.regularization()
    curves = (share * block.hessian.diagonal() + alone)[:, None]
    grid, values = ColumnFeedback(inputs()).quantize(exact.T, to, mx.float32)
    grids, values, found = np.stack([np.array(part)[..., 0].T for part in grid]), values.T, []
    for passes in (0, 20):
        for _ in range(passes):
            grids, values = gptq._coordinate_descent(block, exact, grids, values, to, mx.float32)
        slopes = share * (block.hessian @ (values - exact)) + alone[:, None] * (values - exact)
        scales, biases = np.repeat(grids, 64, axis=1)
        codes = np.rint((values - biases) / scales)
        gains = [
            np.where((codes + by >= 0) & (codes + by <= 15), -2 * by * slopes - curves * scales, 0)
            for by in (-1, 1)
        ]
        groups = slopes.reshape(-1, 64, ROWS), codes.reshape(-1, 64, ROWS)
        by_grid = np.abs([groups[0].sum(1), np.prod(groups, axis=0).sum(1)])
        found.append((np.max(gains / (curves * scales)), by_grid.max()))
    assert found[1][0] < 1e-3 < 0.1 < found[0][0]
    assert found[1][1] < 0.02 * found[0][1]


def test_inputs_that_are_not_finite_tell_nothing() -> None:
    to, x = Quantization(4, 64), inputs()
    x[3, 5] = np.nan
    parts = quantize_with_feedback(ColumnFeedback(x), weights(), to, mx.float32)[0]
    assert np.abs(unpacked(parts, to) - np.array(weights())).max() < 0.5


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    for name in ("one", "two"):
        convert(tmp_path / "source", tmp_path / name, method="gptq")
    convert(tmp_path / "source", tmp_path / "other", method="search")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (
        contents(tmp_path / "one")["model.safetensors"]
        != contents(tmp_path / "other")["model.safetensors"]
    )
