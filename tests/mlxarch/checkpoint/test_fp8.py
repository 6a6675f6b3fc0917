"""float8 with a scale for every row, for a whole matrix or for blocks: compressed-tensors and FBGEMM."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from formats import Held, e4m3
from safetensors.numpy import load_file

import parity
from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.quantize import convert

WEIGHTS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
UP = "model.layers.1.feed_forward.experts.2.up_proj.weight"


def section(**settings: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | settings, "input_activations": ACTIVATIONS}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


def codes_of(values: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes, and a scale for every row (axis 1) or for all."""
    scale = np.abs(values).max(axis, keepdims=axis is not None) / 448
    table = np.nan_to_num(e4m3(), nan=np.inf)
    return np.abs((values / scale)[..., None] - table).argmin(-1).astype(np.uint8), np.asarray(
        scale, np.float32
    )


def each_expert(weights: parity.Weights) -> None:
    """Experts for themselves, (out, in), as the float8 files have them."""
    for name in [name for name in weights if ".experts." in name]:
        stack = weights.pop(name)
        for expert, matrix in enumerate(stack):
            base, kind = name.rsplit(".", 1)
            parts = np.split(matrix.T, 2) if kind == "gate_up_proj" else [matrix.T]
            kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
            weights |= {
                f"{base}.{expert}.{k}.weight": p.copy() for k, p in zip(kinds, parts, strict=True)
            }


def as_float8(quantization: dict[str, Any], axis: int | None) -> parity.Change:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        each_expert(weights)
        found["quantization_config"] = quantization
        for name in [name for name in weights if ".experts." in name]:
            weights[name], weights[f"{name}_scale"] = codes_of(weights[name], axis)
            weights[f"{name.removesuffix('.weight')}.input_scale"] = np.ones(1, np.float32)

    return change


def as_it_stands_for(axis: int | None) -> parity.Change:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        each_expert(weights)
        for name in [name for name in weights if ".experts." in name]:
            codes, scale = codes_of(weights[name], axis)
            weights[name] = (e4m3()[codes] * scale).astype(np.float32)

    return change


KINDS = {
    "channel": (section(), 1),
    "tensor": (section(strategy="tensor"), None),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_4_in_float8_computes_what_its_bytes_stand_for(kind: str, tmp_path: Path) -> None:
    quantization, axis = KINDS[kind]
    ids, logits = mx.array(parity.reference("llama4_scout")["input_ids"]), {}
    for name, change in {
        "float8": as_float8(quantization, axis),
        "wide": as_it_stands_for(axis),
    }.items():
        (tmp_path / name).mkdir()
        folder = parity.copy("llama4_scout", "config.json", tmp_path / name, change)
        logits[name] = np.array(load_model(folder, dtype="float32")[0](ids))
        convert(folder, tmp_path / f"{name}-8", bits=8, group_size=32, method="round")
    assert np.abs(logits["float8"] - logits["wide"]).max() <= 1e-5
    assert (
        np.abs(logits["wide"] - parity.reference("llama4_scout")["logits"]).max()
        >= 3 * parity.TOLERANCE
    )
    one, other = (
        load_file(tmp_path / f"{name}-8" / "model.safetensors") for name in ("float8", "wide")
    )
    assert one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


def test_blocks_are_those_of_128() -> None:
    codes = np.arange(200 * 150, dtype=np.uint32).reshape(200, 150).astype(np.uint8) % 127
    scale = np.array([[1, 2], [3, 4]], np.float32)
    stored = {"a.weight": Held(codes), "a.weight_scale": Held(scale)}
    found = convert_to_mlx(
        stored, {"quantization_config": section(strategy="block", block_structure=[128, 128])}
    )
    wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:200, :150]
    assert np.array_equal(
        np.array(found["a.weight"].load()), (e4m3()[codes] * wide).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (np.zeros((4, 6), np.uint8), np.ones((4, 2), np.float32)),
        (np.zeros((4, 6), np.uint8), np.ones(4, np.float32)),
        (np.zeros((4, 6), np.uint8), np.ones((4, 1), np.int32)),
        (np.zeros((4, 6), np.float32), np.ones((4, 1), np.float32)),
        (np.zeros((2, 4, 6), np.uint8), np.ones((2, 3, 1), np.float32)),
        (np.zeros((2, 4, 6), np.uint8), np.ones(2, np.float32)),
        (np.zeros(6, np.uint8), np.ones((6, 1), np.float32)),
        (np.zeros((0, 6), np.uint8), np.ones((4, 1), np.float32)),
    ],
)
def test_scales_that_do_not_fit_are_refused(weight: np.ndarray, scale: np.ndarray) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor a\.weight: a float8 matrix has a float scale for each block"
    ):
        convert_to_mlx(
            {"a.weight": Held(weight), "a.weight_scale": Held(scale)},
            {"quantization_config": section()},
        )


def test_a_scale_alone_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"a\.weight_scale has no a\.weight beside it"):
        convert_to_mlx(
            {"a.weight_scale": Held(np.ones((4, 1), np.float32))},
            {"quantization_config": section()},
        )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_bits": 4}, "num_bits 4"),
        ({"strategy": "group"}, "strategy 'group'"),
        ({"strategy": "block", "block_structure": [64]}, r"block_structure .* \[64\]"),
        ({"strategy": "block", "block_structure": [64, 0]}, r"block_structure .* \[64, 0\]"),
        ({"type": "int"}, "type 'int'"),
    ],
)
def test_other_float8_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        convert_to_mlx({}, {"quantization_config": section(**settings)})


# Method fp8: blocks of any size, and one scale for a matrix, as Ministral 3 and AutoFP8 store it


def wide(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = block
    repeated = np.repeat(np.repeat(scale, rows, -2), columns, -1)
    return repeated[..., : shape[-2], : shape[-1]]


@pytest.mark.parametrize("block", [(64, 64), (1, 128), (128, 1), (32, 100), (500, 500)])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_blocks_of_any_size_have_their_scales(block: tuple[int, int], stack: tuple[int]) -> None:
    draw, shape = np.random.default_rng(0), (*stack, 200, 150)
    codes = draw.integers(0, 127, shape).astype(np.uint8)
    blocks = [-(-size // length) for size, length in zip(shape[-2:], block, strict=True)]
    scale = draw.uniform(0.5, 2, (*stack, *blocks)).astype(np.float32)
    stored = {"a.weight": Held(codes), "a.weight_scale_inv": Held(scale)}
    section = {"quant_method": "fp8", "weight_block_size": list(block)}
    found = convert_to_mlx(stored, {"quantization_config": section})["a.weight"]
    wanted = (e4m3()[codes] * wide(scale, block, shape)).astype(np.float32)
    assert found.shape == shape and np.array_equal(np.array(found.load()), wanted)
    rows = wanted.reshape(-1, 150)
    for start, stop in [(0, 1), (63, 66), (199, len(rows)), (0, len(rows))]:
        assert np.array_equal(np.array(found.read_rows(start, stop)), rows[start:stop])


@pytest.mark.parametrize(
    "names", [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("settings", [{}, {"weight_block_size": None}])
def test_a_matrix_may_have_a_single_scale(
    names: tuple[str, str], shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    codes = np.arange(200 * 150).reshape(200, 150).astype(np.uint8) % 127
    stored = {
        "a.weight": Held(codes),
        f"a.{names[0]}": Held(np.full(shape, 0.25, np.float32)),
        f"a.{names[1]}": Held(np.full(shape, 9, np.float32)),
        "norm.weight": Held(np.ones(3, np.float32)),
    }
    section = {"quant_method": "fp8", "activation_scheme": "static"} | settings
    found = convert_to_mlx(stored, {"quantization_config": section})
    assert found.keys() == {"a.weight", "norm.weight"}
    assert np.array_equal(
        np.array(found["a.weight"].load()), (e4m3()[codes] * 0.25).astype(np.float32)
    )


def test_a_section_that_is_no_table_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="quantization_config must be a table.*found 'gptq'"):
        convert_to_mlx({}, {"quantization_config": "gptq"})
