"""Output format of each tensor, and its place in the output files."""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlxarch.checkpoint.layout import OutputLayout, plan_layout
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.quantization.scheme import Quantization

FOUR = Quantization(4, 64)


class Shape(LazyTensor):
    """A tensor that nobody may read."""

    def __init__(self, *shape: int, dtype: mx.Dtype = mx.bfloat16) -> None:
        self.shape, self.dtype = shape, dtype

    def read_rows(self, start: int, stop: int) -> mx.array:
        raise AssertionError("a plan reads no weights")


def packed(rows: int, columns: int, settings: Quantization) -> QuantizedTensor:
    per_group = settings.scales_shape((rows, columns))
    affine = settings.mode == "affine"
    parts = {
        "weight": Shape(*settings.packed_shape((rows, columns)), dtype=mx.uint32),
        "scales": Shape(*per_group, dtype=mx.float16 if affine else mx.uint8),
    }
    if affine:
        parts["biases"] = Shape(*per_group, dtype=mx.float16)
    return QuantizedTensor("m.weight", parts, settings)


def plan_of(
    parameters: Mapping[str, LazyTensor],
    wanted: Quantization | None = FOUR,
    dtype: mx.Dtype | None = None,
    shard: int = 10**9,
) -> OutputLayout:
    return plan_layout(
        parameters,
        [name for name, t in parameters.items() if len(t.shape) > 1],
        wanted,
        dtype,
        shard,
    )


def write(plan: OutputLayout, folder: Path) -> None:
    for shard in plan.shards:
        (folder / shard.file).write_bytes(shard.header + bytes(shard.size - len(shard.header)))


def test_the_headers_are_safetensors_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    parameters = {
        "a.weight": Shape(3, 64),
        "odd": Shape(3),
        "b.weight": Shape(5, 2, 96),
        "c": Shape(1, dtype=mx.float32),
    }
    plan = plan_of(parameters)
    write(plan, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        found = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }
    assert found == {
        "a.weight": ("U32", [3, 8]), "a.scales": ("BF16", [3, 1]), "a.biases": ("BF16", [3, 1]), "odd": ("BF16", [3]),
        "b.weight": ("U32", [5, 2, 12]), "b.scales": ("BF16", [5, 2, 3]), "b.biases": ("BF16", [5, 2, 3]),
        "c": ("F32", [1]),
    }  # fmt: skip
    sizes = {"U32": 4, "BF16": 2, "F32": 4}
    assert all(
        plan.shards[0].positions[name] % sizes[dtype] == 0 for name, (dtype, _) in found.items()
    )
    assert plan.weight_bytes == plan.shards[0].size - len(plan.shards[0].header)


def test_files_are_cut_between_parameters_in_natural_order() -> None:
    plan = plan_of(
        {f"layers.{n}.weight": Shape(64, 64) for n in (10, 2, 1)}, None, shard=2 * 64 * 64 * 2
    )
    files = {shard.file: [entry.path for entry in shard.entries] for shard in plan.shards}
    assert files == {
        "model-00001-of-00002.safetensors": ["layers.1.weight", "layers.2.weight"],
        "model-00002-of-00002.safetensors": ["layers.10.weight"],
    }
    assert plan.index() == {
        "metadata": {"total_parameters": 3 * 64 * 64, "total_size": 3 * 64 * 64 * 2},
        "weight_map": {
            path: file
            for file, paths in sorted(files.items(), key=lambda f: f[1][0])
            for path in paths
        },
    }


def test_a_parameter_larger_than_a_file_gets_one_of_its_own() -> None:
    plan = plan_of(
        {"a.weight": Shape(2, 64), "b.weight": Shape(999, 64), "c.weight": Shape(2, 64)},
        None,
        shard=1000,
    )
    assert [[entry.path for entry in shard.entries] for shard in plan.shards] == [
        ["a.weight"],
        ["b.weight"],
        ["c.weight"],
    ]


def test_rows_that_the_group_does_not_divide_are_named_in_config_and_notes() -> None:
    plan = plan_of(
        {
            "a.weight": Shape(4, 128),
            "b.weight": Shape(4, 96),
            "c.weight": Shape(4, 40),
            "norm": Shape(40),
        }
    )
    assert plan.quantization_section() == {
        "group_size": 64, "bits": 4, "mode": "affine", "b": {"group_size": 32, "bits": 4, "mode": "affine"}, "c": False,
    }  # fmt: skip
    assert plan.notes == (
        "rows that 64 does not divide, in groups of 32 instead: b",
        "rows that no group size divides, left unquantized: c",
    )
    assert plan_of({"a.weight": Shape(4, 128)}).notes == ()


def test_a_model_without_any_packed_matrix_has_no_quantization() -> None:
    assert plan_of({"a.weight": Shape(4, 40), "norm": Shape(40)}).quantization_section() is None
    assert plan_of({"a.weight": Shape(4, 64)}, None).quantization_section() is None


def test_dtype_applies_to_floats_and_affine_scales_only() -> None:
    parameters = {
        "a.weight": Shape(4, 64),
        "norm": Shape(64, dtype=mx.float32),
        "ids": Shape(4, dtype=mx.int32),
    }
    found = plan_of(parameters, dtype=mx.float16).entries
    assert {part: item.dtype for part, item in found["a.weight"].tensors.items()} == {
        "weight": "U32", "scales": "F16", "biases": "F16",
    }  # fmt: skip
    assert found["norm"].tensors["weight"].dtype == "F16"
    assert found["ids"].tensors["weight"].dtype == "I32"
    assert plan_of(
        {"a.weight": Shape(4, 64)}, Quantization(4, 32, "mxfp4"), mx.float16
    ).weight_bytes == 4 * (32 + 2)


@pytest.mark.parametrize("wanted", [None, FOUR])
def test_what_is_packed_as_wanted_is_kept(wanted: Quantization | None) -> None:
    plan = plan_of({"m.weight": packed(4, 128, FOUR), "n.weight": packed(4, 128, FOUR)}, wanted)
    assert {entry.treatment for entry in plan.entries.values()} == {"kept packed"}
    assert plan.quantization_section() == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert [note.split(":")[0] for note in plan.notes] == (
        ["already packed as 4 bits, groups of 64, affine in the source and taken as they are"]
        if wanted
        else []
    )


def test_what_is_packed_otherwise_is_quantized_again_and_the_notes_say_so() -> None:
    plan = plan_of({"m.weight": packed(4, 128, Quantization(8, 32)), "n.weight": Shape(4, 128)})
    assert {entry.treatment for entry in plan.entries.values()} == {"quantized"}
    assert plan.entries["m.weight"].tensors["scales"].dtype == "F16"
    assert len(plan.notes) == 1 and plan.notes[0].startswith(
        "1 matrices of the source were quantized already"
    )


@pytest.mark.parametrize(
    ("wanted", "kept"), [(FOUR, True), (Quantization(8, 64), True), (Quantization(3, 64), False)]
)
def test_a_small_float_format_is_packed_anew_only_for_fewer_bits(
    wanted: Quantization, kept: bool
) -> None:
    small = Quantization(4, 32, "mxfp4")
    plan = plan_of({"experts.weight": packed(4, 128, small), "q.weight": Shape(4, 128)}, wanted)
    assert plan.entries["experts.weight"].quantization == (small if kept else wanted)
    assert plan.entries["q.weight"].quantization == plan.default_quantization == wanted
    section = plan.quantization_section()
    assert section and section.get("experts") == (
        {"group_size": 32, "bits": 4, "mode": "mxfp4"} if kept else None
    )
    assert plan.notes[0].startswith(
        "already packed as 4 bits, groups of 32, mxfp4" if kept else "1 matrices"
    )


def test_without_a_wish_the_most_frequent_settings_are_the_common_ones() -> None:
    eight = Quantization(8, 32)
    parameters = {f"{n}.weight": packed(4, 128, eight if n < 2 else FOUR) for n in range(5)} | {
        "z.weight": Shape(4, 64)
    }
    assert plan_of(parameters, None).quantization_section() == {
        "group_size": 64, "bits": 4, "mode": "affine", "z": False,
        "0": {"group_size": 32, "bits": 8, "mode": "affine"}, "1": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip


def test_the_digest_sees_shape_dtype_and_order() -> None:
    digests = {
        plan_of({"a.weight": Shape(4, 64), "b.weight": Shape(4, 64)}).digest,
        plan_of({"a.weight": Shape(4, 64), "b.weight": Shape(8, 64)}).digest,
        plan_of({"a.weight": Shape(4, 64), "b.weight": Shape(4, 64)}, dtype=mx.float16).digest,
        plan_of({"a.weight": Shape(4, 64), "b.weight": Shape(4, 64)}, shard=1).digest,
    }
    assert len(digests) == 4
    assert plan_of({"b.weight": Shape(4, 64), "a.weight": Shape(4, 64)}).digest in digests


def test_names_from_a_file_stay_json() -> None:
    name = 'q"\\\nü'
    header = plan_of({name: Shape(4)}).shards[0].header
    assert list(json.loads(header[8:])) == ["__metadata__", name]
