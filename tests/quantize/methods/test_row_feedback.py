"""Output gradients of matrices, and error feedback across rows."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from divergence import of_moves

from mlxarch.blocks import Router
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import schedule as methods
from mlxarch.quantize.calibration.embedding_stats import (
    collect_embedding_stats,
    hidden_state_bytes,
)
from mlxarch.quantize.calibration.input_stats import InputStats, random_tokens
from mlxarch.quantize.calibration.output_gradients import OutputGradients, bytes_per_token
from mlxarch.quantize.methods.gptq import round_values
from mlxarch.quantize.methods.matrix_quantizer import MatrixQuantizer, ScaleSearch
from mlxarch.quantize.methods.row_chunks import ErrorStats, row_ranges
from mlxarch.quantize.methods.row_feedback import RowFeedback
from mlxarch.quantize.methods.scale_search import Grid
from mlxarch.quantize.schedule import backward_token_count, scratch_bytes
from parity import GOLDEN

ROWS, COLUMNS, TOKENS = 96, 128, 2000
TO = Quantization(4, 64)


@pytest.fixture
def kept() -> Iterator[OutputGradients]:
    with tempfile.TemporaryFile() as file:
        yield OutputGradients(file)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def related(tokens: int = TOKENS) -> np.ndarray:
    """Gradients that come from few directions, as those at the outputs of models do."""
    return normal(tokens, 12) @ normal(12, ROWS, seed=1) + 0.3 * normal(tokens, ROWS, seed=2)


def cost(
    values: np.ndarray, exact: np.ndarray, gradients: np.ndarray, importance: np.ndarray
) -> float:
    """Mean cost of an error of rows."""
    return float(
        np.square(gradients @ (values - exact) * np.sqrt(importance)).sum() / len(gradients)
    )


def searched(block: np.ndarray) -> tuple[Grid, np.ndarray]:
    return ScaleSearch(np.ones(COLUMNS)).quantize(block, TO, mx.float32)


# Storage of output gradients


def test_gradients_are_read_by_expert_and_by_rows(kept: OutputGradients) -> None:
    one, two, more = normal(5, 8), normal(3, 8, seed=1), normal(4, 8, seed=2)
    kept.append("a", [one, two])
    kept.append("b", [normal(2, 4)])
    kept.append("a", [more, more[:0]])
    assert np.allclose(kept.read("a", 0, 2, 6), np.concatenate([one, more])[:, 2:6], rtol=2**-7)
    assert np.allclose(kept.read("a", 1, 0, 8), two, rtol=2**-7)
    assert not np.allclose(kept.read("a", 1, 0, 8), one[:3], rtol=0.5)


def test_a_matrix_without_stored_gradients_has_none(kept: OutputGradients) -> None:
    assert kept.read("a", 0, 0, 8).shape == (0, 8)


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_a_token_takes_in_the_file_is_known_beforehand(
    kept: OutputGradients, name: str
) -> None:
    resolved = resolve(open_checkpoint(GOLDEN / name))
    batches = random_tokens(resolved.model.vocab_size, 64, 640)
    collect_embedding_stats(resolved, batches, output_gradients=kept, max_tokens=128)
    first = kept.nbytes
    assert (
        0.7 * 128 * bytes_per_token(resolved) < first <= 128 * bytes_per_token(resolved)
    )  # tables, and heads of MLA
    collect_embedding_stats(resolved, batches, output_gradients=kept, max_tokens=256)
    assert kept.nbytes == 3 * first
    aside = scratch_bytes(resolved, "search", batches[:1])
    assert aside == min(batches[0].size, 1024) * bytes_per_token(resolved) + hidden_state_bytes(
        resolved, batches[:1], 1024
    )
    assert scratch_bytes(resolved, "round", batches) == 0


@pytest.mark.parametrize("name", ["llama3", "gemma3n_text"])  # of one residual stream, and of four
@pytest.mark.parametrize("tokens", [100, 320, 640])
def test_the_file_of_hidden_states_is_as_large_as_forecast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, tokens: int
) -> None:
    sizes = []

    @contextmanager
    def measured(**options: Any) -> Iterator[Any]:
        with open(tmp_path / "states", "w+b") as file:
            yield file
            sizes.append(file.seek(0, 2))

    resolved = resolve(open_checkpoint(GOLDEN / name))
    batches = random_tokens(resolved.model.vocab_size, 64, 640)
    monkeypatch.setattr("tempfile.TemporaryFile", measured)
    collect_embedding_stats(resolved, batches, max_tokens=tokens)
    assert max(sizes) == hidden_state_bytes(resolved, batches, tokens)


def test_experts_per_token_are_those_of_the_router_whatever_the_config_calls_them() -> None:
    resolved = resolve(open_checkpoint(GOLDEN / "qwen3_moe"))
    before = bytes_per_token(resolved)
    for router in (m for m in resolved.model.modules() if isinstance(m, Router)):
        router.k += 1
    expert = 2 * 12 + 32  # outputs of gate, up and down in each of two layers with experts
    assert bytes_per_token(resolved) == before + 2 * 2 * expert


def test_more_tokens_pass_back_where_that_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(open_checkpoint(GOLDEN / "llama3"))
    assert backward_token_count(resolved) > 8192
    monkeypatch.setattr(methods, "MAX_GRADIENT_BYTES", 3000 * bytes_per_token(resolved))
    assert backward_token_count(resolved) == 3000
    monkeypatch.setattr(methods, "MAX_GRADIENT_BYTES", 10)
    assert backward_token_count(resolved) == 1024


def test_moving_outputs_moves_the_logits_along_their_gradients() -> None:
    """The mean square of a change's product with the gradients is what the change makes of KL, twice."""
    resolved, path = resolve(open_checkpoint(GOLDEN / "qwen3")), "model.layers.1.self_attn.o_proj"
    [tokens] = random_tokens(resolved.model.vocab_size, resolved.model.context_length, 256)
    gradients = []
    for seed in range(6):
        with tempfile.TemporaryFile() as file:
            kept = OutputGradients(file)
            collect_embedding_stats(resolved, [tokens], seed=seed, output_gradients=kept)
            gradients.append(
                kept.read(f"{path}.weight", 0, 0, resolved.parameters[f"{path}.weight"].shape[0])
            )
    model, _ = load_model(GOLDEN / "qwen3")
    matrix = dict(model.named_modules())[path]
    change = normal(gradients[0].shape[-1], seed=3)
    change *= 1e-2 / np.linalg.norm(change)
    usual = matrix.matmul

    def move(by: mx.array) -> None:
        matrix.matmul = lambda x, *more: usual(x, *more) + by

    kl = of_moves(model, tokens, change, move)
    expected = (
        np.mean(
            [
                np.square(gradient @ change).reshape(tokens.shape)[:, ::3].mean()
                for gradient in gradients
            ]
        )
        / 2
    )
    assert kl == pytest.approx(expected, rel=0.35)
    assert kl != pytest.approx(2 * expected, rel=0.35)


# Error feedback across rows


def test_rows_that_are_correlated_in_their_gradients_compensate_each_other() -> None:
    exact, gradients, even = normal(ROWS, COLUMNS, seed=5), related(), np.ones(COLUMNS)
    grid, together = RowFeedback(gradients).quantize(exact, searched)
    alone, rounded = searched(exact)[1], round_values(exact, TO, mx.float32)[1]
    losses = [cost(values, exact, gradients, even) for values in (together, alone, rounded)]
    assert losses[0] < 0.7 * losses[1] < 0.7 * losses[2]
    codes = (together.reshape(ROWS, -1, 64) - np.array(grid.biases)) / np.array(grid.scales)
    assert np.allclose(codes, codes.round(), atol=1e-3), "values of the grid, row by row"


def test_rows_with_uncorrelated_gradients_gain_nothing() -> None:
    exact, gradients, even = normal(ROWS, COLUMNS, seed=5), normal(50_000, ROWS), np.ones(COLUMNS)
    together, alone = RowFeedback(gradients).quantize(exact, searched)[1], searched(exact)[1]
    assert cost(together, exact, gradients, even) == pytest.approx(
        cost(alone, exact, gradients, even), rel=0.03
    )


def test_free_rows_answer_an_error_by_least_squares() -> None:
    feedback, exact, calls = RowFeedback(related()), normal(ROWS, COLUMNS, seed=5), []

    def first_is_off(block: np.ndarray) -> tuple[Grid, np.ndarray]:
        calls.append(len(block))
        nothing = mx.zeros((len(block), 2, 1))
        return Grid(nothing, nothing), block + (
            normal(*block.shape, seed=7) if len(calls) == 1 else 0
        )

    errors = feedback.quantize(exact, first_is_off)[1] - exact
    off = np.arange(0, ROWS, len(calls))
    free = np.setdiff1d(np.arange(ROWS), off)
    damped = feedback.fisher + 0.1 * np.eye(ROWS)
    best = -np.linalg.solve(damped[np.ix_(free, free)], damped[np.ix_(free, off)] @ errors[off])
    assert np.allclose(errors[free], best, atol=1e-3)
    assert np.abs(best).max() > 0.1 and len(off) == calls[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_useless_gradients_leave_rows_independent(value: float) -> None:
    exact = normal(ROWS, COLUMNS)
    found = RowFeedback(np.full((20, ROWS), value, np.float32)).quantize(exact, searched)[1]
    assert np.allclose(found, searched(exact)[1], atol=1e-5)
    assert not np.allclose(RowFeedback(related()).quantize(exact, searched)[1], found, atol=1e-2)


def test_a_token_with_a_very_large_gradient_does_not_decide_alone() -> None:
    usual, outlier = related(300), related(300)
    outlier[7] = 1000 * normal(ROWS, seed=4)
    moments = [RowFeedback(gradients).fisher.ravel() for gradients in (usual, outlier)]
    assert np.corrcoef(moments)[0, 1] > 0.98
    assert (
        np.corrcoef([(gradients.T @ gradients).ravel() for gradients in (usual, outlier)])[0, 1]
        < 0.5
    )


# Quantization of matrices


def packed(
    gradients: np.ndarray,
    inputs: InputStats,
    high: int = ROWS,
    scale: float = 1,
    static_groups: bool = False,
) -> tuple[np.ndarray, ErrorStats]:
    loss, rows = ErrorStats(), mx.array(normal(ROWS, COLUMNS, seed=5) * scale)

    def read_gradients(expert: int, start: int, stop: int) -> np.ndarray:
        return gradients[:, expert * high + start : expert * high + stop]

    quantizer = MatrixQuantizer(inputs, high, read_gradients, static_groups)
    parts = quantizer.quantize_rows(rows, 0, TO, mx.float32, loss)
    return np.array(mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 64, 4)), loss


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_used_in_quantization(keep: bool) -> None:
    x, gradients, exact = (
        normal(600, 16) @ normal(16, COLUMNS, seed=3),
        related(20_000),
        normal(ROWS, COLUMNS, seed=5),
    )
    inputs = InputStats.from_inputs(x, keep=keep)
    (coupled, loss), (alone, _) = packed(gradients, inputs), packed(gradients[:0], inputs)
    moments = x.T @ x / len(x) if keep else np.diag(np.square(x).mean(0))

    def kl_cost(values: np.ndarray) -> float:
        change = gradients @ (values - exact)
        return float((change @ moments * change).sum())

    assert kl_cost(coupled) < 0.75 * kl_cost(alone)
    plain = round_values(exact, TO, mx.float32)[1]
    assert loss.against_rounding == pytest.approx(kl_cost(coupled) / kl_cost(plain), rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "uses_feedback"), [(COLUMNS // 4 - 1, False), (COLUMNS // 4, True)]
)
def test_a_search_feeds_nothing_back_from_column_to_column_by_few_tokens(
    tokens: int, uses_feedback: bool
) -> None:
    x = normal(tokens, 16) @ normal(16, COLUMNS, seed=3)
    kept, unkept = (
        packed(related(), InputStats.from_inputs(x, keep=keep), static_groups=True)[0]
        for keep in (True, False)
    )
    assert np.array_equal(kept, unkept) != uses_feedback
    assert not np.array_equal(
        packed(related(), InputStats.from_inputs(x, keep=True))[0], unkept
    )  # gptq does in any case


def test_each_expert_is_coupled_with_itself() -> None:
    gradients, half = related(), ROWS // 2
    inputs = InputStats.from_inputs(normal(50, COLUMNS), normal(60, COLUMNS, seed=1), keep=False)
    whole, _ = packed(gradients, inputs, high=half)
    changed = np.concatenate([gradients[:, :half], normal(TOKENS, half, seed=8)], axis=1)
    other, _ = packed(changed, inputs, high=half)
    assert np.array_equal(whole[:half], other[:half])
    assert not np.array_equal(whole[half:], other[half:])


def test_a_method_that_makes_it_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = InputStats.from_inputs(normal(50, COLUMNS))
    usual = ScaleSearch.quantize

    def worse(
        self: ScaleSearch, exact: np.ndarray, to: Quantization, dtype: mx.Dtype
    ) -> tuple[Grid, np.ndarray]:
        return usual(self, exact + 1, to, dtype)

    monkeypatch.setattr(ScaleSearch, "quantize", worse)
    found, loss = packed(related(), inputs)
    assert np.allclose(
        found, round_values(normal(ROWS, COLUMNS, seed=5), TO, mx.float32)[1], atol=1e-5
    )
    assert loss.against_rounding == 1


def test_rows_that_belong_together_come_together() -> None:
    stack = cast(LazyTensor, SimpleNamespace(shape=(2, 10, 4), row_count=20))
    assert list(row_ranges(stack, 4 * 4 * 3)) == [
        (0, 3),
        (3, 6),
        (6, 9),
        (9, 12),
        (12, 15),
        (15, 18),
        (18, 20),
    ]
    assert list(row_ranges(stack, 4 * 4 * 3, 4)) == [
        (0, 4),
        (4, 8),
        (8, 10),
        (10, 14),
        (14, 18),
        (18, 20),
    ]
    assert list(row_ranges(stack, 4 * 4 * 9, 4)) == [(0, 8), (8, 10), (10, 18), (18, 20)]
