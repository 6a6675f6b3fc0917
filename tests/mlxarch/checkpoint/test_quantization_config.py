"""Number formats of other makers, against their definitions written in NumPy."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from formats import Held, e4m3, fp8_of, of_fp8
from safetensors.numpy import load_file

import parity
from mlxarch.checkpoint.formats.fp8_mxfp4 import Fp8BlockTensor
from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert


def logits(name: str, change: parity.Change, folder: Path) -> np.ndarray:
    folder.mkdir()
    model, _ = load_model(parity.copy(name, "config.json", folder, change), dtype="float32")
    return np.array(model(mx.array(parity.reference(name)["input_ids"])))


def test_every_byte_of_a_float8_matrix_has_the_value_of_the_format() -> None:
    tensor = Fp8BlockTensor(
        "w", Held(np.arange(256, dtype=np.uint8).reshape(2, 128)), Held(np.ones((1, 1), np.float32))
    )
    assert np.array_equal(
        np.array(tensor.load()).ravel(), e4m3().astype(np.float32), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(300, 200), (128, 256), (1, 129), (130, 5)])
def test_a_float8_matrix_is_read_by_rows_with_the_scale_of_each_block(
    shape: tuple[int, int],
) -> None:
    source = np.random.default_rng(1)
    blocks = [-(-size // 128) for size in shape]
    codes, scales = (
        source.integers(0, 127, shape).astype(np.uint8),
        source.uniform(0.5, 2, blocks).astype(np.float32),
    )
    tensor, wanted = Fp8BlockTensor("w", Held(codes), Held(scales)), of_fp8(codes, scales)
    assert tensor.shape == shape and tensor.dtype == mx.float32
    assert np.array_equal(np.array(tensor.load()), wanted)
    for start, stop in [(0, 1), (0, 128), (127, 130), (129, 290), (shape[0] - 1, shape[0])]:
        if stop <= shape[0]:
            assert np.array_equal(np.array(tensor.read_rows(start, stop)), wanted[start:stop])
    turned = Fp8BlockTensor("w", Held(codes), Held(scales[::-1, ::-1].copy()))  # negative control
    assert blocks == [1, 1] or not np.array_equal(np.array(turned.load()), wanted)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (np.zeros((300, 200), np.uint8), np.ones((2, 2), np.float32)),
        (np.zeros((300, 200), np.uint8), np.ones((3, 2), np.int32)),
        (np.zeros((300, 200), np.uint8), np.ones((3, 2, 1), np.float32)),
        (np.zeros((300, 200), np.float32), np.ones((3, 2), np.float32)),
        (np.zeros(300, np.uint8), np.ones(3, np.float32)),
        (np.zeros((3, 30, 20), np.uint8), np.ones((1, 1, 1), np.float32)),
    ],
)
def test_float8_codes_and_scales_that_do_not_fit_are_refused(
    weight: np.ndarray, scale: np.ndarray
) -> None:
    with pytest.raises(
        CheckpointError, match="tensor w: a float8 matrix has a float scale for each block"
    ):
        Fp8BlockTensor("w", Held(weight), Held(scale))


def test_float8_scales_without_a_weight_are_refused() -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv has no a\.weight beside it"):
        convert_to_mlx({"a.weight_scale_inv": Held(np.ones((1, 1), np.float32))}, config)


def as_fp8(found: dict[str, Any], weights: parity.Weights) -> None:
    """As DeepSeek publishes it: all matrices but embedding, head and routers."""
    found["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    for name in [
        name for name in weights if name.endswith("_proj.weight") and "layers.2" not in name
    ]:
        weights[name], weights[f"{name}_scale_inv"] = fp8_of(weights[name])


def as_fp8_stands_for(found: dict[str, Any], weights: parity.Weights) -> None:
    for name in [
        name for name in weights if name.endswith("_proj.weight") and "layers.2" not in name
    ]:
        weights[name] = of_fp8(*fp8_of(weights[name]))


def test_a_float8_checkpoint_computes_what_its_bytes_stand_for(tmp_path: Path) -> None:
    found = logits("deepseek_v3", as_fp8, tmp_path / "fp8")
    assert np.abs(found - logits("deepseek_v3", as_fp8_stands_for, tmp_path / "wide")).max() <= 1e-6
    assert (
        np.abs(found - parity.reference("deepseek_v3")["logits"]).max() >= 3 * parity.TOLERANCE
    )  # it is not nothing


def test_a_float8_file_is_quantized_from_float32(tmp_path: Path) -> None:
    for name, change in {"fp8": as_fp8, "wide": as_fp8_stands_for}.items():
        (tmp_path / name).mkdir()
        source = parity.copy("deepseek_v3", "config.json", tmp_path / name, change)
        convert(source, tmp_path / f"{name}-8", bits=8, group_size=32)
    one, other = (
        load_file(tmp_path / f"{name}-8" / "model.safetensors") for name in ("fp8", "wide")
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    config = json.loads((tmp_path / "fp8-8" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 8


# compressed-tensors, pack-quantized: a code stands for (code - 2^(bits - 1)) * scale, the first in the lowest bits

GROUP = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
}
SECTION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": GROUP, "input_activations": None}
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def section(**settings: Any) -> dict[str, Any]:
    group = SECTION["config_groups"]["group_0"]
    return SECTION | {"config_groups": {"group_0": group | {"weights": GROUP | settings}}}


def integers_of(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed integers, and scales in float16 for groups of 32."""
    groups = values.reshape(len(values), -1, 32)
    scales = (np.abs(groups).max(-1) / (2 ** (bits - 1) - 1)).astype(np.float16)
    lowest = -(2 ** (bits - 1))
    integers = np.clip(np.round(groups / scales[..., None].astype(np.float32)), lowest, -lowest - 1)
    integers[:, 0, 0] = lowest  # symmetric formats have it too
    return integers.reshape(values.shape).astype(np.int64), scales


def as_integers(bits: int) -> parity.Change:
    """As Moonshot publishes it: experts in integers, here those whose rows hold whole groups."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        found["quantization_config"] = section(num_bits=bits)
        for name in [name for name in weights if ".experts." in name and "down_proj" not in name]:
            integers, scales = integers_of(weights.pop(name), bits)
            codes = (
                (integers + 2 ** (bits - 1))
                .astype(np.uint32)
                .reshape(len(integers), -1, 32 // bits)
            )
            words = (codes << (np.arange(32 // bits, dtype=np.uint32) * bits)).sum(
                -1, dtype=np.uint32
            )
            weights[f"{name}_packed"], weights[f"{name}_scale"] = words.view(np.int32), scales
            weights[f"{name}_shape"] = np.array(integers.shape, np.int64)

    return change


def as_integers_stand_for(bits: int) -> parity.Change:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        for name in [name for name in weights if ".experts." in name and "down_proj" not in name]:
            integers, scales = integers_of(weights[name], bits)
            weights[name] = (integers * np.repeat(scales.astype(np.float64), 32, axis=1)).astype(
                np.float32
            )

    return change


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stay_packed_and_stand_for_the_same_numbers(bits: int, tmp_path: Path) -> None:
    found = logits("kimi_k2", as_integers(bits), tmp_path / "packed")
    wanted = logits("kimi_k2", as_integers_stand_for(bits), tmp_path / "wide")
    assert np.abs(found - wanted).max() <= parity.TOLERANCE
    assert np.abs(found - parity.reference("kimi_k2")["logits"]).max() >= 3 * parity.TOLERANCE
    folder, wide = (
        tmp_path / "packed" / "model",
        load_file(tmp_path / "wide" / "model" / "model.safetensors"),
    )
    tensor = open_checkpoint(folder).tensors[EXPERT]
    assert isinstance(tensor, QuantizedTensor) and tensor.quantization == Quantization(bits, 32)
    assert np.array_equal(np.array(tensor.load()), wide[EXPERT])
    model, _ = load_model(folder, dtype="float32")
    experts: Any = model.model["layers"][1].mlp.switch_mlp
    assert (
        experts.up_proj.quantization == Quantization(bits, 32)
        and experts.down_proj.quantization is None
    )


@pytest.mark.parametrize("bits", [None, 4])
def test_a_copy_of_integers_holds_their_codes(bits: int | None, tmp_path: Path) -> None:
    source = parity.copy("kimi_k2", "config.json", tmp_path, as_integers(4))
    convert(source, tmp_path / "copy", bits=bits, group_size=32, method="round")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    name = "model.layers.1.mlp.switch_mlp.up_proj"
    scales = before[f"{EXPERT}_scale"]
    assert np.array_equal(after[f"{name}.weight"][3], before[f"{EXPERT}_packed"].view(np.uint32))
    assert np.array_equal(after[f"{name}.scales"][3], scales)
    assert np.array_equal(after[f"{name}.biases"][3], scales * -8)
    model, config = load_model(tmp_path / "copy", dtype="float32")
    assert "quant_method" not in config["quantization_config"]
    if bits is None:
        ids = mx.array(parity.reference("kimi_k2")["input_ids"])
        assert np.array_equal(
            np.array(model(ids)), np.array(load_model(source, dtype="float32")[0](ids))
        )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (section(num_bits=3), "num_bits 3"),
        (section(num_bits=4.0), r"num_bits 4\.0"),
        (section(symmetric=1), "symmetric 1"),
        (section(symmetric=None), "symmetric None"),
        (section(strategy="block"), "strategy 'block'"),
        (section(group_size=None), "group_size None"),
        (section(group_size=16), "group_size 16"),
        (section(type="float"), "type 'float'"),
        (section(actorder="group"), "actorder 'group'"),
        (section(dynamic=True), "dynamic True"),
        (SECTION | {"format": "marlin-24"}, "format 'marlin-24'"),
        (SECTION | {"format": "float-quantized"}, "type 'int', num_bits 4, strategy 'group'"),
        (SECTION | {"config_groups": None}, "num_bits None"),
        (SECTION | {"config_groups": {"a": 5, "b": {"weights": [1]}}}, "num_bits None"),
        (
            SECTION
            | {
                "config_groups": {
                    "a": {"weights": GROUP},
                    "b": {"weights": GROUP | {"num_bits": 8}},
                }
            },
            "several",
        ),
        (
            SECTION
            | {"config_groups": {"a": {"weights": GROUP, "input_activations": {"num_bits": 8}}}},
            "input_activ",
        ),
    ],
)
def test_other_kinds_of_compressed_tensors_are_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    convert_to_mlx({}, {"quantization_config": SECTION})
    with pytest.raises(ConfigError, match=f"packed by 'compressed-tensors' with .*{named}"):
        convert_to_mlx({}, {"quantization_config": settings})


@pytest.mark.parametrize("method", [["gptq"], {"awq": 4}, 4, True, 0.5])
def test_a_method_that_is_no_name_is_refused(method: Any) -> None:
    with pytest.raises(ConfigError, match="which mlxarch does not read"):
        convert_to_mlx({}, {"quantization_config": {"quant_method": method}})


@pytest.mark.parametrize("part", ["packed", "scale", "shape"])
def test_a_part_of_a_packed_tensor_that_is_missing_is_named(part: str, tmp_path: Path) -> None:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        as_integers(4)(found, weights)
        del weights[f"{EXPERT}_{part}"]

    with pytest.raises(
        CheckpointError, match=rf"has no .*experts\.3\.up_proj\.weight_{part} beside it"
    ):
        open_checkpoint(parity.copy("kimi_k2", "config.json", tmp_path, change))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("packed", lambda found: found[:, :-1].copy()),
        ("packed", lambda found: found[:-1].copy()),
        ("packed", lambda found: found.astype(np.int64)),
        ("packed", lambda found: found.view(np.float32)),
        ("packed", lambda found: found[0, 0]),
        ("scale", lambda found: found[:, :0].copy()),
        ("scale", lambda found: found.astype(np.int16)),
        ("scale", lambda found: found[0, 0]),
    ],
)
def test_damaged_parts_do_not_reach_mlx(part: str, damage: Any, tmp_path: Path) -> None:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        as_integers(4)(found, weights)
        weights[f"{EXPERT}_{part}"] = np.asarray(damage(weights[f"{EXPERT}_{part}"]))

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.(experts\.3|switch_mlp)\.up_proj"):
        load_model(parity.copy("kimi_k2", "config.json", tmp_path, change))


@pytest.mark.parametrize("ending", ["qweight", "weight_packed", "weight_scale", "weight_scale_inv"])
def test_packed_tensors_without_settings_ask_for_them(ending: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"x\.{ending} is packed as .* has no quantization_config"
    ):
        convert_to_mlx({f"x.{ending}": Held(np.ones((2, 2), np.float32))}, {})
