"""Checkpoint in a Hub repository whose weight files are downloaded one by one, as they are read.

Only one weight file is on the disk at a time (or the tensor-parallel slices of the same tensors),
so a model can be quantized that is larger than the free disk space. The headers of all weight files
are fetched first by range requests and validated like those of local files: names, shapes and
dtypes of all tensors are known before any weights are downloaded.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlxarch.checkpoint.lazy_tensor import DTYPES, LazyTensor, SafetensorsTensor
from mlxarch.checkpoint.safetensors_header import TensorInfo, read_header
from mlxarch.checkpoint.shards import INDEX_FILE, SINGLE_FILE, Shard, complete_set
from mlxarch.checkpoint.source import (
    CheckpointSource,
    add_named_templates,
    describe_origins,
    join_quantized_tensors,
)
from mlxarch.checkpoint.tp_shards import check_tp_slices, find_tp_files, tp_group, tp_slice_name
from mlxarch.errors import CheckpointError
from mlxarch.hub import hub_client
from mlxarch.hub.hub_client import Repository
from mlxarch.progress import Progress, silent
from mlxarch.system import paths
from mlxarch.system.untrusted_files import read_json
from mlxarch.tokenizer.chat_template import read_template

logger = logging.getLogger(__name__)


class ShardFetcher:
    """Downloads weight files of a repository on request, and deletes them on release.

    A file that is in the Hub's cache is used there and never deleted.

    Args:
        repository: where the files are.
        folder: target of the downloads.
        progress: callback.
    """

    def __init__(self, repository: Repository, folder: Path, progress: Progress = silent) -> None:
        self.repository = repository
        self.folder = folder
        self.progress = progress
        self._fetched: dict[str, Path] = {}

    def fetch(self, name: str) -> Path:
        """Download a file unless it is there, and return its path.

        Raises:
            DownloadError, OfflineError, GatedModel, ModelNotFound: see ``hub_client``.
        """
        if name not in self._fetched:
            repository = self.repository
            order = list(repository.weights)
            earlier = order[: order.index(name)]
            done = sum(repository.weights[each].size for each in earlier)
            report = hub_client.offset_progress(self.progress, done, repository.weight_bytes)
            self._fetched[name] = hub_client.fetch_file(
                repository.repo,
                repository.revision,
                name,
                into=self.folder,
                progress=report,
                expected=repository.weights.get(name),
            )
        return self._fetched[name]

    def release(self, name: str) -> None:
        """Delete a file that was downloaded into ``folder``."""
        path = self._fetched.pop(name, None)
        if path is not None and path.parent == self.folder:
            path.unlink(missing_ok=True)


class RemoteShard:
    """A weight file of a repository: the header is here, the rest is downloaded when it is read."""

    def __init__(self, fetcher: ShardFetcher, name: str) -> None:
        file = fetcher.repository.weights[name]
        self.fetcher = fetcher
        self.name = name
        self.size = file.size
        self.path = fetcher.folder / "headers" / name
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_bytes(
                hub_client.fetch_safetensors_header(
                    fetcher.repository.repo, fetcher.repository.revision, file
                )
            )
            partial.rename(self.path)
        with self.path.open("rb") as header:
            self.tensors, _ = read_header(
                header.fileno(), file.size, f"{fetcher.repository.repo}/{name}"
            )
        self._local: Shard | None = None

    def open(self) -> Shard:
        """Download and validate the file, unless it is open.

        Raises:
            CheckpointError: its header is not the one that was fetched first.
        """
        if self._local is None:
            shard = Shard.open(self.fetcher.fetch(self.name))
            if shard.tensors != self.tensors:
                shard.close()
                raise CheckpointError(
                    f"{self.name} is another file than the one announced; run the same command "
                    "again, or pin a revision"
                )
            self._local = shard
        return self._local

    def check_unchanged(self) -> None:
        """Do nothing: a commit cannot change, and downloads are verified."""

    def close(self, delete: bool = True) -> None:
        """Close the file and, unless it belongs to the Hub's cache, delete it.

        Args:
            delete: False to keep it on the disk.
        """
        if self._local is None:
            return
        self._local.close()
        if delete:
            self._local = None
            self.fetcher.release(self.name)


class _OpenShards:
    """The weight files that are open: the one read last and those that are read together with it.

    Args:
        keep_files: keep all files open that were read.
    """

    def __init__(self, keep_files: bool = False) -> None:
        self.keep_files = keep_files
        self.shards: list[RemoteShard] = []

    def open(self, shard: RemoteShard) -> Shard:
        if (
            not self.keep_files
            and self.shards
            and tp_group(self.shards[0].name) != tp_group(shard.name)
        ):
            self.close()
        if shard not in self.shards:
            self.shards.append(shard)
        return shard.open()

    def close(self) -> None:
        while self.shards:
            self.shards.pop().close()


class RemoteTensor(LazyTensor):
    """A tensor in a weight file that is downloaded when the tensor is read."""

    local = False

    def __init__(self, open_shards: _OpenShards, shard: RemoteShard, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{shard.name}: tensor {info.name} has dtype {info.dtype}; mlxarch reads "
                f"{', '.join(DTYPES)}. Take a repository with bfloat16, float16 or float32 weights"
            )
        self.open_shards = open_shards
        self.shard = shard
        self.info = info
        self.shape = info.shape
        self.dtype = DTYPES[info.dtype]

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows ``start`` to ``stop``; see ``LazyTensor``."""
        local = self.open_shards.open(self.shard)
        return SafetensorsTensor(local, self.info).read_rows(start, stop)


def download_folder(repository: Repository) -> Path:
    """Return the folder into which the files of a repository are downloaded one by one."""
    name = f"{repository.repo.replace('/', '--')}@{repository.revision}"
    return paths.cache() / "downloads" / name


@contextmanager
def open_remote_checkpoint(
    repository: Repository, progress: Progress = silent, *, keep_files: bool = False
) -> Iterator[CheckpointSource]:
    """Open a repository as a checkpoint whose weight files are downloaded as they are read.

    A weight file is deleted as soon as the next one is read, so tensors should be read file by
    file. The rest is deleted at the end of the ``with`` block. After an error the downloaded files
    stay, so that the next attempt can resume.

    Args:
        repository: the files to read.
        progress: callback.
        keep_files: keep all weight files until the end of the block.

    Raises:
        CheckpointError: a header or the index is invalid.
        DownloadError, OfflineError, GatedModel: see ``hub_client``.
    """
    folder = download_folder(repository)
    folder.mkdir(parents=True, exist_ok=True)
    local_paths = {
        name: hub_client.fetch_file(
            repository.repo, repository.revision, name, into=folder, expected=file
        )
        for name, file in repository.sidecars.items()
    }
    fetcher = ShardFetcher(repository, folder, progress)
    open_shards = _OpenShards(keep_files)
    shards, stored = _read_headers(repository, fetcher, open_shards, local_paths.get(INDEX_FILE))
    sidecars: dict[str, bytes | Path] = {
        name: path
        for name, path in local_paths.items()
        if name not in ("config.json", INDEX_FILE) and "/" not in name
    }
    templates = {
        path.stem: read_template(path) for name, path in local_paths.items() if "/" in name
    }
    add_named_templates(sidecars, templates)
    tensors = join_quantized_tensors(stored, repository.config)
    try:
        yield CheckpointSource(
            dict(repository.config),
            tensors,
            sidecars,
            tuple(shards),  # type: ignore[arg-type]
            describe_origins(tensors),
        )
        open_shards.close()
    except BaseException:
        for shard in open_shards.shards:
            shard.close(delete=False)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def read_remote_headers(repository: Repository) -> CheckpointSource:
    """Read names, shapes and dtypes of a repository's tensors; only headers are downloaded.

    Raises:
        CheckpointError: a header or the index is invalid.
        DownloadError, OfflineError, GatedModel: see ``hub_client``.
    """
    index = None
    if INDEX_FILE in repository.sidecars:
        index = hub_client.fetch_file(repository.repo, repository.revision, INDEX_FILE)
    with tempfile.TemporaryDirectory() as folder:
        fetcher = ShardFetcher(repository, Path(folder))
        _, stored = _read_headers(repository, fetcher, _OpenShards(), index)
    return CheckpointSource(
        dict(repository.config), join_quantized_tensors(stored, repository.config)
    )


def _read_headers(
    repository: Repository, fetcher: ShardFetcher, open_shards: _OpenShards, index: Path | None
) -> tuple[list[RemoteShard], dict[str, LazyTensor]]:
    """Fetch the headers of all weight files. Return the files, and the tensors by name."""
    shards = [RemoteShard(fetcher, name) for name in repository.weights]
    stored: dict[str, LazyTensor] = {}
    ranks = {} if index is not None else find_tp_files(repository.repo, repository.weights)
    check_tp_slices(repository.repo, {shard.name: shard.tensors for shard in shards}, ranks)
    for shard in shards:
        for tensor, info in shard.tensors.items():
            name = tp_slice_name(tensor, ranks.get(shard.name))
            if name in stored:
                raise CheckpointError(
                    f"{shard.name}: tensor {name} is in an earlier file already; take another "
                    "revision"
                )
            stored[name] = RemoteTensor(open_shards, shard, info)
    if index is not None:
        stored = _select_indexed(stored, index, list(repository.weights))
    return shards, stored


def _select_indexed(
    stored: dict[str, LazyTensor], index: Path, files: list[str]
) -> dict[str, LazyTensor]:
    """Return the tensors that the index lists; all, if it belongs to others than these files.

    Raises:
        CheckpointError: a tensor is not in the file that the index names, and the names of the
            files do not say that they are a whole set.
    """
    content = read_json(index, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError)
    listed = content["weight_map"]
    places = {
        name: tensor.shard.name
        for name, tensor in stored.items()
        if isinstance(tensor, RemoteTensor)
    }
    wrong = [name for name, file in listed.items() if places.get(name, file) != file]
    if wrong and (files == [SINGLE_FILE] or complete_set(files) == sorted(files)):
        logger.warning("%s belongs to other files, and is left alone", INDEX_FILE)
        return stored
    if wrong:
        raise CheckpointError(
            f"{INDEX_FILE} places tensor {wrong[0]} in {listed[wrong[0]]}, where it is not; take "
            "another revision"
        )
    if extra := stored.keys() - listed.keys():
        logger.warning(
            "%d tensors that the index does not list are ignored: %s", len(extra), min(extra)
        )
    return {name: tensor for name, tensor in stored.items() if name in listed}
