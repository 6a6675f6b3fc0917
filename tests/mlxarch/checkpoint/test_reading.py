"""Reading tensors out of a shard: exact bytes, or an error that names the tensor."""

import os
import signal
import threading

import numpy as np
import pytest
from raw_safetensors import open_in, safetensors

from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.system import untrusted_files as untrusted

BYTES = np.arange(256, dtype=np.uint8)
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(bytes=BYTES, matrix=MATRIX, empty=np.zeros((0, 3), np.float32)))
    return path


@pytest.fixture
def shard(path):
    with Shard.open(path) as shard:
        yield shard


def test_a_tensor_is_read_into_a_buffer(shard):
    whole = np.empty((3, 4), np.float32)
    shard.read_into(shard.tensors["matrix"], whole)
    assert np.array_equal(whole, MATRIX)
    rows = np.empty((1, 4), np.float32)
    shard.read_into(shard.tensors["matrix"], rows, offset=2 * 16)
    assert np.array_equal(rows, MATRIX[2:])
    shard.read_into(shard.tensors["empty"], np.empty((0, 3), np.float32))
    shard.read_into(shard.tensors["bytes"], bytearray(), offset=256)


@pytest.mark.parametrize(("nbytes", "offset"), [(257, 0), (1, 256), (16, 241), (1, -1), (0, 257)])
def test_no_byte_outside_the_tensor_is_read(shard, nbytes, offset):
    with pytest.raises(InvalidInput, match="tensor 'bytes'.*it has 256"):
        shard.read_into(shard.tensors["bytes"], bytearray(nbytes), offset)


def test_short_reads_are_resumed(shard, monkeypatch):
    calls = []

    def few(fd, buffers, position):
        calls.append(position)
        return preadv(fd, [memoryview(buffers[0])[:100]], position)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", few)
    buffer = bytearray(256)
    shard.read_into(shard.tensors["bytes"], buffer)
    assert buffer == BYTES.tobytes()
    start = shard.tensors["bytes"].start
    assert calls == [start, start + 100, start + 200]


def test_large_reads_are_split(shard, monkeypatch):
    monkeypatch.setattr(untrusted, "_MAX_READ", 7)
    buffer = bytearray(48)
    shard.read_into(shard.tensors["matrix"], buffer)
    assert buffer == MATRIX.tobytes()


def test_signals_do_not_disturb_a_read(tmp_path):
    array = np.arange(1 << 26, dtype=np.uint8)
    (tmp_path / "x.safetensors").write_bytes(safetensors(w=array))
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with Shard.open(tmp_path / "x.safetensors") as shard:
            buffer = np.empty_like(array)
            shard.read_into(shard.tensors["w"], buffer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen and np.array_equal(buffer, array)


def test_threads_read_from_one_shard_at_once(shard):
    wrong = []

    def read(name, expected):
        buffer = bytearray(len(expected))
        for _ in range(300):
            shard.read_into(shard.tensors[name], buffer)
            if buffer != expected:
                wrong.append(name)

    work = [("bytes", BYTES.tobytes()), ("matrix", MATRIX.tobytes())] * 2
    threads = [threading.Thread(target=read, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failing_disk_is_named_with_file_and_tensor(shard, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    message = (
        r"model\.safetensors: tensor 'matrix': reading 48 bytes at \d+ failed: "
        r"Input/output error\. Check the disk"
    )
    with pytest.raises(CheckpointError, match=message):
        shard.read_into(shard.tensors["matrix"], bytearray(48))


def test_a_file_cut_while_open_is_found(shard, path):
    os.truncate(path, shard.tensors["matrix"].start + 8)
    shard.read_into(shard.tensors["bytes"], bytearray(256))
    with pytest.raises(
        CheckpointError,
        match=r"tensor 'matrix': the file ends at byte .* cut off .*download it again",
    ):
        shard.read_into(shard.tensors["matrix"], bytearray(48))


def test_a_closed_shard_does_not_read_from_whoever_has_its_descriptor_now(path, tmp_path):
    shard = Shard.open(path)
    shard.close()
    shard.close()
    (tmp_path / "other").write_bytes(bytes(10_000))
    with (
        (tmp_path / "other").open("rb"),
        pytest.raises(CheckpointError, match="Bad file descriptor"),
    ):
        shard.read_into(shard.tensors["matrix"], bytearray(48))


def test_a_forgotten_shard_closes_its_file(path):
    shard = Shard.open(path)
    assert open_in(path.parent) == 1
    del shard
    assert open_in(path.parent) == 0


def test_a_refused_shard_leaves_no_file_open(path):
    path.write_bytes(b"12345678{}")
    with pytest.raises(CheckpointError) as kept:
        Shard.open(path)
    assert open_in(path.parent) == 0
    assert kept.value.__traceback__


def grown(path):
    with path.open("ab") as f:
        f.write(b"x")


def written_over(path):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def replaced(path):
    path.with_name("new").write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize(
    "change", [grown, written_over, replaced, os.remove], ids=lambda change: change.__name__
)
def test_a_change_of_the_file_is_noticed(change, shard, path):
    shard.check_unchanged()
    path.read_bytes()
    shard.check_unchanged()
    change(path)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: the file was changed.*load the model again"
    ):
        shard.check_unchanged()


def test_a_replaced_file_is_not_read_by_mistake(shard, path):
    path.with_name("new").write_bytes(safetensors(bytes=BYTES[::-1].copy()))
    os.replace(path.with_name("new"), path)
    buffer = bytearray(256)
    shard.read_into(shard.tensors["bytes"], buffer)
    assert buffer == BYTES.tobytes()
