"""Disks that fail at a chosen operation, and a process that kills conversions and takes them up again.

As a program it reads jobs, one JSON object a line, from stdin, and answers each on stdout. It imports MLX once and
never computes with it, so that it can fork a process for each job. ``at`` of a job counts writes, syncs and renames
from 0; without it, the process is killed ``after`` seconds, or runs to its end.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxarch.errors import MlxArchError
from mlxarch.quantize.conversion import Limits
from mlxarch.quantize.convert_checkpoint import prepare
from mlxarch.system.durable_files import Disk


class FaultyDisk(Disk):
    """Counts writes, syncs and renames, and lets ``fault(number, name)`` interfere before each.

    ``written`` is the bytes that arrived. A fault raises, kills, or returns the number of bytes to write at most.
    """

    def __init__(self, fault: Callable[[int, str], int | None]) -> None:
        self.fault, self.count, self.written = fault, 0, 0

    def _next(self, name: str) -> int | None:
        self.count += 1
        return self.fault(self.count - 1, name)

    def pwrite(self, descriptor: int, data: memoryview, position: int) -> int:
        limit = self._next("write")
        count = super().pwrite(descriptor, data[:limit], position)
        self.written += count
        return count

    def sync(self, descriptor: int) -> None:
        self._next(
            "sync"
        )  # and no more: what is written survives a killed process, if not a power cut

    def rename(self, old: Path, new: Path) -> None:
        self._next("rename")
        super().rename(old, new)


class FullDisk(FaultyDisk):
    """Has room for ``room`` bytes more, whatever it says."""

    def __init__(self, room: int) -> None:
        super().__init__(self._fill)
        self.room = room

    def _fill(self, number: int, name: str) -> int | None:
        if name != "write":
            return None
        if self.written >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.room - self.written


def kill_at(moment: int, how: str) -> Callable[[int, str], int | None]:
    """SIGKILL at operation ``moment``: before it, or, where it is a write and ``how`` is "torn", in the midst of it."""

    torn = False

    def fault(number: int, name: str) -> int | None:
        nonlocal torn
        if how == "torn" and name == "write" and number == moment:
            torn = True
            return 3  # bytes; the rest is never written
        if number == moment or torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    return fault


def work(job: dict[str, Any]) -> dict[str, Any]:
    disk = FaultyDisk(
        kill_at(job["at"], job.get("how", "")) if "at" in job else lambda number, name: None
    )
    conversion = prepare(
        job["source"],
        job["output"],
        bits=job["bits"],
        method="round",
        limits=Limits(*job["limits"]),
        disk=disk,
    )
    try:
        conversion.run(force=job["force"])
    except MlxArchError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "operations": disk.count,
        "written": disk.written,
        "total": sum(s.size for s in conversion.layout.shards),
    }


def forked(job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work(job)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    if "after" in job:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status), **(json.loads(answer) if answer else {})}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)
