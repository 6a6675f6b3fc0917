"""What feedback leaves of the error of a matrix, foretold by its inputs alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import Quantization
from mlxarch.quantize import relief
from mlxarch.quantize.gptq import Feedback, pack_fed
from mlxarch.quantize.importance import Inputs, random_tokens
from mlxarch.quantize.packing import FEW, Recent
from mlxarch.quantize.relief import left
from mlxarch.quantize.search import quantize as searched
from mlxarch.weights import open_source, resolve
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
    unpacked = mx.dequantize(parts["weight"], parts["scales"], parts["biases"], TO.group_size, TO.bits)
    return float(np.square(x @ np.array(unpacked - rows).T).sum())


@pytest.mark.parametrize("inputs", [mixed, apart])
def test_what_is_foretold_is_what_comes_of_packing(inputs) -> None:
    heard, judged = inputs(1), inputs(2)
    rows = mx.array(np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    fed, _, _ = pack_fed(Feedback(heard, ahead=True), rows, TO, mx.float32)
    plain = searched(rows, TO, mx.float32, mx.array(np.square(heard).mean(0)))
    share = lost(fed, judged, rows) / lost(plain, judged, rows)
    foretold = relief._left(Inputs.of(heard, keep=True), Inputs.of(judged, keep=True), Recent())
    assert foretold == pytest.approx(share, rel=0.1)
    assert (share < 0.75) == (inputs is mixed) and (0.97 < share < 1.03) == (inputs is apart)


def test_on_its_own_tokens_feedback_seems_to_do_more() -> None:
    """So that others must tell; the fewer it has heard, the wider the gap."""
    few, many, judged = mixed(1, 100), mixed(1), Inputs.of(mixed(2), keep=True)
    own = [relief._left(Inputs.of(x, keep=True), Inputs.of(x, keep=True), Recent()) for x in (few, many)]
    true = [relief._left(Inputs.of(x, keep=True), judged, Recent()) for x in (few, many)]
    assert true[0] - own[0] > 2 * (true[1] - own[1]) > 0 and true[0] > true[1]


def test_experts_that_hear_too_little_lose_as_much_as_before() -> None:
    least = COLUMNS // FEW
    heard = [mixed(1), mixed(3, least), mixed(4, least - 1), mixed(5, 0)]
    shares = [relief._left(Inputs.of(x, keep=True), Inputs.of(mixed(2), keep=True), Recent()) for x in heard]
    assert shares[0] < shares[1] < shares[2] == shares[3] == 1
    both = relief._left(Inputs.of(heard[0], heard[3], keep=True), Inputs.of(mixed(2), mixed(2), keep=True), Recent())
    assert both == pytest.approx((1 + shares[0]) / 2)


def test_inputs_that_are_not_finite_or_nothing_foretell_nothing() -> None:
    for x in (np.full((TOKENS, COLUMNS), np.nan, np.float32), np.zeros((TOKENS, COLUMNS), np.float32)):
        assert relief._left(Inputs.of(mixed(1), keep=True), Inputs.of(x, keep=True), Recent()) == 1


@pytest.mark.parametrize("name", ["llama3", "gemma3n_text", "qwen3_moe", "deepseek_v3", "gpt2", "gpt_oss"])
def test_every_matrix_that_is_multiplied_has_a_share(name: str) -> None:
    resolved = resolve(open_source(GOLDEN / name))
    heard = random_tokens(resolved.model.vocab_size, 64, 512)
    judged = random_tokens(resolved.model.vocab_size, 64, 128, seed=1)
    told: list[int] = []
    found = left(resolved, heard, judged, lambda label, done, total: told.append(done))
    assert all("embed" in path or "wte" in path or "wpe" in path for path in resolved.matrices - found.keys())
    assert all(0 < share < 1.2 for share in found.values()) and any(share < 0.98 for share in found.values())
    assert told == sorted(told) and len(told) > 1
