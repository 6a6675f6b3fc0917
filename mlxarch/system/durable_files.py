"""Durable file operations of a conversion, in one class so that tests can make any fail."""

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
    """File system operations, durable enough to resume from. Methods raise OSError."""

    def open(self, path: Path) -> int:
        """Open or create ``path`` for writing at any position; returns the descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def pwrite(self, descriptor: int, data: memoryview, position: int) -> int:
        """Write at ``position``; returns the number of bytes written, which may be smaller."""
        return os.pwrite(descriptor, data, position)

    def sync(self, descriptor: int) -> None:
        """Flush everything written to the storage medium."""
        if sys.platform == "darwin":  # fsync alone stops at the drive's cache there
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or folder atomically, within one file system."""
        os.rename(old, new)

    def free(self, folder: Path) -> int:
        """Return the bytes that this user may still write."""
        return shutil.disk_usage(folder).free

    def write(self, descriptor: int, data: bytes | memoryview, position: int) -> None:
        """Write all of ``data`` at ``position``."""
        rest = memoryview(data).cast("B")
        while rest:
            count = self.pwrite(descriptor, rest, position)
            rest = rest[count:]
            position += count

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a small file completely, and sync it."""
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
        """Remove a file, a link (not its target) or a folder with its contents, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def to_output_error(
    error: OSError, output: Path, needed: int, free: int, kept: bool
) -> OutputError:
    """Convert a failed file operation to an OutputError with a remedy.

    Args:
        error: the failure.
        output: the folder that was to be written.
        needed: bytes still to be written.
        free: bytes free on the disk.
        kept: whether the files written so far are kept, so that the same command resumes.
    """
    if error.errno in NO_SPACE:
        remedy = "Free some space and run the same command again"
        if kept:
            remedy = (
                "What is written so far is kept: free some space and run the same command again to "
                "go on"
            )
        return DiskSpaceError(
            f"the disk is full: {output} still needs {format_bytes(needed)}, and "
            f"{format_bytes(free)} are free. {remedy}"
        )
    remedy = "Once that is put right, run the same command again"
    if kept:
        remedy = (
            "Nothing is lost: once that is put right, the same command goes on from where this one "
            "stopped"
        )
    place = f" ({error.filename})" if error.filename else ""
    return OutputError(f"{output} could not be written: {error.strerror or error}{place}. {remedy}")


def format_bytes(count: int) -> str:
    """Format a number of bytes with two decimals, and small numbers exactly: 3.40 GB, 12 bytes."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
