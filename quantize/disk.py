"""Every write, sync and rename of a conversion: one small class, so that a test can let any of them fail."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

from mlxarch.errors import DiskSpaceError, OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Disk:
    """The file system, with the durability that resuming needs. Methods raise OSError."""

    def open(self, path: Path) -> int:
        """A descriptor to write at any position of ``path``, which is made if need be."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def pwrite(self, descriptor: int, data: memoryview, position: int) -> int:
        """Write at ``position``; returns how many bytes were written, which may be fewer."""
        return os.pwrite(descriptor, data, position)

    def sync(self, descriptor: int) -> None:
        """Return once everything written has reached the medium."""
        if sys.platform == "darwin":  # fsync alone stops at the drive's cache there
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or a folder another name on the same file system, in one step."""
        os.rename(old, new)

    def free(self, folder: Path) -> int:
        """Bytes that this user may still write."""
        return shutil.disk_usage(folder).free

    def write(self, descriptor: int, data: bytes | memoryview, position: int) -> None:
        """Write all of ``data`` at ``position``."""
        rest = memoryview(data).cast("B")
        while rest:
            count = self.pwrite(descriptor, rest, position)
            rest, position = rest[count:], position + count

    def write_file(self, path: Path, data: bytes) -> None:
        """A small file as a whole, synced."""
        descriptor = self.open(path)
        try:
            os.ftruncate(descriptor, 0)
            self.write(descriptor, data, 0)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in ``folder`` durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """A file, a link (not what it points to) or a folder with all it holds; nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def as_output_error(error: OSError, output: Path, needed: int, free: int, kept: bool) -> OutputError:
    """What a failed operation means to the person: ``needed`` and ``free`` are bytes, ``kept`` whether what is written
    so far is there to go on with.
    """
    if error.errno in NO_SPACE:
        remedy = "Free some space and run the same command again"
        if kept:
            remedy = "What is written so far is kept: free some space and run the same command again to go on"
        return DiskSpaceError(
            f"the disk is full: {output} still needs {size(needed)}, and {size(free)} are free. {remedy}"
        )
    remedy = "Once that is put right, run the same command again"
    if kept:
        remedy = "Nothing is lost: once that is put right, the same command goes on from where this one stopped"
    place = f" ({error.filename})" if error.filename else ""
    return OutputError(f"{output} could not be written: {error.strerror or error}{place}. {remedy}")


def size(count: int) -> str:
    """Bytes for a person, with the exact number where it is short: 12 bytes, 3.4 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
