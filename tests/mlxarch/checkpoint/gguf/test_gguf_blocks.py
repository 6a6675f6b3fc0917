"""Every block type of ggml: read by pieces, repacked without loss where MLX packs alike, else unpacked."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_gguf import HIDDEN, WIDE, K, by_package, weights, write

from mlxarch.checkpoint.gguf.blocks import LOSSLESS_LAYOUTS
from mlxarch.checkpoint.gguf.header import BLOCK_SIZES
from mlxarch.checkpoint.gguf.source import open_gguf
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import CheckpointError
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert

DOWN, OURS = "blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"
TYPES = [K(number).name for number in BLOCK_SIZES if K(number).name not in ("F32", "F16", "BF16")]
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "MXFP4": 4}


def blocks(kind: str, seed: int = 0) -> np.ndarray:
    """Rows (HIDDEN, bytes of WIDE values) of random blocks whose values are of ordinary size."""
    values, nbytes = BLOCK_SIZES[K[kind]]
    wanted, found = HIDDEN * WIDE // values, np.zeros((0, nbytes), np.uint8)
    draw = np.random.default_rng(seed)
    while len(found) < wanted:
        drawn = draw.integers(0, 256, (4 * wanted, nbytes), np.uint8)
        if kind == "MXFP4":
            drawn[:, 0] = draw.integers(110, 135, len(drawn))
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.dequantize(drawn, K[kind])).max(-1)
        found = np.concatenate([found, drawn[(largest > 1e-3) & (largest < 1e3)]])
    return found[:wanted].reshape(HIDDEN, -1)


def file(path: Path, kind: str) -> Path:
    return write(path / f"{kind}.gguf", weights() | {DOWN: blocks(kind)}, {DOWN: K[kind]})


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_has_the_values_that_the_package_gives_by_pieces_and_whole(
    kind: str, tmp_path: Path
) -> None:
    path = file(tmp_path, kind)
    source, expected = open_gguf(path), by_package(path)[DOWN]
    tensor = source.tensors[OURS]
    assert isinstance(tensor, QuantizedTensor) == (kind in BITS) == (kind in LOSSLESS_LAYOUTS)
    assert np.array_equal(np.array(tensor.load()), expected)
    pieces = [np.array(tensor.read_rows(a, b)) for a, b in ((0, 1), (1, 60), (60, HIDDEN))]
    assert np.array_equal(np.concatenate(pieces), expected)
    became = (
        "which MLX's packing holds without loss"
        if kind in BITS
        else "which MLX's packing cannot hold: unpacked to float32"
    )
    assert len(source.notes) == 1 and source.notes[0].startswith(f"1 matrices stored as {kind}")
    assert became in source.notes[0]


@pytest.mark.parametrize("kind", BITS)
def test_what_is_repacked_is_what_mlx_computes_from(kind: str, tmp_path: Path) -> None:
    path = file(tmp_path, kind)
    summary = convert(open_gguf(path), tmp_path / "copy", bits=None)
    found, name = load_file(summary.output / "model.safetensors"), OURS.removesuffix(".weight")
    parts = [
        mx.array(found[f"{name}.{part}"])
        for part in ("weight", "scales", "biases")
        if f"{name}.{part}" in found
    ]
    settings = Quantization(BITS[kind], 32, "mxfp4" if kind == "MXFP4" else "affine")
    wide = [part.astype(mx.float32) if part.dtype == mx.float16 else part for part in parts]
    biases = wide[2] if len(wide) > 2 else None
    values = np.array(settings.dequantize(wide[0], wide[1], biases, mx.float32))
    expected = by_package(path)[DOWN]
    assert np.array_equal(values, expected)
    kept = {"Q4_K": mx.float32, "Q5_K": mx.float32, "MXFP4": mx.uint8}
    assert parts[1].dtype == kept.get(kind, mx.float16)
    if kind in ("Q4_K", "Q5_K"):  # negative control: float16 would not hold the products
        narrow = [part.astype(mx.float16).astype(mx.float32) for part in wide[1:]]
        assert not np.array_equal(
            np.array(settings.dequantize(wide[0], narrow[0], narrow[1], mx.float32)), expected
        )


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q3_K"])
def test_a_type_is_quantized_again_when_bits_are_asked_for(kind: str, tmp_path: Path) -> None:
    path, errors = file(tmp_path, kind), {}
    expected = by_package(path)[DOWN]
    for bits in (3, 8):
        settings: Any = {
            "bits": bits,
            "group_size": 64,
            "method": "search" if kind == "Q4_K" else "round",
        }
        output = convert(open_gguf(path), tmp_path / f"{bits}", dtype="float32", **settings).output
        found, name = load_file(output / "model.safetensors"), OURS.removesuffix(".weight")
        parts = [mx.array(found[f"{name}.{part}"]) for part in ("weight", "scales", "biases")]
        values = Quantization(bits, 64).dequantize(parts[0], parts[1], parts[2], mx.float32)
        errors[bits] = np.abs(np.array(values) - expected).mean() / np.abs(expected).mean()
    assert errors[8] < 0.02 < errors[3]


@pytest.mark.parametrize("kind", [kind for kind in BITS if kind != "MXFP4"])
def test_a_scale_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    data = blocks(kind)
    data[7, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_down\.weight' has a scale of inf"):
        open_gguf(write(tmp_path / "m.gguf", weights() | {DOWN: data}, {DOWN: K[kind]}))


def test_an_exponent_that_is_no_number_is_refused(tmp_path: Path) -> None:
    data = blocks("MXFP4")
    data[7, 0] = 255
    path = write(tmp_path / "m.gguf", weights() | {DOWN: data}, {DOWN: K.MXFP4})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight has a scale that is NaN"):
        open_gguf(path).tensors[OURS].load()
