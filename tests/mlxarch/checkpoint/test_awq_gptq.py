"""AWQ and GPTQ matrices against their definitions, written as loops over single codes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from codes_by_input import Matrix
from formats import Held
from safetensors.numpy import load_file, save_file

import parity
from mlxarch.checkpoint import lazy_tensor as tensors
from mlxarch.checkpoint.formats import awq_gptq
from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert

KINDS = {
    "awq": lambda: Matrix("awq", (256, 48), 64),
    "awq 128": lambda: Matrix("awq", (256, 48), 128),
    "awq one group": lambda: Matrix("awq", (192, 24), -1),
    "gptq": lambda: Matrix("gptq", (256, 48), 32),
    "gptq sym": lambda: Matrix("gptq", (256, 48), 128, sym=True),
    "gptq 8 bits": lambda: Matrix("gptq", (128, 40), 64, bits=8),
    "gptq 2 bits": lambda: Matrix("gptq", (128, 48), 32, bits=2),
    "gptq of 256": lambda: Matrix("gptq", (512, 16), 256),
    "gptq, a shorter last group": lambda: Matrix("gptq", (320, 16), 128),
    "gptq, a single shorter group": lambda: Matrix("gptq", (64, 16), 128),
}
ODD = {
    "act-order": lambda: Matrix("gptq", (256, 48), 64).in_order_of_activations(),
    "act-order, 8 bits": lambda: Matrix(
        "gptq", (256, 40), 128, bits=8, sym=True
    ).in_order_of_activations(),
    "gptq of 48, a shorter last group": lambda: Matrix("gptq", (64, 16), 48),
    "awq of 16": lambda: Matrix("awq", (128, 24), 16),
    "awq of 40": lambda: Matrix("awq", (80, 24), 40),
}


def v2(matrix: Matrix) -> Matrix:
    matrix.stored_less = 0
    return matrix


KINDS["gptq_v2"] = lambda: v2(Matrix("gptq", (256, 48), 64))


def ranges(rows: int) -> Iterator[tuple[int, int]]:
    yield from [(0, rows), (0, 1), (3, 11), (rows - 1, rows), (7, 8)]


@pytest.mark.parametrize("cache_bytes", [1, 4000, 1 << 24])
@pytest.mark.parametrize("kind", [*KINDS, *ODD])
def test_a_matrix_stands_for_what_its_definition_says(
    kind: str, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awq_gptq, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(awq_gptq, "CHUNK_BYTES", cache_bytes)
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", cache_bytes)
    matrix = (KINDS | ODD)[kind]()
    found, wanted = matrix.tensor(), matrix.values
    assert found.shape == wanted.shape and isinstance(found, QuantizedTensor) == (kind in KINDS)
    for start, stop in ranges(len(wanted)):
        assert np.array_equal(np.array(found.read_rows(start, stop)), wanted[start:stop])
    assert np.array_equal(np.array(found.load()), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_parts_hold_the_codes_and_the_exact_product_of_scale_and_zero(kind: str) -> None:
    matrix = KINDS[kind]()
    found = matrix.tensor()
    assert isinstance(found, QuantizedTensor)
    parts = {name: np.array(part.load()) for name, part in found.components.items()}
    octets = parts["weight"].view(np.uint8)
    shifts = np.arange(0, 8, matrix.bits)
    codes = (octets[..., None] >> shifts & 2**matrix.bits - 1).reshape(len(octets), -1)
    assert np.array_equal(codes, matrix.codes.T)
    groups = matrix.groups[:: len(matrix.codes) // parts["scales"].shape[1]]
    assert np.array_equal(parts["scales"], matrix.scales[groups].T.astype(parts["scales"].dtype))
    product = -matrix.scales.astype(np.float64) * matrix.zeros
    assert np.array_equal(parts["biases"].astype(np.float64), product[groups].T)
    assert parts["biases"].dtype == (np.float16 if matrix.sym else np.float32)
    rounded = product.astype(np.float16).astype(
        np.float64
    )  # negative control: float16 would not hold them
    assert matrix.sym or not np.array_equal(rounded, product)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("awq", {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "version": None}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("gptq_v2", {"checkpoint_format": "gptq"}),
    ],
)
def test_another_account_of_the_same_bytes_would_show(kind: str, wrong: dict[str, Any]) -> None:
    matrix = KINDS[kind]()
    try:
        found = np.array(matrix.tensor(**wrong).load())
    except CheckpointError:
        return  # the shapes of AWQ are others
    assert np.abs(found - matrix.values).max() >= matrix.scales.min()


def test_an_order_of_activations_that_is_ignored_would_show() -> None:
    matrix = ODD["act-order"]()
    with pytest.raises(
        CheckpointError, match=r"tensor m\.weight has inputs in an order of its own.*desc_act"
    ):
        matrix.tensor(desc_act=False).load()
    straight = Matrix("gptq", (256, 48), 64)
    assert not np.allclose(straight.values, matrix.values)


# Whole checkpoints

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


def quantized(kind: str, **settings: Any) -> tuple[parity.Change, parity.Change]:
    """A checkpoint with most projections packed, and the one that it stands for."""

    def matrices(weights: parity.Weights) -> Iterator[tuple[str, Matrix]]:
        for seed, name in enumerate(sorted(n for n in weights if n.split(".")[-2] in PROJECTIONS)):
            matrix = Matrix(
                kind,
                weights[name].shape[::-1],
                settings["group"],
                sym=settings.get("sym", False),
                seed=seed,
            )
            yield name, matrix.in_order_of_activations() if settings.get("act_order") else matrix

    def packed(found: dict[str, Any], weights: parity.Weights) -> None:
        for name, matrix in list(matrices(weights)):
            weights |= matrix.stored(name.removesuffix(".weight"))
            del weights[name]
            found["quantization_config"] = matrix.section

    def wide(found: dict[str, Any], weights: parity.Weights) -> None:
        weights |= {name: matrix.values for name, matrix in matrices(weights)}

    return packed, wide


WHOLE: dict[str, Any] = {
    "awq": dict(kind="awq", group=32),
    "gptq": dict(kind="gptq", group=32, sym=True),
    "act-order": dict(kind="gptq", group=8, act_order=True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_packed_checkpoint_computes_what_its_codes_stand_for(name: str, tmp_path: Path) -> None:
    folders = {}
    for which, change in zip(("packed", "wide"), quantized(**WHOLE[name]), strict=True):
        (tmp_path / which).mkdir()
        folders[which] = parity.copy("llama3", "config.json", tmp_path / which, change)
    ids = mx.array(parity.reference("llama3")["input_ids"])

    def logits(folder: Path) -> np.ndarray:
        return np.array(load_model(folder, dtype="float32")[0](ids))

    wanted = logits(folders["wide"])
    assert np.abs(logits(folders["packed"]) - wanted).max() <= 1e-4
    assert np.abs(wanted - parity.reference("llama3")["logits"]).max() >= 1
    summary = convert(folders["packed"], tmp_path / "copy", bits=None)
    assert np.array_equal(logits(tmp_path / "copy"), logits(folders["packed"]))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    packed, held = (
        f"packed by {WHOLE[name]['kind']}",
        "which MLX's packing holds without loss, scales and biases in",
    )
    told = {
        "awq": f"{packed}, 4 bits, {held} float32",
        "gptq": f"{packed}, 4 bits, {held} float16",
        "act-order": f"{packed} with the order of activations, which MLX's packing cannot hold: unpacked to float32",
    }
    assert summary.notes == [f"12 matrices {told[name]}"]
    assert ("quantization" in config) == (name != "act-order") and "quant_method" not in str(config)
    # quantized again only when that is asked for, and from what the codes stand for
    for bits in (8, 3):
        settings: Any = dict(
            bits=bits, group_size=32, dtype="float32", method="search" if bits == 3 else "round"
        )
        outputs = [
            convert(folder, tmp_path / f"{which}-{bits}", **settings).output
            for which, folder in folders.items()
        ]
        one, two = (load_file(output / "model.safetensors") for output in outputs)
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_the_bits_that_it_has_are_kept_without_a_word(tmp_path: Path) -> None:
    folder = parity.copy("llama3", "config.json", tmp_path, quantized(**WHOLE["awq"])[0])
    convert(folder, tmp_path / "same", bits=4, group_size=32, method="round")
    source, copy = open_checkpoint(folder).tensors, open_checkpoint(tmp_path / "same").tensors
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = source[name], copy[name]
    assert (
        isinstance(before, QuantizedTensor)
        and isinstance(after, QuantizedTensor)
        and after.quantization == Quantization(4, 32)
    )
    assert all(
        np.array_equal(np.array(before.components[p].load()), np.array(after.components[p].load()))
        for p in before.components
    )


# What is refused


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("awq", {"bits": 8}, "bits 8"),
        ("awq", {"bits": True}, "bits True"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"version": ["gemm"]}, r"version \['gemm'\]"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"group_size": 0}, "group_size 0"),
        ("awq", {"group_size": "128"}, "group_size '128'"),
        ("awq", {"group_size": 1 << 40}, "group_size"),
        ("gptq", {"bits": 3}, "bits 3"),
        ("gptq", {"bits": 4.0}, r"bits 4\.0"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format True"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ("gptq", {"desc_act": "yes"}, "desc_act 'yes'"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(
    kind: str, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"packed by '{kind}' with .*{named}"):
        KINDS[kind]().tensor(**settings)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found[:, :-1],
        lambda found: found[:-1],
        lambda found: found[:0],
        lambda found: found[:, :0],
        lambda found: found[0],
        lambda found: found[None],
        lambda found: found[0, 0],
        lambda found: found.astype(np.int64),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(kind: str, part: str, damage: Any) -> None:
    stored = KINDS[kind]().stored()
    stored[f"m.{part}"] = np.ascontiguousarray(damage(stored[f"m.{part}"]))
    held = {name: Held(array) for name, array in stored.items()}
    with pytest.raises(
        CheckpointError, match=r"tensor m\.weight: with 4 bits in groups of .* must fit together"
    ):
        convert_to_mlx(held, {"quantization_config": KINDS[kind]().section})


@pytest.mark.parametrize("group", [7 + 1, 24, 96, 257])
def test_a_group_size_that_is_not_the_files_is_refused(group: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"tensor m\.weight: with 4 bits in groups of {group}"
    ):
        KINDS["awq"]().tensor(group_size=group)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    matrix = ODD["act-order"]()
    stored = {name: Held(array) for name, array in matrix.stored().items() if name != f"m.{part}"}
    with pytest.raises(CheckpointError, match=rf"has no m\.{part} beside it"):
        convert_to_mlx(stored, {"quantization_config": matrix.section})


def test_a_matrix_that_is_there_twice_is_refused() -> None:
    matrix = KINDS["awq"]()
    stored = {name: Held(array) for name, array in matrix.stored().items()} | {
        "m.weight": Held(matrix.values)
    }
    with pytest.raises(CheckpointError, match=r"m\.qweight and m\.weight cannot both be there"):
        convert_to_mlx(stored, {"quantization_config": matrix.section})


@pytest.mark.parametrize("group", [-1, 4, 2**31 - 1])
def test_inputs_of_a_group_that_is_not_there_are_refused(group: int) -> None:
    matrix = ODD["act-order"]()
    matrix.groups[17] = group
    with pytest.raises(
        CheckpointError, match=r"tensor m\.weight has inputs of a group that is none of its 4"
    ):
        matrix.tensor().load()


def test_a_zero_point_that_is_off_the_middle_is_no_symmetric_one() -> None:
    matrix = KINDS["gptq sym"]()
    matrix.zeros[1, 5] = 7
    with pytest.raises(
        CheckpointError, match=r"tensor m\.weight has a zero point that is not 8.*sym"
    ):
        matrix.tensor().load()


def test_a_file_is_read_in_blocks_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = Matrix("awq", (512, 256), 128)
    save_file(matrix.stored(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": matrix.section}))
    monkeypatch.setattr(awq_gptq, "CACHE_BYTES", 10_000)
    found, largest = open_checkpoint(tmp_path).tensors["m.weight"], 0
    read = tensors.SafetensorsTensor.read_columns

    def watched(self: Any, start: int, stop: int) -> mx.array:
        nonlocal largest
        out = read(self, start, stop)
        largest = max(largest, out.nbytes)
        return out

    monkeypatch.setattr(tensors.SafetensorsTensor, "read_columns", watched)
    rows = np.concatenate(
        [np.array(found.read_rows(start, start + 8)) for start in range(0, 256, 8)]
    )
    assert np.array_equal(rows, matrix.values) and 2_000 <= largest <= 10_000
