"""A repository as a source of tensors that is read while it downloads: one weight file is on the disk at a time (of
slices for tensor parallelism, those of the same tensors).

The headers of all weight files come first, by range requests, and are validated as those of local files are; so names,
shapes and dtypes are known before a weight is fetched.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlxarch import hub, paths
from mlxarch.checkpoint import INDEX, Shard, TensorInfo, read_json
from mlxarch.errors import CheckpointError
from mlxarch.hub import Repository, shifted
from mlxarch.progress import Progress, silent
from mlxarch.safetensors_header import read_header
from mlxarch.tensor_parallel import check_slices, group_of, slice_name, sliced_files
from mlxarch.tensors import DTYPES, Stored, Tensor
from mlxarch.weights import Source, notes_on, pack

logger = logging.getLogger(__name__)


class ShardFetcher:
    """Weight files of a repository, fetched into ``folder`` when they are asked for and deleted when they are not.

    A file that the Hub's cache holds is used there, and never deleted.
    """

    def __init__(self, repository: Repository, folder: Path, progress: Progress = silent) -> None:
        self.repository, self.folder, self.progress = repository, folder, progress
        self._fetched: dict[str, Path] = {}

    def fetch(self, name: str) -> Path:
        """Where the file is; see ``hub.fetch`` for what is raised."""
        if name not in self._fetched:
            repository = self.repository
            order = list(repository.weights)
            before = sum(repository.weights[earlier].size for earlier in order[: order.index(name)])
            report = shifted(self.progress, before, repository.weight_bytes)
            self._fetched[name] = hub.fetch(
                repository.repo,
                repository.revision,
                name,
                into=self.folder,
                progress=report,
                expected=repository.weights.get(name),
            )
        return self._fetched[name]

    def release(self, name: str) -> None:
        """Delete the file, if it was fetched into ``folder``."""
        path = self._fetched.pop(name, None)
        if path is not None and path.parent == self.folder:
            path.unlink(missing_ok=True)


class RemoteShard:
    """A weight file of which only the header is here; the file itself is fetched when a tensor is read."""

    def __init__(self, fetcher: ShardFetcher, name: str) -> None:
        file = fetcher.repository.weights[name]
        self.fetcher, self.name, self.size = fetcher, name, file.size
        self.path = fetcher.folder / "headers" / name
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_bytes(hub.header(fetcher.repository.repo, fetcher.repository.revision, file))
            partial.rename(self.path)
        with self.path.open("rb") as header:
            self.tensors, _ = read_header(header.fileno(), file.size, f"{fetcher.repository.repo}/{name}")
        self._open: Shard | None = None

    def opened(self) -> Shard:
        """The file, fetched and validated.

        Raises:
            CheckpointError: it is not the one whose header was read.
        """
        if self._open is None:
            shard = Shard.open(self.fetcher.fetch(self.name))
            if shard.tensors != self.tensors:
                shard.close()
                raise CheckpointError(
                    f"{self.name} is another file than the one announced; run the same command again, or pin a revision"
                )
            self._open = shard
        return self._open

    def check_unchanged(self) -> None:
        """Nothing to do: a commit does not change, and what was fetched was checked."""

    def close(self) -> None:
        """Let go of the file and delete it, unless it belongs to the Hub's cache."""
        if self._open is not None:
            self._open.close()
            self._open = None
            self.fetcher.release(self.name)


class _Window:
    """Holds open the file that was read last, and those that are read together with it; with ``keep``, all of them."""

    def __init__(self, keep: bool = False) -> None:
        self.keep, self.current = keep, list[RemoteShard]()

    def open(self, shard: RemoteShard) -> Shard:
        if not self.keep and self.current and group_of(self.current[0].name) != group_of(shard.name):
            self.close()
        if shard not in self.current:
            self.current.append(shard)
        return shard.opened()

    def close(self) -> None:
        while self.current:
            self.current.pop().close()


class RemoteTensor(Tensor):
    """A tensor of a file that may not be here yet."""

    def __init__(self, window: _Window, shard: RemoteShard, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{shard.name}: tensor {info.name} has dtype {info.dtype}; mlxarch reads {', '.join(DTYPES)}. "
                "Take a repository with bfloat16, float16 or float32 weights"
            )
        self.window, self.shard, self.info = window, shard, info
        self.shape, self.dtype = info.shape, DTYPES[info.dtype]

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor."""
        return Stored(self.window.open(self.shard), self.info).rows(start, stop)


@contextmanager
def open_remote(repository: Repository, progress: Progress = silent, *, keep: bool = False) -> Iterator[Source]:
    """A repository as a Source whose tensors come file by file; use it within the block.

    What was fetched is deleted when the block ends well, and without ``keep`` when the next file is read, so that files
    had better be read in turn. After an error it stays, for the next attempt to go on with.

    Raises:
        CheckpointError: a header, or the index, breaks a rule.
        DownloadError, OfflineError, GatedModel: see ``hub``.
    """
    folder = paths.cache() / "downloads" / f"{repository.repo.replace('/', '--')}@{repository.revision}"
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        name: hub.fetch(repository.repo, repository.revision, name, into=folder, expected=file)
        for name, file in repository.sidecars.items()
    }
    fetcher, window = ShardFetcher(repository, folder, progress), _Window(keep)
    shards, stored = _tensors(repository, fetcher, window, where.get(INDEX))
    sidecars = {name: path for name, path in where.items() if name not in ("config.json", INDEX)}
    tensors = pack(stored, repository.config)
    try:
        yield Source(dict(repository.config), tensors, sidecars, tuple(shards), notes_on(tensors))  # type: ignore[arg-type]
        window.close()
    except BaseException:
        for shard in window.current:
            if shard._open is not None:
                shard._open.close()  # the file stays
        raise
    shutil.rmtree(folder, ignore_errors=True)


def headers(repository: Repository) -> Source:
    """A repository as a Source of which only shapes and types are known: the headers of its weight files are fetched.

    Raises:
        CheckpointError: a header, or the index, breaks a rule.
        DownloadError, OfflineError, GatedModel: see ``hub``.
    """
    indexed = INDEX in repository.sidecars
    index = hub.fetch(repository.repo, repository.revision, INDEX) if indexed else None
    with tempfile.TemporaryDirectory() as folder:
        _, stored = _tensors(repository, ShardFetcher(repository, Path(folder)), _Window(), index)
    return Source(dict(repository.config), pack(stored, repository.config))


def _tensors(
    repository: Repository, fetcher: ShardFetcher, window: _Window, index: Path | None
) -> tuple[list[RemoteShard], dict[str, Tensor]]:
    """The weight files, whose headers are fetched, and the tensors in them by name."""
    shards = [RemoteShard(fetcher, name) for name in repository.weights]
    stored: dict[str, Tensor] = {}
    ranks = {} if index is not None else sliced_files(repository.repo, repository.weights)
    check_slices(repository.repo, {shard.name: shard.tensors for shard in shards}, ranks)
    for shard in shards:
        for tensor, info in shard.tensors.items():
            name = slice_name(tensor, ranks.get(shard.name))
            if name in stored:
                raise CheckpointError(
                    f"{shard.name}: tensor {name} is in an earlier file already; take another revision"
                )
            stored[name] = RemoteTensor(window, shard, info)
    return shards, _as_indexed(stored, index) if index is not None else stored


def _as_indexed(stored: dict[str, Tensor], index: Path) -> dict[str, Tensor]:
    """The tensors that the index lists; both must say the same of each."""
    listed = read_json(index, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError)["weight_map"]
    for name, file in listed.items():
        tensor = stored.get(name)
        if not isinstance(tensor, RemoteTensor) or tensor.shard.name != file:
            raise CheckpointError(f"{INDEX} places tensor {name} in {file}, where it is not; take another revision")
    if extra := stored.keys() - listed.keys():
        logger.warning("%d tensors that the index does not list are left alone: %s", len(extra), min(extra))
    return {name: tensor for name, tensor in stored.items() if name in listed}
