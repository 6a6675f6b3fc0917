"""Packing experts: no byte changes, what is damaged is refused, and nothing half-written appears."""

import errno
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sliced_grok2

from faulty_disk import FaultyDisk
from mlxarch.checkpoint.packed_experts import MANIFEST_FILE, RECORD_ALIGNMENT
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.receipt import read_receipt
from mlxarch.checkpoint.shards import Shard
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, InvalidInput, OutputError
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import convert
from mlxarch.quantize.repack.pack_experts import pack, prepare_pack
from mlxarch.store.verify import verify
from streamed import fingerprint, load
from tiny_llama import make_llama
from tiny_moe import KINDS, make_moe

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
SOURCES = {
    "affine": ("qwen3_moe", {"packed": Quantization(4, 32), "dtype": mx.bfloat16}),
    "mxfp4 with biases": (
        "gpt_oss",
        {"packed": Quantization(4, 32, "mxfp4"), "dtype": mx.bfloat16},
    ),
    "one tensor an expert": ("qwen3_moe", {"single": True}),
    "one packed tensor an expert": ("qwen3_moe", {"single": True, "packed": Quantization(8, 64)}),
}


def contents(resolved: Resolved) -> dict[str, tuple[Any, ...]]:
    """Every array of a model: type, shape and bytes."""
    arrays = {}
    for name, tensor in resolved.tensors.items():
        for part, stored in (
            tensor.components if isinstance(tensor, QuantizedTensor) else {"": tensor}
        ).items():
            array = stored.load()
            arrays[f"{name} {part}"] = (
                array.dtype,
                array.shape,
                np.asarray(array.view(mx.uint8)).tobytes(),
            )
    return arrays


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    source = make_moe(folder / "model", packed=Quantization(4, 32), dtype=mx.bfloat16)
    return pack(source, folder / "packed").output


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.mark.parametrize("name", SOURCES)
def test_packing_and_unpacking_keep_every_byte(name: str, tmp_path: Path) -> None:
    kind, options = SOURCES[name]
    source = make_moe(tmp_path / "model", kind, **options)
    wanted = contents(resolve(open_checkpoint(source)))
    summary = pack(source, tmp_path / "packed")
    assert contents(resolve(open_checkpoint(tmp_path / "packed"))) == wanted
    convert(tmp_path / "packed", tmp_path / "again", bits=None)
    assert contents(resolve(open_checkpoint(tmp_path / "again"))) == wanted
    assert (
        summary.experts == 12 * summary.layers and not (tmp_path / "again" / MANIFEST_FILE).exists()
    )


def test_a_receipt_goes_along_and_covers_the_new_files(tmp_path: Path) -> None:
    convert(make_moe(tmp_path / "model"), tmp_path / "quantized", bits=8, method="round")
    pack(tmp_path / "quantized", tmp_path / "packed")
    assert verify(tmp_path / "packed") == []
    before, after = (read_receipt(tmp_path / name) for name in ("quantized", "packed"))
    assert (
        before
        and after
        and before | {"files": 0} == after | {"files": 0}
        and before["files"] != after["files"]
    )
    with (tmp_path / "packed" / "experts.L02.bin").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    assert verify(tmp_path / "packed") == ["experts.L02.bin has changed"]
    pack(tmp_path / "model", tmp_path / "plain")
    assert read_receipt(tmp_path / "plain") is None


@pytest.mark.parametrize(
    "name", ["gpt_oss", "grok2", "llama4_scout", "llama4_maverick", "deepseek_v3", "kimi_k2"]
)
def test_published_layouts_pack_and_stream(name: str, tmp_path: Path) -> None:
    pack(GOLDEN / name, tmp_path / "packed")
    wanted = fingerprint(load(GOLDEN / name))
    assert fingerprint(load(tmp_path / "packed")) == wanted
    assert fingerprint(load(tmp_path / "packed", 2)) == wanted


def test_published_mxfp4_packs_and_streams(tmp_path: Path) -> None:
    """gpt-oss's own files: rows of gate and up alternate, four bits in bytes, no ``quantization`` in the config."""
    folder = make_moe(
        tmp_path / "mlx", "gpt_oss", packed=Quantization(4, 32, "mxfp4"), dtype=mx.bfloat16
    )
    arrays: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    for layer in (f"model.layers.{n}.mlp.experts" for n in range(3)):

        def both(leaf: str, layer: str = layer) -> mx.array:
            gate, up = (arrays.pop(f"{layer}.{side}_proj.{leaf}") for side in ("gate", "up"))
            return mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])

        for side, take in (
            ("gate_up", both),
            ("down", lambda leaf, layer=layer: arrays.pop(f"{layer}.down_proj.{leaf}")),
        ):
            words, scales = take("weight"), take("scales")
            arrays[f"{layer}.{side}_proj_blocks"] = words.view(mx.uint8).reshape(
                *words.shape[:2], -1, 16
            )
            arrays[f"{layer}.{side}_proj_scales"], arrays[f"{layer}.{side}_proj_bias"] = (
                scales,
                take("bias"),
            )
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    del config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))
    pack(folder, tmp_path / "packed")
    wanted = fingerprint(load(folder))
    models = [load(folder, 4), load(tmp_path / "packed"), load(tmp_path / "packed", 4)]
    assert [fingerprint(model) for model in models] == [wanted] * 3


def test_the_files_are_as_the_format_says(packed: Path) -> None:
    manifest = json.loads((packed / MANIFEST_FILE).read_text())
    [first, second] = manifest["layers"]
    assert (manifest["format"], manifest["version"]) == ("mlxarch-experts", 1)
    assert [first["file"], second["file"]] == ["experts.L00.bin", "experts.L02.bin"]
    data, tensors = (
        (packed / second["file"]).read_bytes(),
        resolve(open_checkpoint(packed.parent / "model")).tensors,
    )
    assert len(data) == 12 * second["stride"] and second["stride"] % RECORD_ALIGNMENT == 0
    for expert in (0, 7, 11):
        record, start = data[expert * second["stride"] :], 0
        for part in second["parts"]:
            projection, leaf = part["name"].split(".")
            matrix = tensors[f"{second['path']}.{projection}.weight"]
            assert isinstance(matrix, QuantizedTensor)
            array = matrix.components[leaf].load()[expert]
            assert (
                record[start : start + array.nbytes] == np.asarray(array.view(mx.uint8)).tobytes()
            )
            start += array.nbytes
        assert zlib.crc32(record[:start]) == second["crc32"][expert]


def test_the_folder_says_that_others_cannot_read_it(packed: Path) -> None:
    assert "mlx-lm" in (packed / "README.md").read_text()
    weights = Shard.open(packed / "model.safetensors").tensors
    assert not any("experts" in name or "switch_mlp" in name for name in weights)


def change(folder: Path, **values: Any) -> None:
    """Keys of the first layer in the manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["layers"][0] |= values
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"file": "../experts.L00.bin"}, "not a plain one"),
        ({"file": "experts.L07.bin"}, "missing"),
        ({"experts": 11}, "12 checksums for 11 experts"),
        ({"experts": 11, "crc32": [0] * 11}, "records of"),
        ({"stride": 16}, "longer than the stride"),
        ({"parts": []}, "length >= 2"),
        ({"crc32": [-1] * 12}, ">= 0"),
        ({"surprise": 1}, "unknown field"),
        ({"quantization": {}}, "gate_proj"),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(
    copy: Path, values: dict[str, Any], message: str
) -> None:
    resolve(open_checkpoint(copy))
    change(copy, **values)
    with pytest.raises(CheckpointError, match=message):
        resolve(open_checkpoint(copy))


def test_a_later_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2 .* reads version 1"):
        open_checkpoint(copy)


def test_what_cannot_be_packed_is_refused(packed: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    with pytest.raises(InvalidInput, match="no experts"):
        pack(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InvalidInput, match="packed already"):
        pack(packed, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        pack(packed.parent / "model", packed)


def test_a_flipped_bit_is_found_by_whoever_takes_all_experts(copy: Path, tmp_path: Path) -> None:
    """Where all of them are in memory, and where a folder is made of them."""
    layer = json.loads((copy / MANIFEST_FILE).read_text())["layers"][0]
    with open(copy / layer["file"], "r+b") as file:
        file.seek(5 * layer["stride"] + 700)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 8]))
    message = f"{layer['file']}: the checksum of expert 5 is [0-9a-f]{{8}}, and must be {layer['crc32'][5]:08x}"
    with pytest.raises(CheckpointError, match=message):
        load(copy)
    with pytest.raises(CheckpointError, match=message):
        convert(copy, tmp_path / "out", bits=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", range(0, 40, 3))
def test_a_failing_disk_leaves_no_output_and_the_next_run_succeeds(
    packed: Path, tmp_path: Path, moment: int
) -> None:
    def fail(number: int, name: str) -> None:
        if number == moment:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    source, output = packed.parent / "model", tmp_path / "out"
    packing = prepare_pack(source, output, disk=FaultyDisk(fail))
    with pytest.raises(OutputError):
        packing.run()
    assert not output.exists()
    pack(source, output)
    files = {path.name for path in packed.iterdir()}
    assert {path.name for path in output.iterdir()} == files
    assert all(
        (output / name).read_bytes() == (packed / name).read_bytes()
        for name in files - {"README.md"}
    )


def test_the_kinds_of_the_tiny_models_have_experts() -> None:
    assert set(KINDS) == {kind for kind, _ in SOURCES.values()}


def test_experts_cut_for_ranks_stream_and_pack(tmp_path: Path) -> None:
    folder = sliced_grok2.make(tmp_path / "sliced")
    wanted = fingerprint(load(folder))
    assert fingerprint(load(folder, 2)) == wanted
    pack(folder, tmp_path / "packed")
    assert [fingerprint(load(tmp_path / "packed", count)) for count in (None, 2)] == [wanted] * 2
