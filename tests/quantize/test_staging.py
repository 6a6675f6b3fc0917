"""Quantized and packed in one go: nothing of anybody's is written over, and what was interrupted is gone on with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxarch.checkpoint.packed_experts import MANIFEST_FILE
from mlxarch.errors import DiskSpaceError, InvalidInput, OutputError, QuantizationError
from mlxarch.quantize import staging
from mlxarch.quantize.conversion import Conversion
from mlxarch.quantize.convert_checkpoint import prepare
from mlxarch.quantize.schedule import scratch_bytes
from mlxarch.quantize.staging import Staging
from mlxarch.system.durable_files import Disk
from parity import GOLDEN
from streamed import fingerprint, load
from tiny_llama import make_llama
from tiny_moe import make_moe


class SmallDisk(Disk):
    """Says that it has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def free(self, folder: Path) -> int:
        return self.room


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_moe(tmp_path / "moe")


def prepared(
    source: Path, output: Path, bits: int = 8, **options: Any
) -> tuple[Staging, Conversion]:
    place = Staging(output, **options)
    return place, prepare(source, place.model, bits=bits, method="round")


def make(source: Path, output: Path, bits: int = 8, force: bool = False, **options: Any) -> Path:
    place, conversion = prepared(source, output, bits, **options)
    return place.run(conversion, force=force)[0].output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_output_alone_is_left(source: Path, tmp_path: Path) -> None:
    assert (
        make(source, tmp_path / "out") == tmp_path / "out"
        and (tmp_path / "out" / MANIFEST_FILE).is_file()
    )
    assert names(tmp_path) == {"moe", "out"}
    prepare(source, tmp_path / "ordinary", bits=8, method="round").run()
    assert (
        fingerprint(load(tmp_path / "out"))
        == fingerprint(load(tmp_path / "ordinary"))
        != fingerprint(load(source))
    )


def test_folders_that_stand_beside_stay(source: Path, tmp_path: Path) -> None:
    for name in ("out.stacked", "out.packing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.packing is in the way"):
        make(source, tmp_path / "out")
    assert (tmp_path / "out.packing" / "config.json").read_text() == "mine"
    make(source, tmp_path / "other")
    assert names(tmp_path) == {"moe", "out.stacked", "out.packing", "other"}
    assert names(tmp_path / "out.stacked") == {"config.json"}


def test_an_output_that_exists_is_refused_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "run", lambda *_, **__: pytest.fail("computed"))
        with pytest.raises(OutputError, match="--force"):
            make(source, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == {"moe", "out"}
    make(source, tmp_path / "out", bits=4, force=True)
    assert names(tmp_path) == {"moe", "out"} and fingerprint(load(tmp_path / "out"))


def test_room_for_both_folders_is_asked_for_beforehand(source: Path, tmp_path: Path) -> None:
    place, conversion = prepared(source, tmp_path / "out")
    needed = place.disk_bytes(conversion)
    with pytest.raises(DiskSpaceError, match="an ordinary folder and the packed one"):
        make(source, tmp_path / "out", disk=SmallDisk(needed - 4096 * 8))
    assert names(tmp_path) == {"moe"}
    make(source, tmp_path / "out", disk=SmallDisk(needed))
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert conversion.disk_bytes + sum(sizes) <= needed + 64_000


def test_what_is_quantized_already_is_packed_after_an_interruption(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out")
    assert names(tmp_path) == {"moe", "out.packing"}
    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "run", lambda *_, **__: pytest.fail("computed again"))
        make(source, tmp_path / "out")
    assert names(tmp_path) == {"moe", "out"} and fingerprint(load(tmp_path / "out", 3))


def test_what_was_left_by_other_settings_is_not_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out", bits=4)
    make(source, tmp_path / "out", bits=8)
    make(source, tmp_path / "wanted", bits=8)
    assert fingerprint(load(tmp_path / "out")) == fingerprint(load(tmp_path / "wanted"))
    assert names(tmp_path) == {"moe", "out", "wanted"}


def test_nothing_is_left_of_a_source_that_cannot_be_quantized(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, source / "model.safetensors")
    with pytest.raises(QuantizationError, match="NaN"):
        make(source, tmp_path / "out")
    assert names(tmp_path) == {"moe"}


def test_two_processes_do_not_work_in_one_place(source: Path, tmp_path: Path) -> None:
    place, conversion = prepared(source, tmp_path / "out")
    with place._locked(conversion), pytest.raises(OutputError, match="another process is writing"):
        make(source, tmp_path / "out")


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "llama")
    with pytest.raises(InvalidInput, match="no experts"):
        make(tmp_path / "llama", tmp_path / "out")
    assert names(tmp_path) == {"llama"}


def test_what_is_put_aside_meanwhile_needs_its_place_too(tmp_path: Path) -> None:
    def run(room: int, **options: Any) -> None:
        prepare(GOLDEN / "qwen3_moe", tmp_path / "out", method="search", disk=SmallDisk(room)).run(
            **options
        )

    conversion = prepare(GOLDEN / "qwen3_moe", tmp_path / "out", method="search")
    assert conversion.calibration
    aside = scratch_bytes(conversion.resolved, "search", conversion.calibration.batches)
    assert aside > 10_000
    with pytest.raises(DiskSpaceError, match=rf"\({conversion.disk_bytes + aside} bytes\) of disk"):
        run(conversion.disk_bytes + aside - 1)
    assert not list(tmp_path.iterdir())
    run(conversion.disk_bytes + aside)
