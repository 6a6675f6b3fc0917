"""Rows that cannot be read, or are not what they were: told by table, row and file, and the process goes on."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import EmbeddingReadError
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.quantize import convert
from mlxarch.quantize.repack.pack_experts import pack
from mlxarch.ssd_streaming import positional_reads as files
from mlxarch.ssd_streaming.row_cache import RowCache, RowFile, Verify, row_fields
from tiny_gemma3n import MODES, ROWS, SSD, TABLE, generated, load, make_gemma3n, prompt, table_of

TOKENS = 6


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    original = make_gemma3n(tmp_path_factory.mktemp("ple") / "original")
    return convert(original, original.with_name("model"), **MODES["affine-4"]).output


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "model"))


class Disk:
    """``os.preadv`` with a fault at one of its calls, or from it on."""

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.left, self.failed, self.preadv_of_system = fault, at, False, os.preadv

    def preadv(self, fd: int, buffers: list[Any], position: int) -> int:
        self.left -= 1
        if self.left > 0 or (self.failed and self.fault != "dead"):
            return self.preadv_of_system(fd, buffers, position)
        self.failed = True
        match self.fault:
            case "EIO" | "dead":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "EINTR":
                raise InterruptedError
            case "end":
                return 0
        return self.preadv_of_system(fd, [memoryview(buffers[0])[:3]], position)  # short


@pytest.mark.parametrize(
    ("fault", "harmless"),
    [("EIO", True), ("EINTR", True), ("short", True), ("dead", False), ("end", False)],
)
def test_a_fault_of_a_read_is_harmless_or_told_and_the_process_goes_on(
    fault: str, harmless: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = load(folder, SSD), prompt(5)
    table_of(model).cache._capacity = 0
    wanted = generated(model, tokens, TOKENS)
    said = rf"row \d+ of {re.escape(TABLE)} could not be read from .*model\.safetensors, byte \d+: "
    for at in np.random.default_rng(0).integers(1, 25, 50).tolist():
        session, found, disk = (
            Session(model.make_caches(), renew=model.make_caches),
            [],
            Disk(fault, at),
        )
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "preadv", disk.preadv)
            try:
                found.extend(
                    token for token, _ in decode(model, session, tokens, Sampling(), TOKENS)
                )
            except EmbeddingReadError as error:
                assert re.match(said, str(error))
        assert disk.failed and found == wanted[: len(found)] and (len(found) == TOKENS) == harmless
        held = [*tokens, *found]
        assert session.tokens == held[: len(session.tokens)]
        if not harmless:  # the conversation goes on where it was
            rest = [
                token for token, _ in decode(model, session, held, Sampling(), TOKENS - len(found))
            ]
            assert rest == wanted[len(found) :]


def cut_short(file: Path) -> Callable[[], None]:
    data, times = file.read_bytes(), file.stat().st_mtime_ns

    def restore() -> None:
        file.write_bytes(data)
        os.utime(file, ns=(times, times))

    os.truncate(file, len(data) - 1)
    return restore


def overwritten(file: Path) -> Callable[[], None]:
    restore = cut_short(file)
    restore()
    os.utime(file)
    return restore


@pytest.mark.parametrize("fault", [cut_short, overwritten])
def test_a_file_that_changes_under_a_running_model_is_told(
    fault: Callable[[Path], Callable[[], None]], folder: Path
) -> None:
    model = load(folder, SSD)
    table_of(model).cache._capacity = 0
    wanted = generated(model, prompt(5))
    restore = fault(folder / "model.safetensors")
    for seed in range(50):
        with pytest.raises(EmbeddingReadError, match="changed or cut short"):
            generated(model, prompt(3, seed))
    restore()
    assert generated(model, prompt(5)) == wanted


def test_a_file_put_in_its_place_is_not_read(folder: Path) -> None:
    model = load(folder, SSD)
    table_of(model).cache._capacity = 0
    wanted, file = generated(model, prompt(5)), folder / "model.safetensors"
    shutil.copy(folder / "config.json", folder / "other")
    (folder / "other").rename(file)
    assert generated(model, prompt(5)) == wanted


def flip(table: LazyTensor, row: int) -> None:
    """One bit of a row, with the file's times as they were."""
    stored = row_fields("", table)[0].stored
    file, at = stored.shard.path, stored.info.start + row * stored.shape[1] * stored.dtype.size + 5
    times = file.stat().st_mtime_ns
    with open(file, "r+b") as out:
        out.seek(at)
        [octet] = out.read(1)
        out.seek(at)
        out.write(bytes([octet ^ 16]))
    os.utime(file, ns=(times, times))


@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize("brought", [True, False], ids=["with checksums", "without"])
def test_a_flipped_bit_is_told_where_rows_are_checked(
    verify: Verify, brought: bool, folder: Path, tmp_path: Path
) -> None:
    if brought:
        pack(folder, folder := tmp_path / "packed")
    table = open_checkpoint(folder).tensors[f"{TABLE}.weight"]
    whole = RowCache(RowFile("", table)).rows(range(ROWS))
    cache = RowCache(RowFile("the table", table, verify), limit=0)
    if not brought:
        cache.rows(range(ROWS))  # what is read first is what counts
    for row in np.random.default_rng(0).permutation(ROWS)[:50].tolist():
        flip(table, row)
        if verify == "always" or (verify == "first" and brought):
            with pytest.raises(
                EmbeddingReadError, match=f"row {row} of the table.*its checksum is"
            ):
                cache.rows([row])
        else:
            assert not np.array_equal(
                cache.rows([row]), whole[[row]]
            )  # which is why they are checked
        flip(table, row)
    assert np.array_equal(cache.rows(range(ROWS)), whole)
