"""Download of single files of the Hub, which goes on where an earlier attempt stopped.

huggingface_hub discards what arrived when a transfer ends early. Here it stays in
``<etag>.incomplete`` beside its target, and a range request fetches the rest. A file is moved to
its target once its size and, where the Hub states it, its SHA-256 are right.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from mlxarch.errors import DownloadError
from mlxarch.hub.catalog import COMMIT_HASH
from mlxarch.hub.hub_cache import cache_folder, repository_folder
from mlxarch.hub.hub_errors import is_transient, translate_hub_errors
from mlxarch.progress import Progress, format_size, silent
from mlxarch.system.checksums import sha256_file

TIMEOUT_SECONDS = 10.0
"""Timeout for each response of the Hub, and for each piece of a file."""
_LARGE_BYTES = 8 << 20
_ATTEMPTS = 5  # in a row that bring no byte
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: path in the repository.
        size: in bytes.
        sha256: checksum, if the Hub states it, which it does for weight files.
    """

    name: str
    size: int
    sha256: str | None


def fetch_file(
    repo: str,
    revision: str,
    name: str,
    *,
    into: Path | None = None,
    progress: Progress = silent,
    expected: RemoteFile | None = None,
) -> Path:
    """Download one file, unless it is there, and return its path.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit.
        name: path in the repository.
        into: target folder of one commit; the Hub's cache if None.
        progress: callback.
        expected: metadata of a file that may be large: its download can be resumed, and its SHA-256
            is verified.

    Raises:
        ModelNotFound, GatedModel, OfflineError: it cannot be had.
        DownloadError: the transfer broke off, or what arrived is not the file that was announced.
        DiskSpaceError: the disk is full; what arrived is kept.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    label = f"downloading {repo}"
    with translate_hub_errors(repo, revision, name, started=True):
        cached = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(cached, str) and (COMMIT_HASH.fullmatch(revision) or into is not None):
            return Path(cached)
        if into is not None and (into / name).is_file():
            return into / name
        if expected and (expected.sha256 or expected.size >= _LARGE_BYTES):
            _Transfer(repo, revision, expected, into, progress).run()
        if into is not None and (into / name).is_file():
            return into / name
        # of a file that has arrived, this makes the entry in the cache
        bar = _progress_bar_class(label, progress)
        return Path(hf_hub_download(repo, name, revision=revision, local_dir=into, tqdm_class=bar))


def bytes_here(repo: str, file: RemoteFile, into: Path | None = None) -> int:
    """Return how much of a file that is not complete was received by earlier attempts."""
    if file.sha256 is None:
        return 0
    try:
        return min(_partial_path(repo, file.sha256, into).stat().st_size, file.size)
    except OSError:
        return 0


def _partial_path(repo: str, etag: str, into: Path | None) -> Path:
    folder = into / ".incomplete" if into else repository_folder(repo) / "blobs"
    return folder / f"{etag}.incomplete"


class _Transfer:
    """Transfer of one file into the cache's blobs or into a folder.

    Args:
        repo, revision: where the file is.
        file: its name, size and checksum.
        into: target folder; the Hub's cache if None.
        progress: callback.
    """

    def __init__(
        self, repo: str, revision: str, file: RemoteFile, into: Path | None, progress: Progress
    ) -> None:
        self.repo = repo
        self.revision = revision
        self.file = file
        self.into = into
        self.progress = progress

    def run(self) -> None:
        """Fetch what is missing, verify the whole, and move it to its target.

        Raises:
            DownloadError: see ``fetch_file``.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import WeakFileLock

        url = hf_hub_url(self.repo, self.file.name, revision=self.revision)
        metadata = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS, retry_on_errors=True)
        etag = metadata.etag or ""
        if metadata.size not in (None, self.file.size):
            raise self._is_another_file(str(metadata.size))
        if not re.fullmatch(r"[\w-]+", etag):  # it must serve as a file name
            return
        partial = _partial_path(self.repo, etag, self.into)
        partial.parent.mkdir(parents=True, exist_ok=True)
        if self.into is None:
            target = partial.with_name(etag)
            # the lock of huggingface_hub for the same file
            lock = cache_folder() / ".locks" / partial.parent.parent.name / f"{etag}.lock"
        else:
            target = self.into / self.file.name
            lock = partial.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not target.is_file():
                self._complete(url, partial)
                os.replace(partial, target)
        if self.into is not None:
            lock.unlink(missing_ok=True)

    def _complete(self, url: str, partial: Path) -> None:
        """Receive and verify the partial file; one that was damaged earlier is fetched anew."""
        resumed = partial.exists()
        try:
            self._receive(url, partial)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"{self.file.name}: {format_size(partial.stat().st_size)} of "
                f"{format_size(self.file.size)} are kept; the same command goes on from there"
            )
            raise
        expected = self.file.sha256
        if expected is None or (found := sha256_file(partial, self.progress)) == expected:
            return
        partial.unlink()
        if resumed:
            self._complete(url, partial)
            return
        raise DownloadError(
            f"{self.file.name} arrived damaged: its SHA-256 is {found}, and the Hub states "
            f"{expected}. It is removed; run the same command again, and if that repeats, look "
            "to the network or the mirror (HF_ENDPOINT)"
        )

    def _receive(self, url: str, partial: Path) -> None:
        """Append to the partial file until it is complete."""
        size = self.file.size
        label = f"downloading {self.repo}"
        # unbuffered: what is written survives the end of the process
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as output:
            if os.fstat(output.fileno()).st_size > size:
                output.truncate(0)
            failures = 0
            while (done := output.seek(0, os.SEEK_END)) < size:
                self.progress(label, done, size)
                error: Exception | None = None
                try:
                    for piece in self._pieces(url, output):
                        _write(output, piece)
                        self.progress(label, output.tell(), size)
                except Exception as failure:
                    if not is_transient(failure):
                        raise
                    error = failure
                failures = 0 if output.tell() > done else failures + 1
                if failures == _ATTEMPTS:
                    raise error or DownloadError(
                        f"{self.repo}/{self.file.name}: the Hub ends the transfer at byte {done} of "
                        f"{size}; run the same command again"
                    )
                if output.tell() < size:
                    time.sleep(2**failures / 2)
            os.fsync(output.fileno())

    def _pieces(self, url: str, output: FileIO) -> Iterator[bytes]:
        """Yield the bytes from the position of ``output`` on, which is set back if there is no range.

        Raises:
            DownloadError: the server has another file than the one announced.
        """
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        start = output.tell()
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        longest = constants.MAX_HTTP_DOWNLOAD_SIZE  # the Hub's servers send no more in one response
        if self.file.size - start > longest:
            headers["Range"] = f"bytes={start}-{start + longest - 1}"
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as response:
            if response.status_code != 416 or not start:
                hf_raise_for_status(response)
            if start and not self._continues(response, start):
                output.seek(0)
                output.truncate(0)
                if response.status_code != 200:
                    return  # the next request is for the whole file
            for piece in response.iter_bytes():
                if output.tell() + len(piece) > self.file.size:
                    output.truncate(0)
                    raise self._is_another_file("more")
                yield piece

    def _continues(self, response: Any, start: int) -> bool:
        """Return whether a response holds the bytes from ``start`` on."""
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != start:
            return False
        if found[2] not in ("*", str(self.file.size)):
            raise self._is_another_file(found[2])
        return "Content-Encoding" not in response.headers

    def _is_another_file(self, size: str) -> DownloadError:
        return DownloadError(
            f"{self.repo}/{self.file.name} has {size} bytes at the Hub, and {self.file.size} were "
            "announced: it changed meanwhile. Run the same command again"
        )


def _write(output: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[output.write(view) :]


def _progress_bar_class(label: str, progress: Progress) -> Any:
    """Create a class with tqdm's interface, for huggingface_hub, that calls ``progress``."""

    class ProgressBar:
        def __init__(self, *_: object, **options: Any) -> None:
            self.total = int(options.get("total") or 0)
            self.n = 0
            self.update(options.get("initial") or 0)

        def __enter__(self) -> "ProgressBar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            progress(label, self.n, max(self.total, self.n))

        def _ignore(self, *_: object, **__: object) -> None: ...

        update_transfer = set_postfix_str = set_transfer_postfix_str = _ignore
        set_description = set_description_str = refresh = close = clear = _ignore

    return ProgressBar
