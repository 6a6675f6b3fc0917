"""Later matrices take away what errors of earlier ones have brought to the states."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.quantize import convert, prepare
from mlxarch.quantize.conversion import Limits
from mlxarch.quantize.methods.asymmetric_calibration import (
    RIDGE,
    RIDGE_PER_TOKEN_RATIO,
    AsymmetricCalibration,
    _ridge_regression,
)
from mlxarch.quantize.methods.residual_projections import residual_projections
from parity import GOLDEN

NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").is_file())


class Changed(LazyTensor):
    """A tensor with something added to it."""

    def __init__(self, stored: LazyTensor, more: np.ndarray) -> None:
        self.stored, self.more, self.shape, self.dtype = (
            stored,
            mx.array(more),
            stored.shape,
            mx.float32,
        )

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.stored.read_rows(start, stop).astype(mx.float32) + self.more[start:stop]


def opened(name: str) -> Resolved:
    return resolve(open_checkpoint(GOLDEN / name))


def tokens(resolved: Resolved) -> list[mx.array]:
    random = np.random.default_rng(0)
    return [
        mx.array(random.integers(0, resolved.model.vocab_size, (count, 24))) for count in (8, 5)
    ]


def state_error(calibration: AsymmetricCalibration) -> float:
    """How far the packed model's states are from the original's."""
    pairs = zip(calibration._quantized.states, calibration._original.states, strict=True)
    return float(sum(np.square(np.array(a) - np.array(b)).sum() for a, b in pairs))


def error_with_corrections(
    name: str, take: Callable[[np.ndarray], np.ndarray | None]
) -> tuple[float, int]:
    """Error after all layers with queries' matrices changed a little and corrections passed through ``take``."""
    resolved, stored = opened(name), dict[str, LazyTensor]()
    calibration, corrections = AsymmetricCalibration(resolved, tokens(resolved), stored.get), 0
    calibration.start()
    random = np.random.default_rng(1)
    for index in range(calibration.layer_count):
        inside = [p for p in resolved.parameters if f"layers.{index}." in p or f".h.{index}." in p]
        for path in inside:
            tensor = resolved.parameters[path]
            if (
                path.endswith(("v_proj.weight", "c_attn.weight", "kv_a_proj_with_mqa.weight"))
                and index == 0
            ):
                matrix = np.array(tensor.load().astype(mx.float32))
                stored[path] = Changed(
                    tensor, 0.2 * matrix.std() * random.standard_normal(matrix.shape)
                )
        for path in inside:
            if (correction := calibration.correction(path)) is not None:
                corrections += 1
                if (taken := take(correction)) is not None:
                    stored[path] = Changed(resolved.parameters[path], taken)
        calibration.advance()
    return state_error(calibration), corrections


@pytest.mark.parametrize(
    "name",
    ["llama3", "gemma3_text", "olmo2", "gpt2", "deepseek_v3", "qwen3_moe", "llama4_scout", "grok2"],
)
def test_a_correction_brings_the_states_nearer_and_its_opposite_takes_them_further(
    name: str,
) -> None:
    without, count = error_with_corrections(name, lambda correction: None)
    assert count > 1 and without > 0
    assert error_with_corrections(name, lambda correction: correction)[0] < 0.98 * without
    assert error_with_corrections(name, lambda correction: -correction)[0] > 1.02 * without


def test_the_states_are_those_of_the_packed_model() -> None:
    resolved, stored = opened("llama3"), dict[str, LazyTensor]()
    calibration = AsymmetricCalibration(resolved, tokens(resolved), stored.get)
    calibration.start()
    for path in resolved.parameters:
        if path.endswith("proj.weight"):
            stored[path] = Changed(
                resolved.parameters[path], 1e-2 * np.ones(resolved.parameters[path].shape)
            )
    model, _ = load_model(GOLDEN / "llama3")
    for _ in range(calibration.layer_count):
        calibration.advance()
    changed = {path: mx.array(tensor.load()) for path, tensor in stored.items()}
    model.load_weights(list(changed.items()), strict=False)
    for found, batch in zip(calibration._quantized.states, tokens(resolved), strict=True):
        wanted = np.array(model.hidden_state(batch))
        assert np.abs(np.array(found) - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert state_error(calibration) > 0


# Outputs in a layer that reach the residual stream unchanged, where they are fewer than two: others
# are scaled, mixed into several residual streams, summed with a parallel branch, or the only one of
# their layer
FEWER = {
    "cohere2_moe": 0,
    "deepseek_v4": 0,
    "falcon_h1": 0,
    "falcon_h1_norm": 0,
    "gemma3n": 0,
    "gemma3n_text": 0,
    "gemma4": 1,
    "gemma4_e2b": 1,
    "glm5_next": 0,
    "granite": 0,
    "granite_hybrid": 0,
    "nemotron_h": 1,
    "qwen4_exp": 0,
}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_that_add_to_the_states_are_found_in_every_architecture(name: str) -> None:
    resolved = opened(name)
    model, count = resolved.model, 0
    names = {id(module): path for path, module in model.named_modules()}
    for layer in model.layers:
        found = residual_projections(layer, names[id(layer)])
        count += len(found)
        assert len({projection.is_feed_forward for projection in found}) == len(found) <= 2
        for projection in found:
            assert projection.path in resolved.matrices
            assert (
                resolved.parameters[projection.path].shape[0]
                == resolved.architecture.config.hidden_size
            )
            assert projection.norm is None or f"{projection.norm}.weight" in resolved.parameters
    experts = any("experts" in path or "switch_mlp" in path for path in resolved.parameters)
    least = FEWER.get(name, 1 if experts else 2)
    assert count == 0 if least == 0 else count >= least * len(model.layers)


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    convert(GOLDEN / "gemma3_text", tmp_path / "whole", method="search", group_size=32)
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for stop in range(3, 20, 4):
        seen = set[int]()

        def interrupt(
            label: str, done: int, total: int, stop: int = stop, seen: set[int] = seen
        ) -> None:
            seen.add(done if label == "quantizing" else 0)
            if len(seen) > stop:
                raise KeyboardInterrupt

        limits = Limits(sync_bytes=1)
        with pytest.raises(KeyboardInterrupt):
            prepare(
                GOLDEN / "gemma3_text",
                tmp_path / "cut",
                method="search",
                group_size=32,
                limits=limits,
            ).run(progress=interrupt)
        if stop % 8 == 3:  # each second time it goes on from where it was stopped before
            continue
        prepare(
            GOLDEN / "gemma3_text", tmp_path / "cut", method="search", group_size=32, limits=limits
        ).run()
        assert (tmp_path / "cut" / "model.safetensors").read_bytes() == wanted
        shutil.rmtree(tmp_path / "cut")


def test_without_it_other_bytes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(GOLDEN / "llama3", tmp_path / "one", method="search", group_size=32)
    monkeypatch.setattr(AsymmetricCalibration, "correction", lambda self, path: None)
    convert(GOLDEN / "llama3", tmp_path / "two", method="search", group_size=32)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one != two


def test_ridge_regression_is_damped_more_for_few_tokens_and_refuses_what_is_not_finite() -> None:
    random = np.random.default_rng(0)
    inputs, matrix = random.standard_normal((4000, 32)), random.standard_normal((8, 32))
    fitted = _ridge_regression(inputs, inputs @ matrix.T, None)
    assert (
        fitted is not None and 0.3 < np.vdot(fitted, matrix) / np.vdot(matrix, matrix) < 0.6
    )  # damped by a mean square
    few = _ridge_regression(
        inputs[:16], inputs[:16] @ matrix.T, None
    )  # by way of the pairs of tokens
    assert few is not None and 0 < np.vdot(few, matrix) / np.vdot(matrix, matrix) < 0.2
    moments = inputs[:16].T @ inputs[:16]
    damped = moments + np.eye(32) * np.trace(moments) / 32 * (RIDGE + RIDGE_PER_TOKEN_RATIO * 2)
    assert np.allclose(
        few, np.linalg.solve(damped, inputs[:16].T @ (inputs[:16] @ matrix.T)).T, atol=1e-9
    )
    assert _ridge_regression(inputs, inputs[:, :8] * np.nan, None) is None
    assert _ridge_regression(0 * inputs, inputs[:, :8], None) is None
