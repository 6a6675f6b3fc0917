"""Validated safetensors files and checkpoint folders, with the position of every tensor.

No tensor is loaded and MLX is not imported: a file reaches MLX only after it has passed these
checks.
"""

import logging
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mlxarch.checkpoint.safetensors_header import TensorInfo, read_header
from mlxarch.checkpoint.tp_shards import check_tp_slices, find_tp_files, tp_slice_name
from mlxarch.errors import CheckpointError, InvalidInput, ModelNotFound
from mlxarch.system.untrusted_files import (
    REMEDY,
    join_names,
    open_regular_file,
    read_exactly,
    read_json,
    safe_path,
    short_repr,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARDS = 10_000

_logger = logging.getLogger(__name__)


class Shard:
    """One validated safetensors file, kept open: a file put in its place is never read by mistake.

    Attributes:
        tensors: name -> position, dtype and shape, in the order of the data.
        metadata: the header's ``__metadata__``.
        size: bytes of the file.
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
        """Open and validate a file.

        Raises:
            CheckpointError: it names the file, the tensor, the broken rule and the remedy.
        """
        fd, _ = open_regular_file(path)
        return cls(Path(path), fd)

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Read tensors and metadata; subclasses for other file formats override this."""
        return read_header(fd, self.size, self.path)

    def read_into(self, info: TensorInfo, buffer: Any, offset: int = 0) -> None:
        """Fill a writable, contiguous buffer with the tensor's bytes from its byte ``offset`` on.

        Exactly the buffer's size is read. Several threads may read at once.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        nbytes = memoryview(buffer).nbytes
        if not 0 <= offset <= info.nbytes - nbytes:
            raise InvalidInput(
                f"{self.path}: tensor {short_repr(info.name)}: {nbytes} bytes from byte {offset} "
                "on "
                f"were asked for, and it has {info.nbytes}. Ask for less."
            )
        read_exactly(
            self._fd, buffer, info.start + offset, f"{self.path}: tensor {short_repr(info.name)}"
        )

    def duplicate(self) -> int:
        """Duplicate the descriptor, for reads after the shard is closed; the caller closes it."""
        return os.dup(self._fd)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file at the path is no longer the validated one."""
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
    """A model folder: its config, its shards, and every tensor with the shard that holds it.

    The index decides which files and tensors are used; others are ignored with a warning. Without
    an index, the weights are model.safetensors, the only safetensors file of the folder, a set
    whose names count from 1 of N to N of N, or a set of tensor-parallel slices (see ``tp_shards``),
    whose tensors are named by ``tp_slice_name``. The same counts, with a warning, beside an index
    that belongs to other files.

    Attributes:
        config: config.json, parsed.
        tensors: name -> shard, and position, dtype and shape in it.
        metadata: the merged metadata of all shards; the first shard's value wins.
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
            raise ModelNotFound(
                f"{folder}: there is no such folder. Name one with config.json and safetensors "
                "files."
            )
        checkpoint = cls(folder, read_json(safe_path(folder, "config.json")), [])
        try:
            checkpoint._open_shards()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def check_unchanged(self) -> None:
        """Raise CheckpointError if any shard changed, see ``Shard.check_unchanged``."""
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
            present = sorted(
                entry for entry in os.listdir(self.folder) if not entry.startswith(".")
            )
        except OSError as problem:
            raise CheckpointError(
                f"{self.folder}: {problem.strerror}. Check the folder's permissions."
            ) from problem
        weights = [entry for entry in present if entry.endswith(".safetensors")]
        index = None
        ranks: dict[str, int | None] = {}
        if INDEX_FILE in present:
            index = _read_index(safe_path(self.folder, INDEX_FILE))
            index = self._drop_stale_index(index, weights)
        if index is not None:
            names = sorted(set(index.values()))
        else:
            if SINGLE_FILE not in weights:
                ranks = find_tp_files(self.folder, weights)
            names = list(ranks) or _unindexed_files(self.folder, present, weights)
        paths = [safe_path(self.folder, name) for name in names]
        if missing := [path.name for path in paths if not path.exists()]:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(paths)} weight files are missing: "
                f"{join_names(missing)}. "
                "Download the model again: what is there is kept, and only what is missing is "
                "fetched."
            )
        if strays := sorted(set(weights) - set(names)):
            if index:
                reason = "not in the index"
            elif ranks:
                reason = "it is no slice"
            else:
                reason = f"{names[0]} is there"
            _logger.warning("%s: %s left alone: %s", self.folder, join_names(strays), reason)
        for path in paths:
            self.shards.append(Shard.open(path))
        check_tp_slices(
            self.folder, {shard.path.name: shard.tensors for shard in self.shards}, ranks
        )
        if index is not None and self._disagrees(index) and complete_set(names) == names:
            _logger.warning(
                "%s: %s belongs to other files, and is left alone: the weight files are a whole "
                "set by their names",
                self.folder,
                INDEX_FILE,
            )
            index = None
        self._collect_tensors(index, ranks)

    def _drop_stale_index(
        self, index: dict[str, str], weights: Sequence[str]
    ) -> dict[str, str] | None:
        """Return the index; None if it names files that are not there, or a part of a whole set."""
        listed = set(index.values())
        whole = [SINGLE_FILE] if SINGLE_FILE in weights else complete_set(weights)
        if not whole or (listed <= set(weights) and not listed < set(whole)):
            return index
        _logger.warning(
            "%s: %s names other files, %s, and is left alone: %s are a whole set",
            self.folder,
            INDEX_FILE,
            join_names(sorted(listed)),
            join_names(whole),
        )
        return None

    def _disagrees(self, index: Mapping[str, str]) -> bool:
        """Whether the index places some tensor in another file than the one that has it."""
        return any(
            index.get(name, shard.path.name) != shard.path.name
            for shard in self.shards
            for name in shard.tensors
        )

    def _collect_tensors(
        self, index: dict[str, str] | None, ranks: Mapping[str, int | None]
    ) -> None:
        """Collect the tensors of all shards; an index must agree with the files."""
        unlisted: list[str] = []
        for shard in self.shards:
            self.metadata = shard.metadata | self.metadata
            for name, info in shard.tensors.items():
                listed_file = shard.path.name if index is None else index.get(name)
                unique_name = tp_slice_name(name, ranks.get(shard.path.name))
                if listed_file is None:
                    unlisted.append(name)
                elif listed_file != shard.path.name:
                    raise CheckpointError(
                        f"{shard.path}: tensor {short_repr(name)}: it is in this file, and "
                        f"{INDEX_FILE} places it in {listed_file}; both must agree. Shards of two "
                        "versions are mixed: download all of them again."
                    )
                elif unique_name in self.tensors:
                    other = self.tensors[unique_name][0].path.name
                    raise CheckpointError(
                        f"{shard.path}: tensor {short_repr(name)}: it is in {other} too, and may "
                        "be in one file only. "
                        "Files of two versions are mixed: download all of them again."
                    )
                else:
                    self.tensors[unique_name] = shard, info
        lost = sorted(set(index or ()).difference(self.tensors))
        for names, reason in ((unlisted, "not in the index"), (lost, "in the index alone")):
            if names:
                shown = join_names(sorted(names))
                _logger.warning("%s: %s left alone: %s", self.folder, shown, reason)


def _read_index(path: Path) -> dict[str, str]:
    """Read ``weight_map`` of a shard index: tensor -> file name, which may not exist."""
    index = read_json(path, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(
            f"{path}: weight_map is {short_repr(files)}, and must name the file of each tensor. "
            f"{REMEDY}"
        )
    for name, file in files.items():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {short_repr(name)}: its file is {short_repr(file)}, and must be a "
                ".safetensors file of the "
                "folder. Other weight formats are not read: get the model as safetensors."
            )
    if len(set(files.values())) > MAX_SHARDS:
        raise CheckpointError(
            f"{path}: weight_map names more than {MAX_SHARDS} files, the most that is read. "
            f"{REMEDY}"
        )
    return files


def complete_set(names: Sequence[str]) -> list[str]:
    """Return the files whose names count from 1 of N to N of N; nothing if there are other sets."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        if found := re.fullmatch(r"(.*)-[0-9]+-of-([0-9]+)\.safetensors", name):
            sets.setdefault((found[1], found[2]), []).append(name)
    whole = [
        members
        for (stem, total), members in sets.items()
        if members
        == [f"{stem}-{i:0{len(total)}}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    ]
    return whole[0] if len(whole) == 1 else []


def _unindexed_files(folder: Path, present: list[str], weights: list[str]) -> list[str]:
    """Return the weight files of a folder without an index: a single one, or a whole set."""
    if SINGLE_FILE in weights:
        return [SINGLE_FILE]
    if len(weights) == 1:
        return weights
    if whole := complete_set(weights):
        return whole
    if weights:
        raise CheckpointError(
            f"{folder}: {join_names(weights)} are there, and neither {INDEX_FILE} nor their "
            "names say which belong together. "
            "Download the index too, or leave one file in the folder."
        )
    other = [
        entry
        for entry in present
        if entry.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz"))
    ]
    remedy = (
        "Only safetensors are read here: get the model in that format."
        if other
        else "Download the model again."
    )
    raise CheckpointError(
        f"{folder}: there is no safetensors file, only {join_names(other or present)}. {remedy}"
    )
