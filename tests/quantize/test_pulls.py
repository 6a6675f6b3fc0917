"""What pulls at the outputs of matrices, and how rows make up for each other's errors."""

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from divergence import of_moves

from mlxarch.blocks import Quantization
from mlxarch.loading import load_model
from mlxarch.quantize import methods
from mlxarch.quantize.gptq import rounded_values
from mlxarch.quantize.importance import Inputs, random_tokens
from mlxarch.quantize.methods import scratch_bytes, tokens_back
from mlxarch.quantize.packing import Packer, Search
from mlxarch.quantize.pulls import Pulls, RowFeedback, token_bytes
from mlxarch.quantize.rows import Loss, chunks
from mlxarch.quantize.search import Grid
from mlxarch.quantize.tables import uses
from mlxarch.tensors import Tensor
from mlxarch.weights import open_source, resolve
from parity import GOLDEN

ROWS, COLUMNS, TOKENS = 96, 128, 2000
TO = Quantization(4, 64)


@pytest.fixture
def kept() -> Iterator[Pulls]:
    with tempfile.TemporaryFile() as file:
        yield Pulls(file)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def related(tokens: int = TOKENS) -> np.ndarray:
    """Pulls that come from few directions, as those at the outputs of models do."""
    return normal(tokens, 12) @ normal(12, ROWS, seed=1) + 0.3 * normal(tokens, ROWS, seed=2)


def cost(values: np.ndarray, exact: np.ndarray, pulls: np.ndarray, importance: np.ndarray) -> float:
    """Mean square of what tokens feel of an error of rows."""
    return float(np.square(pulls @ (values - exact) * np.sqrt(importance)).sum() / len(pulls))


def searched(block: np.ndarray) -> tuple[Grid, np.ndarray]:
    return Search(np.ones(COLUMNS)).choose(block, TO, mx.float32)


# What is kept


def test_pulls_come_back_by_expert_and_by_rows(kept: Pulls) -> None:
    one, two, more = normal(5, 8), normal(3, 8, seed=1), normal(4, 8, seed=2)
    kept.add("a", [one, two])
    kept.add("b", [normal(2, 4)])
    kept.add("a", [more, more[:0]])
    assert np.allclose(kept.of("a", 0, 2, 6), np.concatenate([one, more])[:, 2:6], rtol=2**-7)
    assert np.allclose(kept.of("a", 1, 0, 8), two, rtol=2**-7)
    assert not np.allclose(kept.of("a", 1, 0, 8), one[:3], rtol=0.5)


def test_of_a_matrix_that_nothing_was_told_of_there_are_none(kept: Pulls) -> None:
    assert kept.of("a", 0, 0, 8).shape == (0, 8)


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_a_token_takes_in_the_file_is_known_beforehand(kept: Pulls, name: str) -> None:
    resolved = resolve(open_source(GOLDEN / name))
    batches = random_tokens(resolved.model.vocab_size, 64, 640)
    uses(resolved, batches, kept=kept, count=128)
    first = kept.nbytes
    assert 0.7 * 128 * token_bytes(resolved) < first <= 128 * token_bytes(resolved)  # tables, and heads of MLA
    uses(resolved, batches, kept=kept, count=256)
    assert kept.nbytes == 3 * first
    assert scratch_bytes(resolved, "search", batches[:1]) == min(batches[0].size, 1024) * token_bytes(resolved)
    assert scratch_bytes(resolved, "round", batches) == 0


def test_more_tokens_pass_back_where_that_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(open_source(GOLDEN / "llama3"))
    assert tokens_back(resolved) > 8192
    monkeypatch.setattr(methods, "PULLED", 3000 * token_bytes(resolved))
    assert tokens_back(resolved) == 3000
    monkeypatch.setattr(methods, "PULLED", 10)
    assert tokens_back(resolved) == 1024


def test_moving_outputs_moves_the_logits_along_their_pulls() -> None:
    """The mean square of a change's product with the pulls is what the change makes of KL, twice."""
    resolved, path = resolve(open_source(GOLDEN / "qwen3")), "model.layers.1.self_attn.o_proj"
    [tokens] = random_tokens(resolved.model.vocab_size, resolved.model.context_length, 256)
    pulls = []
    for seed in range(6):
        with tempfile.TemporaryFile() as file:
            kept = Pulls(file)
            uses(resolved, [tokens], seed=seed, kept=kept)
            pulls.append(kept.of(f"{path}.weight", 0, 0, resolved.parameters[f"{path}.weight"].shape[0]))
    model, _ = load_model(GOLDEN / "qwen3")
    matrix = dict(model.named_modules())[path]
    change = normal(pulls[0].shape[-1], seed=3)
    change *= 1e-2 / np.linalg.norm(change)
    usual = matrix.product

    def move(by: mx.array) -> None:
        matrix.product = lambda x, *more: usual(x, *more) + by

    kl = of_moves(model, tokens, change, move)
    expected = np.mean([np.square(pull @ change).reshape(tokens.shape)[:, ::3].mean() for pull in pulls]) / 2
    assert kl == pytest.approx(expected, rel=0.35)
    assert kl != pytest.approx(2 * expected, rel=0.35)


# How rows make up for each other


def test_rows_that_are_pulled_at_together_lose_less_together() -> None:
    exact, pulls, even = normal(ROWS, COLUMNS, seed=5), related(), np.ones(COLUMNS)
    grid, together = RowFeedback(pulls).choose(exact, searched)
    alone, rounded = searched(exact)[1], rounded_values(exact, TO, mx.float32)[1]
    losses = [cost(values, exact, pulls, even) for values in (together, alone, rounded)]
    assert losses[0] < 0.7 * losses[1] < 0.7 * losses[2]
    codes = (together.reshape(ROWS, -1, 64) - np.array(grid.biases)) / np.array(grid.scales)
    assert np.allclose(codes, codes.round(), atol=1e-3), "values of the grid, row by row"


def test_of_strangers_nothing_is_gained() -> None:
    exact, pulls, even = normal(ROWS, COLUMNS, seed=5), normal(50_000, ROWS), np.ones(COLUMNS)
    together, alone = RowFeedback(pulls).choose(exact, searched)[1], searched(exact)[1]
    assert cost(together, exact, pulls, even) == pytest.approx(cost(alone, exact, pulls, even), rel=0.03)


def test_free_rows_answer_an_error_by_least_squares() -> None:
    feedback, exact, calls = RowFeedback(related()), normal(ROWS, COLUMNS, seed=5), []

    def first_is_off(block: np.ndarray) -> tuple[Grid, np.ndarray]:
        calls.append(len(block))
        nothing = mx.zeros((len(block), 2, 1))
        return Grid(nothing, nothing), block + (normal(*block.shape, seed=7) if len(calls) == 1 else 0)

    errors = feedback.choose(exact, first_is_off)[1] - exact
    off = np.arange(0, ROWS, len(calls))
    free = np.setdiff1d(np.arange(ROWS), off)
    damped = feedback.moments + 0.1 * np.eye(ROWS)
    best = -np.linalg.solve(damped[np.ix_(free, free)], damped[np.ix_(free, off)] @ errors[off])
    assert np.allclose(errors[free], best, atol=1e-3)
    assert np.abs(best).max() > 0.1 and len(off) == calls[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_pulls_that_tell_nothing_leave_rows_to_themselves(value: float) -> None:
    exact = normal(ROWS, COLUMNS)
    found = RowFeedback(np.full((20, ROWS), value, np.float32)).choose(exact, searched)[1]
    assert np.allclose(found, searched(exact)[1], atol=1e-5)
    assert not np.allclose(RowFeedback(related()).choose(exact, searched)[1], found, atol=1e-2)


def test_a_token_that_pulls_harder_than_all_others_does_not_decide_alone() -> None:
    usual, loud = related(300), related(300)
    loud[7] = 1000 * normal(ROWS, seed=4)
    moments = [RowFeedback(pulls).moments.ravel() for pulls in (usual, loud)]
    assert np.corrcoef(moments)[0, 1] > 0.98
    assert np.corrcoef([(pulls.T @ pulls).ravel() for pulls in (usual, loud)])[0, 1] < 0.5


# Packing


def packed(
    pulls: np.ndarray, inputs: Inputs, high: int = ROWS, scale: float = 1, ahead: bool = False
) -> tuple[np.ndarray, Loss]:
    loss, rows = Loss(), mx.array(normal(ROWS, COLUMNS, seed=5) * scale)

    def pulled(expert: int, start: int, stop: int) -> np.ndarray:
        return pulls[:, expert * high + start : expert * high + stop]

    packer = Packer(inputs, high, pulled, ahead)
    parts = packer.pack(rows, 0, TO, mx.float32, loss)
    return np.array(mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 64, 4)), loss


@pytest.mark.parametrize("keep", [False, True])
def test_pulls_are_listened_to_in_packing(keep: bool) -> None:
    x, pulls, exact = normal(600, 16) @ normal(16, COLUMNS, seed=3), related(20_000), normal(ROWS, COLUMNS, seed=5)
    inputs = Inputs.of(x, keep=keep)
    (coupled, loss), (alone, _) = packed(pulls, inputs), packed(pulls[:0], inputs)
    moments = x.T @ x / len(x) if keep else np.diag(np.square(x).mean(0))

    def felt(values: np.ndarray) -> float:
        change = pulls @ (values - exact)
        return float((change @ moments * change).sum())

    assert felt(coupled) < 0.75 * felt(alone)
    plain = rounded_values(exact, TO, mx.float32)[1]
    assert loss.against_rounding == pytest.approx(felt(coupled) / felt(plain), rel=0.1)


@pytest.mark.parametrize(("tokens", "heard"), [(COLUMNS // 4 - 1, False), (COLUMNS // 4, True)])
def test_a_search_feeds_nothing_back_from_column_to_column_by_few_tokens(tokens: int, heard: bool) -> None:
    x = normal(tokens, 16) @ normal(16, COLUMNS, seed=3)
    kept, unkept = (packed(related(), Inputs.of(x, keep=keep), ahead=True)[0] for keep in (True, False))
    assert np.array_equal(kept, unkept) != heard
    assert not np.array_equal(packed(related(), Inputs.of(x, keep=True))[0], unkept)  # gptq does in any case


def test_each_expert_is_coupled_with_itself() -> None:
    pulls, half = related(), ROWS // 2
    inputs = Inputs.of(normal(50, COLUMNS), normal(60, COLUMNS, seed=1), keep=False)
    whole, _ = packed(pulls, inputs, high=half)
    changed = np.concatenate([pulls[:, :half], normal(TOKENS, half, seed=8)], axis=1)
    other, _ = packed(changed, inputs, high=half)
    assert np.array_equal(whole[:half], other[:half])
    assert not np.array_equal(whole[half:], other[half:])


def test_a_method_that_makes_it_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(normal(50, COLUMNS))
    usual = Search.choose

    def worse(self: Search, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        return usual(self, exact + 1, to, dtype)

    monkeypatch.setattr(Search, "choose", worse)
    found, loss = packed(related(), inputs)
    assert np.allclose(found, rounded_values(normal(ROWS, COLUMNS, seed=5), TO, mx.float32)[1], atol=1e-5)
    assert loss.against_rounding == 1


def test_rows_that_belong_together_come_together() -> None:
    stack = cast(Tensor, SimpleNamespace(shape=(2, 10, 4), row_count=20))
    assert list(chunks(stack, 4 * 4 * 3)) == [
        (0, 3),
        (3, 6),
        (6, 9),
        (9, 12),
        (12, 15),
        (15, 18),
        (18, 20),
    ]
    assert list(chunks(stack, 4 * 4 * 3, 4)) == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20)]
    assert list(chunks(stack, 4 * 4 * 9, 4)) == [(0, 8), (8, 10), (10, 18), (18, 20)]
