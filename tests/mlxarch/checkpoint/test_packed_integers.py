"""compressed-tensors' integers with zero points, and with one scale for a row."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from formats import Held

from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import CheckpointError

Stored = dict[str, np.ndarray]


def section(bits: int, symmetric: bool, group: int | None, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "dynamic": False,
    }
    weights |= {"strategy": "group" if group else "channel"} | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Neighbours on the last axis in 32 bits, the first in the lowest; missing ones are 0."""
    each = 32 // bits
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % each)]).reshape(len(codes), -1, each)
    found = np.bitwise_or.reduce(
        codes.astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32), axis=-1
    )
    return found.view(np.int32)


def made(
    bits: int, symmetric: bool, group: int | None, outputs: int = 40
) -> tuple[Stored, np.ndarray]:
    """Tensors of a random matrix (outputs, 256), and what it stands for, code by code."""
    draw, inputs = np.random.default_rng(bits), 256
    size = group or inputs
    codes = draw.integers(0, 2**bits, (outputs, inputs))
    zeros = draw.integers(0, 2**bits, (outputs, inputs // size))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = draw.uniform(0.001, 0.1, zeros.shape).astype(np.float16)
    values = np.zeros(codes.shape)
    for o in range(outputs):
        for i in range(inputs):
            values[o, i] = (codes[o, i] - zeros[o, i // size]) * np.float64(scales[o, i // size])
    stored = {"a.weight_packed": words(codes, bits), "a.weight_scale": scales}
    stored["a.weight_shape"] = np.array(codes.shape, np.int64)
    if not symmetric:
        stored["a.weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    return stored, values.astype(np.float32)


def read(stored: Stored, settings: dict[str, Any]) -> QuantizedTensor:
    held = {name: Held(array) for name, array in stored.items()}
    found = convert_to_mlx(held, {"quantization_config": settings})
    assert list(found) == ["a.weight"]
    tensor = found["a.weight"]
    assert isinstance(tensor, QuantizedTensor)
    return tensor


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "stored_in"), [(32, 32), (128, 128), (None, 128)])
@pytest.mark.parametrize("outputs", [40, 37])
def test_integers_stand_for_the_same_numbers(
    bits: int, symmetric: bool, group: int | None, stored_in: int, outputs: int
) -> None:
    stored, wanted = made(bits, symmetric, group, outputs)
    found = read(stored, section(bits, symmetric, group))
    assert (found.quantization.bits, found.quantization.group_size) == (bits, stored_in)
    assert np.array_equal(np.array(found.load()), wanted)
    for start, stop in ((0, 1), (3, 12), (outputs - 1, outputs)):
        assert np.array_equal(np.array(found.read_rows(start, stop)), wanted[start:stop])
    kept = found.components["scales"].load().dtype, found.components["biases"].load().dtype
    assert kept == ((mx.float16,) * 2 if symmetric else (mx.float32,) * 2)


def test_a_static_order_of_activations_changes_nothing() -> None:
    stored, wanted = made(4, False, 64)
    assert np.array_equal(
        np.array(read(stored, section(4, False, 64, actorder="static")).load()), wanted
    )


def test_zero_points_that_are_left_out_would_show() -> None:
    stored, wanted = made(4, False, 64)
    del stored["a.weight_zero_point"]
    middle = np.array(read(stored, section(4, True, 64)).load())
    assert np.abs(middle - wanted).max() > 0.01


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found[:-1],
        lambda found: found[:, :-1],
        lambda found: found.astype(np.int64),
        lambda found: found[0],
        lambda found: found[:0],
    ],
)
def test_zero_points_that_do_not_fit_are_refused_by_name(damage: Any) -> None:
    stored, _ = made(4, False, 64)
    stored["a.weight_zero_point"] = np.ascontiguousarray(damage(stored["a.weight_zero_point"]))
    with pytest.raises(
        CheckpointError, match=r"tensor a\.weight_zero_point: zero points of 4 bits must be int32"
    ):
        read(stored, section(4, False, 64))


@pytest.mark.parametrize("part", ["packed", "scale", "shape", "zero_point"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    stored, _ = made(4, False, 64)
    del stored[f"a.weight_{part}"]
    with pytest.raises(CheckpointError, match=rf"has no a\.weight_{part} beside it"):
        read(stored, section(4, False, 64))


def test_scales_of_another_group_are_refused() -> None:
    stored, _ = made(4, False, 64)
    with pytest.raises(CheckpointError, match=r"tensor a\.weight: with 4 bits, groups of 128"):
        read(stored, section(4, False, 128))
    with pytest.raises(CheckpointError, match=r"tensor a\.weight: with 4 bits, groups of 128"):
        read(stored, section(4, False, None))
