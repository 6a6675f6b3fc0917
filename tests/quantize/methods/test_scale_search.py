"""Grids that are searched for: better than rounding wherever it counts, and never worse."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_chat import make_chat_model

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import InvalidInput, QuantizationError
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert, prepare
from mlxarch.quantize.calibration.calibration import Calibration
from mlxarch.quantize.calibration.embedding_stats import collect_embedding_stats
from mlxarch.quantize.calibration.input_stats import InputCollector, InputStats, random_tokens
from mlxarch.quantize.methods.matrix_quantizer import FeedbackCache
from mlxarch.quantize.methods.rounding import round_to_nearest as rounded
from mlxarch.quantize.methods.scale_search import search_and_quantize, search_grids
from parity import GOLDEN
from tiny_llama import contents, make_llama

ROWS, COLUMNS = 48, 256


def weights(seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)), mx.float32)


def importance(seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).chisquare(1, COLUMNS), mx.float32)


def unpacked(parts: dict[str, mx.array], to: Quantization) -> np.ndarray:
    scales, biases = parts["scales"].astype(mx.float32), parts["biases"].astype(mx.float32)
    return np.array(mx.dequantize(parts["weight"], scales, biases, to.group_size, to.bits))


def errors(
    parts: dict[str, mx.array], rows: mx.array, counts: mx.array, to: Quantization
) -> np.ndarray:
    """The weighted squared error of each group."""
    squares = np.square(unpacked(parts, to) - np.array(rows)) * np.array(counts)
    return squares.reshape(ROWS, -1, to.group_size).sum(-1)


@pytest.mark.parametrize("bits, share", [(2, 0.6), (3, 0.68), (4, 0.75), (6, 0.85)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_every_group_is_at_least_as_good_as_rounded_and_most_are_better(
    bits: int, share: float, dtype: mx.Dtype
) -> None:
    to, rows, counts = Quantization(bits, 64), weights(), importance()
    found, plain = (
        pack(rows, to, dtype, *more)
        for pack, more in ((search_and_quantize, (counts,)), (rounded, ()))
    )
    own, other = errors(found, rows, counts, to), errors(plain, rows, counts, to)
    assert (own <= other * (1 + 1e-5)).all()
    assert own.sum() < share * other.sum()
    assert {name: (part.shape, part.dtype) for name, part in found.items()} == {
        name: (part.shape, part.dtype) for name, part in plain.items()
    }


def test_the_reported_errors_are_those_of_the_result() -> None:
    to, rows = Quantization(4, 64), weights()
    counts = mx.ones(COLUMNS)
    found = search_grids(rows, to, mx.bfloat16, counts)
    own = errors(search_and_quantize(rows, to, mx.bfloat16, counts), rows, counts, to)
    plain = errors(rounded(rows, to, mx.bfloat16), rows, counts, to)
    assert np.allclose(np.array(found.error[..., 0]), own, rtol=1e-4)
    assert np.allclose(np.array(found.rounding_error[..., 0]), plain, rtol=1e-4)


def test_the_channels_that_count_are_the_ones_that_are_met() -> None:
    to, rows = Quantization(3, 64), weights()
    heavy = np.ones(COLUMNS, np.float32)
    heavy[::7] = 100
    found = np.square(
        unpacked(search_and_quantize(rows, to, mx.float32, mx.array(heavy)), to) - np.array(rows)
    )
    even = np.square(
        unpacked(search_and_quantize(rows, to, mx.float32, mx.ones(COLUMNS)), to) - np.array(rows)
    )
    assert found[:, ::7].mean() < 0.6 * even[:, ::7].mean()
    assert found.mean() > even.mean(), "the others pay for it"


def test_each_row_may_have_an_importance_of_its_own() -> None:
    to, rows = Quantization(4, 64), weights()
    counts = mx.stack([importance(row) for row in range(ROWS)])
    together = search_and_quantize(rows, to, mx.float32, counts)
    alone = search_and_quantize(rows[5:6], to, mx.float32, counts[5])
    assert np.array_equal(np.array(together["weight"][5:6]), np.array(alone["weight"]))
    assert not np.array_equal(
        np.array(search_and_quantize(rows, to, mx.float32, counts[5])["weight"]),
        np.array(together["weight"]),
    )


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-30, 65000.0])
def test_groups_of_one_value_are_met(value: float) -> None:
    to, rows = Quantization(4, 64), mx.full((2, 64), value)
    found = unpacked(search_and_quantize(rows, to, mx.float32, mx.ones(64)), to)
    assert np.allclose(found, value, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("counts", [np.zeros(COLUMNS), np.full(COLUMNS, np.nan)])
def test_without_any_importance_all_channels_count_the_same(counts: np.ndarray) -> None:
    to, rows = Quantization(4, 64), weights()
    found = search_and_quantize(rows, to, mx.float32, mx.array(counts, mx.float32))
    even = search_and_quantize(rows, to, mx.float32, mx.ones(COLUMNS))
    assert np.array_equal(np.array(found["weight"]), np.array(even["weight"]))


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    to, rows, counts = Quantization(4, 64), weights(), importance()
    whole = search_and_quantize(rows, to, mx.float32, counts)
    monkeypatch.setattr("mlxarch.quantize.methods.scale_search.CPU_BLOCK_ELEMENTS", 3 * COLUMNS)
    monkeypatch.setattr("mlxarch.quantize.methods.scale_search.BLOCK_ELEMENTS", 3 * COLUMNS)
    pieces = search_and_quantize(rows, to, mx.float32, counts)
    assert all(np.array_equal(np.array(whole[name]), np.array(pieces[name])) for name in whole)


# Inputs


def gathered(name: str) -> dict[str, InputStats]:
    resolved = resolve(open_checkpoint(GOLDEN / name))
    tokens = random_tokens(resolved.model.vocab_size, resolved.model.context_length)
    return {
        path: inputs
        for _, found in InputCollector(resolved, tokens).collect()
        for path, inputs in found.items()
    }


def test_importance_is_the_mean_square_of_what_a_matrix_gets() -> None:
    found, path = gathered("qwen3"), "model.layers.1.mlp.down_proj"
    model, _ = load_model(GOLDEN / "qwen3")
    [tokens] = random_tokens(model.vocab_size, model.context_length)
    down, seen = dict(model.named_modules())[path], []
    usual = down.matmul
    down.matmul = lambda x, arrays: seen.append(np.array(x)) or usual(x, arrays)
    model.hidden_state(tokens)
    wanted = np.square(seen[0]).reshape(-1, seen[0].shape[-1]).mean(0)
    assert np.allclose(found[f"{path}.weight"].importance()[0], wanted, rtol=1e-3)
    assert wanted.max() > 2 * wanted.min(), "there is something to tell apart"


def test_experts_that_no_token_reached_have_the_mean_of_the_others() -> None:
    inputs = InputStats(np.array([[2.0, 4.0], [0, 0], [6.0, 0.0]]), np.array([2, 0, 1]))
    assert inputs.unrouted_experts == [1]
    assert np.allclose(inputs.importance(), [[1, 2], [8 / 3, 4 / 3], [6, 0]])


# Conversions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_llama(tmp_path / "source")
    return tmp_path / "source"


def weighted(folder: Path, source: Path) -> float:
    """The mean squared difference of the logits."""
    (one, _), (other, _) = load_model(folder), load_model(source)
    tokens = mx.array(np.random.default_rng(5).integers(0, one.vocab_size, (4, 32)))
    return float(np.square(np.array(one(tokens)) - np.array(other(tokens))).mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_a_searched_model_is_nearer_to_its_original_than_a_rounded_one(
    source: Path, tmp_path: Path, bits: int
) -> None:
    for method in ("search", "round"):
        convert(source, tmp_path / method, bits=bits, method=method)
    assert weighted(tmp_path / "search", source) < 0.9 * weighted(tmp_path / "round", source)
    sizes = [
        (tmp_path / method / "model.safetensors").stat().st_size for method in ("search", "round")
    ]
    assert sizes[0] == sizes[1]


def test_search_is_the_default_in_affine_mode(source: Path, tmp_path: Path) -> None:
    def method(**settings: object) -> str:
        return prepare(source, tmp_path / "out", **settings).method  # type: ignore[arg-type]

    assert [method(bits=bits) for bits in (2, 3, 4, 5, 6, 8, None)] == ["search"] * 6 + ["round"]
    assert method(bits=4, mode="mxfp4") == "round"


def test_the_same_call_writes_the_same_bytes_and_another_text_others(tmp_path: Path) -> None:
    source, text = make_chat_model(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 40)
    for name, calibration in {"one": None, "two": None, "three": text, "four": text}.items():
        convert(source, tmp_path / name, calibration=calibration)
    one, two, three, four = (contents(tmp_path / name) for name in ("one", "two", "three", "four"))
    assert one == two and three == four
    assert one["model.safetensors"] != three["model.safetensors"]
    assert b"tokens that the model wrote itself" in (tmp_path / "one" / "README.md").read_bytes()
    assert b"tokens of text.txt" in (tmp_path / "three" / "README.md").read_bytes()


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"method": "best"}, "method 'best' does not exist; allowed: search, gptq, round"),
        ({"method": "gptq", "bits": 4, "mode": "mxfp4"}, "which only mode affine has"),
        ({"method": "search", "bits": None}, "which only mode affine has"),
        ({"calibration": "a.txt", "method": "round"}, "rounding looks at no text"),
    ],
)
def test_methods_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, settings: dict, problem: str
) -> None:
    with pytest.raises(QuantizationError, match=problem):
        prepare(source, tmp_path / "out", **settings)


def test_a_calibration_text_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        prepare(source, tmp_path / "out", calibration=tmp_path / "none.txt")


def test_what_a_model_writes_is_the_same_every_time(source: Path) -> None:
    opened = open_checkpoint(source)
    resolved = resolve(opened)
    one, two = (
        Calibration.default("search", opened, resolved).with_asymmetric_tokens("search", resolved)
        for _ in range(2)
    )
    assert one.digest == two.digest != Calibration.default("search", opened, resolved).digest
    for part, other in zip(
        one.generate_tokens(resolved), two.generate_tokens(resolved), strict=True
    ):
        assert len(part) and all(mx.array_equal(a, b) for a, b in zip(part, other, strict=True))


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite", "gemma3n_text", "gpt2"]
)
@pytest.mark.parametrize("method", ["search", "gptq"])
def test_models_of_every_build_can_be_searched(name: str, method: str, tmp_path: Path) -> None:
    summary = convert(GOLDEN / name, tmp_path / "out", bits=4, group_size=32, method=method)  # type: ignore[arg-type]
    assert summary.quantized > 2
    load_model(tmp_path / "out")


def test_the_first_tokens_of_a_vocabulary_come_more_often_and_all_may_come() -> None:
    tokens = np.concatenate(
        [np.array(batch).ravel() for batch in random_tokens(1 << 16, 512, 1 << 14)]
    )
    edges = np.array([0, 1 << 8, 1 << 12, 1 << 15, 1 << 16])
    densities = np.histogram(tokens, bins=edges)[0] / np.diff(edges)
    assert (densities[:-1] > 2 * densities[1:]).all() and densities[-1] > 0


def test_what_does_not_fit_into_memory_stands_beside_the_output(tmp_path, monkeypatch):
    """Where the system has its files for a while is often memory, and their room was not looked at."""
    real, places = tempfile.TemporaryFile, list[Any]()

    def noted(dir: Path | None) -> Any:
        places.append(dir)
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    convert(GOLDEN / "llama3", tmp_path / "out", bits=4, group_size=32, method="search")
    assert set(places) == {tmp_path / "out.partial"} and len(places) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    places.clear()
    collect_embedding_stats(resolve(open_checkpoint(GOLDEN / "llama3")), random_tokens(100, 64, 64))
    assert set(places) == {None}


def test_feedback_is_worked_out_once_for_the_same_inputs_and_anew_for_others() -> None:
    one, two = (
        np.random.default_rng(seed).standard_normal((50, 32)).astype(np.float32)
        for seed in range(2)
    )
    cache = FeedbackCache()
    first = cache.get([one, two], static_groups=True)
    assert cache.get([one, two], static_groups=True) is first
    for rows, static_groups in (
        ([one], True),
        ([two, one], True),
        ([one, two.copy()], True),
        ([one, two], False),
    ):
        other = cache.get(rows, static_groups)
        assert other is not first and other.static_groups == static_groups
        moments = np.concatenate(rows).T @ np.concatenate(rows) / sum(map(len, rows))
        assert np.allclose(other.apply_hessian(np.eye(32, dtype=np.float32)), moments, atol=1e-5)
        first = cache.get([one, two], static_groups=True)
    cache.clear()
    assert cache.get([one, two], static_groups=True) is not first
