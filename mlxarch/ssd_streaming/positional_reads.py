"""Positional reads from checkpoint files of a running model, with detection of changed files."""

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.shards import Shard

MAX_RETRIES = 100  # of a read that was interrupted before it returned a byte
MAX_VECTORS = 512  # buffers of one call; every system that Python runs on allows 1024


class ReadFailed(Exception):
    """Failed read; the caller, who knows what was read, turns it into a message."""


class RecordFile:
    """Open file of a checkpoint. Several threads may read at once.

    The file is held open, so that another file under the same name is never read by mistake. It is
    not mapped into memory: reading a truncated file raises an error, while a mapping would end the
    process with a signal.
    """

    def __init__(self, shard: Shard) -> None:
        self.path: Path = shard.path
        self._fd = shard.duplicate()
        self._close = weakref.finalize(self, os.close, self._fd)
        self._identity = _identity(self._fd)

    def read(self, buffers: Sequence[Any], position: int) -> None:
        """Fill writable buffers one after the other with the bytes from ``position`` on.

        Raises:
            ReadFailed: the file is shorter, has changed since it was opened, or the device fails
                twice.
        """
        self._check()
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        while views:
            count = self._read_some(views[:MAX_VECTORS], position)
            if count == 0:
                raise ReadFailed(f"the file ends at byte {position}, before what was to be read")
            position += count
            views = _remaining(views, count)

    def _read_some(self, views: list[memoryview], position: int) -> int:
        failed = False
        for _ in range(MAX_RETRIES):
            try:
                return os.preadv(self._fd, views, position)
            except (InterruptedError, BlockingIOError):
                continue
            except OSError as problem:
                if problem.errno != errno.EIO or failed:
                    raise ReadFailed(
                        f"the system reports: {problem.strerror or problem}"
                    ) from problem
                failed = True  # a reset bus or a loose cable: try once more
        raise ReadFailed(f"the read was interrupted {MAX_RETRIES} times")

    def _check(self) -> None:
        """Raise ReadFailed if the file has changed since it was opened."""
        try:
            same = _identity(self._fd) == self._identity
        except OSError as problem:
            raise ReadFailed(f"the system reports: {problem.strerror or problem}") from problem
        if not same:
            raise ReadFailed(
                "the file was changed or cut short while the model runs; load the model again"
            )

    def close(self) -> None:
        """Close the file; closing it again is not an error."""
        self._close()


def _identity(fd: int) -> tuple[int, ...]:
    """Device, inode, size and modification time of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _remaining(views: list[memoryview], count: int) -> list[memoryview]:
    """Buffers that remain after the first ``count`` bytes are filled."""
    while views and count >= views[0].nbytes:
        count -= views[0].nbytes
        views = views[1:]
    return [views[0][count:], *views[1:]] if count else views
