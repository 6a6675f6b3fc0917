"""Weight files, validated: names, shapes, dtypes and places of every tensor, without loading one.

Nothing here needs the array library, and nothing reaches it that has not passed here first.
"""

import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mlxarch.errors import CheckpointError, InvalidInput, ModelNotFound
from mlxarch.safetensors_header import DTYPE_BYTES, TensorInfo, read_header
from mlxarch.tensor_parallel import check_slices, slice_name, sliced_files
from mlxarch.untrusted import REMEDY, child, listed, open_regular, read_exactly, read_json, shown

__all__ = ["DTYPE_BYTES", "INDEX", "Checkpoint", "Shard", "TensorInfo", "child", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARDS = 10_000

_logger = logging.getLogger(__name__)


class Shard:
    """One validated safetensors file, held open: a new file put in its place is never read by mistake.

    ``tensors`` is in the order of the data, ``metadata`` is the header's ``__metadata__``, ``size`` counts bytes.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Validate the open file ``fd``, which then belongs to the shard. Use ``Shard.open``."""
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.path = path
        self._identity = _identity(os.fstat(fd))
        self.size = os.fstat(fd).st_size
        try:
            self.tensors, self.metadata = self._read_header(fd)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open and validate a file; CheckpointError names the file, the tensor, the broken rule and what to do."""
        fd, _ = open_regular(path)
        return cls(Path(path), fd)

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Another file format overrides this."""
        return read_header(fd, self.size, self.path)

    def read_into(self, info: TensorInfo, buffer: Any, offset: int = 0) -> None:
        """Fill a writable, contiguous buffer with the tensor's bytes from its byte ``offset`` on.

        Exactly the buffer's size is read, or CheckpointError raised. Several threads may read at once.
        """
        nbytes = memoryview(buffer).nbytes
        if not 0 <= offset <= info.nbytes - nbytes:
            raise InvalidInput(
                f"{self.path}: tensor {shown(info.name)}: {nbytes} bytes from byte {offset} on were asked for, "
                f"and it has {info.nbytes}. Ask for less."
            )
        read_exactly(self._fd, buffer, info.start + offset, f"{self.path}: tensor {shown(info.name)}")

    def duplicate(self) -> int:
        """A descriptor of the same open file, for whoever reads on when the shard is closed, and closes it himself."""
        return os.dup(self._fd)

    def check_unchanged(self) -> None:
        """Raise CheckpointError unless the path still leads to the file that was validated, unmodified."""
        try:
            same = _identity(os.stat(self.path)) == self._identity
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.path}: the file was changed, replaced or removed while it was in use. "
                "Wait until nothing writes to the folder, then load the model again."
            )

    def close(self) -> None:
        """Close the file. Reading afterwards is an error; closing again is not."""
        self._fd = -1
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Checkpoint:
    """A model folder: ``config``, and the ``tensors`` of those ``shards`` that count, each with its shard.

    The index decides which files and tensors count; others are left alone with a warning. Without an index it is
    model.safetensors, the only safetensors file there is, or a set of slices (see ``tensor_parallel``), each of whose
    tensors goes by the name that ``slice_name`` gives it. ``metadata`` joins that of the shards; where they differ the
    first one counts.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: list[Shard]) -> None:
        self.folder = folder
        self.config = config
        self.shards = shards
        self.tensors: dict[str, tuple[Shard, TensorInfo]] = {}
        self.metadata: dict[str, str] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open and validate a folder.

        Raises:
            ModelNotFound: there is no such folder.
            ConfigError: config.json is missing or malformed.
            CheckpointError: an index or a weight file is missing or breaks a rule.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFound(f"{folder}: there is no such folder. Name one with config.json and safetensors files.")
        checkpoint = cls(folder, read_json(child(folder, "config.json")), [])
        try:
            checkpoint._open_shards()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def check_unchanged(self) -> None:
        """``Shard.check_unchanged`` of every shard."""
        for shard in self.shards:
            shard.check_unchanged()

    def close(self) -> None:
        """Close every shard."""
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_shards(self) -> None:
        try:
            present = sorted(entry for entry in os.listdir(self.folder) if not entry.startswith("."))
        except OSError as problem:
            raise CheckpointError(f"{self.folder}: {problem.strerror}. Check the folder's permissions.") from problem
        weights = [entry for entry in present if entry.endswith(".safetensors")]
        index = _read_index(child(self.folder, INDEX)) if INDEX in present else None
        ranks = sliced_files(self.folder, weights) if index is None and SINGLE not in weights else {}
        names = (
            list(ranks) or [_single(self.folder, present, weights)] if index is None else sorted(set(index.values()))
        )
        paths = [child(self.folder, name) for name in names]
        if missing := [path.name for path in paths if not path.exists()]:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(paths)} weight files are missing: {listed(missing)}. "
                "Download the model again: what is there is kept, and only what is missing is fetched."
            )
        if strays := sorted(set(weights) - set(names)):
            chosen = "not in the index" if index else "it is no slice" if ranks else f"{names[0]} is there"
            _logger.warning("%s: %s left alone: %s", self.folder, listed(strays), chosen)
        for path in paths:
            self.shards.append(Shard.open(path))
        check_slices(self.folder, {shard.path.name: shard.tensors for shard in self.shards}, ranks)
        self._join(index, ranks)

    def _join(self, index: dict[str, str] | None, ranks: Mapping[str, int | None]) -> None:
        """Collect the tensors of all shards; with an index, both must say the same of every tensor listed."""
        unlisted: list[str] = []
        for shard in self.shards:
            self.metadata = shard.metadata | self.metadata
            for name, info in shard.tensors.items():
                place = shard.path.name if index is None else index.get(name)
                unique = slice_name(name, ranks.get(shard.path.name))
                if place is None:
                    unlisted.append(name)
                elif place != shard.path.name:
                    raise CheckpointError(
                        f"{shard.path}: tensor {shown(name)}: it is in this file, and {INDEX} places it in {place}; "
                        f"both must agree. Shards of two versions are mixed: download all of them again."
                    )
                elif unique in self.tensors:
                    other = self.tensors[unique][0].path.name
                    raise CheckpointError(
                        f"{shard.path}: tensor {shown(name)}: it is in {other} too, and may be in one file only. "
                        "Files of two versions are mixed: download all of them again."
                    )
                else:
                    self.tensors[unique] = shard, info
        if index is not None and (lost := index.keys() - self.tensors.keys()):
            name = min(lost)
            raise CheckpointError(
                f"{self.folder / index[name]}: tensor {shown(name)} is not in this file, where {INDEX} places it "
                f"({len(lost)} such tensors). Shards of two versions are mixed: download all of them again."
            )
        if unlisted:
            _logger.warning("%s: %s left alone: not in the index", self.folder, listed(sorted(unlisted)))


def _read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of a shard index: the name of each tensor's file, not yet known to be one in the folder."""
    index = read_json(path, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: weight_map is {shown(files)}, and must name the file of each tensor. {REMEDY}")
    for name, file in files.items():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: its file is {shown(file)}, and must be a .safetensors file of the "
                "folder. Other weight formats are not read: get the model as safetensors."
            )
    if len(set(files.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: weight_map names more than {MAX_SHARDS} files, the most that is read. {REMEDY}")
    return files


def _single(folder: Path, present: list[str], weights: list[str]) -> str:
    """The weight file of a folder without an index."""
    if SINGLE in weights:
        return SINGLE
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise CheckpointError(
            f"{folder}: {listed(weights)} are there, and no {INDEX} says which belong together. "
            "Download the index too, or leave one file in the folder."
        )
    other = [entry for entry in present if entry.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz"))]
    remedy = "Only safetensors are read here: get the model in that format." if other else "Download the model again."
    raise CheckpointError(f"{folder}: there is no safetensors file, only {listed(other or present)}. {remedy}")
