"""Packed rows: one record for each token, the same bytes; the format's rules."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.packed_rows import ROWS_FILE, RowTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.loading.matformer import Slice
from mlxarch.quantize import convert
from mlxarch.quantize.repack.pack_experts import pack, prepare_pack
from tiny_gemma3n import MODES, ROWS, SSD, TABLE, generated, load, make_gemma3n, prompt, table_of

NAME = f"{TABLE}.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """An ordinary folder in a mode, and the packed one."""
    original = make_gemma3n(tmp_path_factory.mktemp("rows") / "original")

    def make(mode: str) -> tuple[Path, Path]:
        plain, packed = original.with_name(mode), original.with_name(f"{mode}-packed")
        if not plain.exists():
            convert(original, plain, **MODES[mode])
            pack(plain, packed)
        return plain, packed

    return make


def parts_of(tensor: LazyTensor) -> dict[str, LazyTensor]:
    return tensor.components if isinstance(tensor, QuantizedTensor) else {"weight": tensor}


def octets(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_packed_holds_the_same_bytes_and_gives_the_same_tokens(mode: str, folders: Any) -> None:
    plain, packed = folders(mode)
    first, second = (parts_of(open_checkpoint(folder).tensors[NAME]) for folder in (plain, packed))
    assert first.keys() == second.keys()
    for part, tensor in second.items():
        assert octets(tensor.load()) == octets(first[part].load())
        assert (
            octets(tensor.read_rows(7, 19))
            == octets(first[part].read_rows(7, 19))
            != octets(first[part].read_rows(8, 20))
        )
    wanted = generated(load(plain), prompt(9))
    for execution in ({}, {"execution": SSD}):
        assert generated(load(packed, **execution), prompt(9)) == wanted
    cut = Slice((32,), (0, 3))
    assert (
        generated(load(packed, SSD, slice=cut), prompt(9))
        == generated(load(plain, slice=cut), prompt(9))
        != wanted
    )


def test_a_token_takes_one_read(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxarch.ssd_streaming.positional_reads import RecordFile

    reads: list[int] = []
    plain_read = RecordFile.read

    def read(self: RecordFile, buffers: Any, position: int) -> None:
        reads.append(position)
        plain_read(self, buffers, position)

    monkeypatch.setattr(RecordFile, "read", read)
    for folder, each in zip(folders("affine-4"), (3, 1), strict=True):
        reads.clear()
        table_of(load(folder, SSD)).cache.rows([5, 6, 9])
        assert len(reads) == 3 * each


def test_the_file_is_as_its_specification_says(folders: Any) -> None:
    plain, packed = folders("affine-4")
    shutil.copy(packed / ROWS_FILE, copy := packed / "copy.safetensors")
    found, stored = load_file(copy), load_file(plain / "model.safetensors")
    copy.unlink()
    assert set(found) == {f"{TABLE}.records", f"{TABLE}.crc32"}
    parts = [stored[f"{TABLE}.{part}"] for part in ("weight", "scales", "biases")]
    for row in (0, 17, ROWS - 1):
        record = b"".join(part[row].tobytes() for part in parts)
        assert found[f"{TABLE}.records"][row].tobytes() == record
        assert found[f"{TABLE}.crc32"][row] == zlib.crc32(record)
    assert not [name for name in load_file(packed / "model.safetensors") if name.startswith(TABLE)]
    assert "other programs cannot read this folder" in (packed / "README.md").read_text()


def test_it_is_undone_without_loss(folders: Any, tmp_path: Path) -> None:
    plain, packed = folders("affine-6")
    convert(packed, tmp_path / "undone", bits=None)
    first, second = (
        load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "undone")
    )
    assert first.keys() == second.keys() and all(
        first[n].tobytes() == second[n].tobytes() for n in first
    )
    assert not (tmp_path / "undone" / ROWS_FILE).exists()


def test_a_flipped_bit_is_found_by_whoever_takes_the_whole_table(
    folders: Any, tmp_path: Path
) -> None:
    packed = shutil.copytree(folders("affine-4")[1], tmp_path / "packed")
    data = bytearray((packed / ROWS_FILE).read_bytes())
    data[-1] ^= 4  # the biases of the last row
    (packed / ROWS_FILE).write_bytes(data)
    for whole in (lambda: load(packed), lambda: convert(packed, tmp_path / "undone", bits=None)):
        with pytest.raises(CheckpointError, match=rf"ple\.bin: the checksum of row {ROWS - 1} is "):
            whole()


def test_what_is_packed_is_not_packed_again(folders: Any) -> None:
    with pytest.raises(InvalidInput, match="packed already"):
        prepare_pack(folders("affine-4")[1])


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """The header with something else in it, as long as before where it can be."""

    def write(file: Path) -> None:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return write


def head(**settings: Any) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        found = json.loads(header["__metadata__"]["head"])
        header["__metadata__"]["head"] = json.dumps(found | settings)

    return rewritten(change)


def metadata(**settings: str) -> Callable[[Path], None]:
    return rewritten(lambda header: header["__metadata__"].update(settings))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


PART = {"name": "weight", "dtype": "U32", "columns": 20}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (metadata(version="2"), "version '2'; this mlxarch reads 'mlxarch-rows', version '1'"),
        (metadata(format="other"), "format 'other'"),
        (metadata(head="{"), "head: "),
        (head(more=1), "unknown field `more`"),
        (head(path="model.other"), "model.other.records"),
        (head(parts=[PART]), "its tensors are"),
        (head(parts=[PART | {"dtype": "U33"}]), "its tensors are"),
        (head(quantization=None), "its tensors are"),
        (head(quantization={"bits": 7, "group_size": 32, "mode": "affine"}), "head: "),
        (head(quantization={"bits": 8, "group_size": 32, "mode": "affine"}), "must fit together"),
        (cut_short, "ple.bin"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_by_name(
    change: Callable[[Path], None], said: str, folders: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders("affine-4")[1], tmp_path / "model")
    assert isinstance(parts_of(open_checkpoint(folder).tensors[NAME])["weight"], RowTensor)
    change(folder / ROWS_FILE)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)
