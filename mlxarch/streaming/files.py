"""Files that a running model reads from: exact positional reads, and a file that changed is noticed at once."""

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxarch.checkpoint import Shard

MAX_RETRIES = 100  # of a read that was interrupted before it gave a byte
MAX_VECTORS = 512  # buffers that one call fills; POSIX allows 1024 on every system that Python runs on


class ReadFailed(Exception):
    """A read did not bring what was there when the file was opened. Whoever knows what was read says so to a person."""


class RecordFile:
    """A file of a checkpoint, held open: one put in its place under the same name is never read by mistake.

    Nothing is mapped into memory: a file cut short ends a read with an error, and not the process with a signal.
    Several threads may read at once.
    """

    def __init__(self, shard: Shard) -> None:
        self.path: Path = shard.path
        self._fd = shard.duplicate()
        self._close = weakref.finalize(self, os.close, self._fd)
        self._identity = _identity(self._fd)

    def read(self, buffers: Sequence[Any], position: int) -> None:
        """Fill writable buffers, one behind the other, with the bytes from ``position`` on.

        Raises:
            ReadFailed: the file is shorter, has changed since it was opened, or the device fails twice.
        """
        self._check()
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        while views:
            count = self._read_some(views[:MAX_VECTORS], position)
            if count == 0:
                raise ReadFailed(f"the file ends at byte {position}, before what was to be read")
            position += count
            views = _behind(views, count)

    def _read_some(self, views: list[memoryview], position: int) -> int:
        failed = False
        for _ in range(MAX_RETRIES):
            try:
                return os.preadv(self._fd, views, position)
            except (InterruptedError, BlockingIOError):
                continue
            except OSError as problem:
                if problem.errno != errno.EIO or failed:
                    raise ReadFailed(f"the system reports: {problem.strerror or problem}") from problem
                failed = True  # a bus that was reset, a cable: once more
        raise ReadFailed(f"the read was interrupted {MAX_RETRIES} times")

    def _check(self) -> None:
        try:
            same = _identity(self._fd) == self._identity
        except OSError as problem:
            raise ReadFailed(f"the system reports: {problem.strerror or problem}") from problem
        if not same:
            raise ReadFailed("the file was changed or cut short while the model runs; load the model again")

    def close(self) -> None:
        """Close it; closing again is no error."""
        self._close()


def _identity(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers when the first ``count`` bytes are filled."""
    while views and count >= views[0].nbytes:
        count -= views[0].nbytes
        views = views[1:]
    return [views[0][count:], *views[1:]] if count else views
