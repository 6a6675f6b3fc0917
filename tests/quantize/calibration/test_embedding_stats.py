"""Tables of embeddings: what their rows are looked up and multiplied for decides how they are packed."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from divergence import of_moves

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import convert
from mlxarch.quantize.calibration.embedding_stats import BACKWARD_TOKENS, collect_embedding_stats
from mlxarch.quantize.calibration.input_stats import random_tokens
from parity import GOLDEN
from tiny_llama import make_llama

TABLE = "model.embed_tokens.weight"


def batches(name: str, count: int = 512) -> list[mx.array]:
    model = resolve(open_checkpoint(GOLDEN / name)).model
    return random_tokens(model.vocab_size, model.context_length, count)


def found(name: str, count: int = 512) -> dict[str, list[np.ndarray]]:
    used = collect_embedding_stats(resolve(open_checkpoint(GOLDEN / name)), batches(name, count))
    return {path: own.inputs for path, own in used.items()}


def test_a_tied_table_multiplies_the_last_states_and_another_does_not() -> None:
    assert [len(found(name)[TABLE]) for name in ("llama3_tied", "llama3")] == [2, 1]
    head, looked_up = found("qwen3")[TABLE]
    model, _ = load_model(GOLDEN / "qwen3")
    table, seen = dict(model.named_modules())[TABLE.removesuffix(".weight")], []
    usual = table.matmul
    table.matmul = lambda x, *more: seen.append(np.array(x)) or usual(x, *more)
    model(batches("qwen3")[0])
    states = seen[0].reshape(head.shape)

    def alike(rows: np.ndarray) -> float:
        return float(np.vdot(rows, states) / np.linalg.norm(rows) / np.linalg.norm(states))

    assert alike(head) == pytest.approx(1, abs=1e-4)
    assert abs(alike(looked_up)) < 0.5
    assert np.linalg.norm(head) < 1.01 * np.linalg.norm(states), (
        "as far as labels are uncertain, and no further"
    )


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_moving_a_looked_up_row_moves_the_logits_along_its_gradient(name: str) -> None:
    """The mean square of a change's product with the gradients is what the change makes of KL, twice."""
    resolved, [tokens] = resolve(open_checkpoint(GOLDEN / name)), batches(name, 256)
    gradients = [
        collect_embedding_stats(resolved, [tokens], seed=seed)[TABLE].inputs[-1]
        for seed in range(12)
    ]
    model, _ = load_model(GOLDEN / name)
    table = dict(model.named_modules())[TABLE.removesuffix(".weight")]
    change = np.random.default_rng(0).standard_normal(gradients[0].shape[-1]).astype(np.float32)
    change *= 1e-3 / np.linalg.norm(change)
    usual = table.lookup

    def move(by: mx.array) -> None:
        table.lookup = lambda ids: usual(ids) + by

    kl = of_moves(model, tokens, change, move)
    table.lookup = usual
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


def test_a_few_windows_from_all_over_pass_back() -> None:
    resolved = resolve(open_checkpoint(GOLDEN / "llama3"))
    windows = np.zeros((3 * BACKWARD_TOKENS // 128, 128), np.int32)
    windows[-1] = 5
    rows = collect_embedding_stats(resolved, [mx.array(windows[:1]), mx.array(windows[1:])])[
        TABLE
    ].inputs[0]
    assert len(rows) == BACKWARD_TOKENS
    assert not np.allclose(rows[-128:].std(0), rows[:128].std(0))


def test_every_table_is_searched_for_and_one_with_two_uses_gets_feedback(tmp_path: Path) -> None:
    ratios = {}
    for tied in (True, False):
        make_llama(tmp_path / str(tied), tied=tied)
        convert(tmp_path / str(tied), tmp_path / f"{tied}.out", bits=3, method="search")
        receipt = json.loads((tmp_path / f"{tied}.out" / "receipt.json").read_text())
        ratios[tied] = receipt["tensors"][TABLE]["against_rounding"]
    assert 0 < ratios[True] < 1 and 0 < ratios[False] < 1
