"""Prefix cache on the disk: one safetensors file for each node of the tree.

A file holds the token ids from the first one on, and what the caches store of the last of them. It
is written by a thread of its own under another name, and renamed. Prompts can be read from the
files, so only their owner may read them; and whoever can write to the folder could put others
there, so each is checked against the caches of the model before it is used.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Cache
from mlxarch.checkpoint.safetensors_header import read_header
from mlxarch.engine.prefix.tree import Node, State, split_layers
from mlxarch.errors import CheckpointError
from mlxarch.system.untrusted_files import open_regular_file

logger = logging.getLogger(__name__)
FORMAT = "mlxarch-prefix-1"
SUFFIX = ".safetensors"
DAY = 86400.0
MAX_QUEUED = 16  # nodes that wait to be written; their arrays stay in memory until then
PART_SECONDS = 3600.0  # after which an unfinished file is nobody's


@dataclass(frozen=True)
class DiskLimits:
    """Limits of a folder of cached prompts.

    Attributes:
        most_bytes: bytes of all files; the least recently used are deleted.
        most_files: number of all files, which are looked through for each prompt.
        days: age since the last use after which a file is deleted.
        written_bytes: bytes that may be written in a day, because SSDs wear out.
        free_share, free_bytes: space of the disk that must stay free; the smaller one counts.
    """

    most_bytes: int = 8 * 10**9
    most_files: int = 2048
    days: float = 30.0
    written_bytes: int = 50 * 10**9
    free_share: float = 0.1
    free_bytes: int = 20 * 10**9


@dataclass(frozen=True)
class Entry:
    """A file of the cache: token ids from the root on, of which those from ``start`` on are stored."""

    path: Path
    ids: np.ndarray
    start: int

    @property
    def end(self) -> int:
        """Tokens from the root to the end of what is stored."""
        return len(self.ids)


@dataclass(frozen=True)
class Stored:
    """Contents of a file that fit the model's caches.

    Attributes:
        parts: for each layer that stores every token, what it stores of the file's tokens.
        states: for each other layer, its state after the last of them; empty if not stored.
    """

    parts: list[State]
    states: list[State]


class PrefixFiles:
    """Cached prompts in a folder, for one model with one kind of caches.

    Args:
        folder: folder of all models' files.
        key: name of everything that determines the contents besides the token ids: the model and
            its weights, the quantization of keys and values, the type of floats.
        sample: caches that hold one token.
        vocab_size: number of tokens.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        sample: Sequence[Cache | None],
        vocab_size: int,
        limits: DiskLimits | None = None,
    ) -> None:
        self._whole, self._others = split_layers(sample)
        shapes = [[(a.shape, str(a.dtype)) for a in c.arrays()] for c in sample if c is not None]
        text = json.dumps([FORMAT, version("mlx"), key, shapes])
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._root = folder
        self._limits = limits or DiskLimits()
        self._vocab_size = vocab_size
        self._entries: dict[str, Entry] = {}
        self._tasks: queue.SimpleQueue[tuple[Entry, dict[str, mx.array]] | None]
        self._tasks = queue.SimpleQueue()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._folder.glob("*.part"):  # of a process that was killed
            if time.time() - path.stat().st_mtime > PART_SECONDS:
                path.unlink(missing_ok=True)
        self._delete_old()
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            self._open(path)
        self._thread = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
        self._thread.start()

    def write(self, ids: np.ndarray, node: Node) -> None:
        """Store a node in the background, unless it is stored already or too many wait for it.

        Args:
            ids: token ids from the root to the end of the node.
        """
        name = f"{hashlib.sha256(ids.tobytes()).hexdigest()[:32]}-{node.start}"
        states = node.states
        if name in self._entries or (not states and self._others and not node.parts):
            return
        if self._tasks.qsize() >= MAX_QUEUED:
            return
        arrays = {"ids": mx.array(ids)}
        for kind, layers in (("part", node.parts), ("state", states)):
            for layer, state in enumerate(layers):
                arrays |= {f"{kind}.{layer}.{index}": array for index, array in enumerate(state)}
        mx.eval(arrays)
        entry = Entry(self._folder / f"{name}{SUFFIX}", ids, node.start)
        self._entries[name] = entry
        self._tasks.put((entry, arrays))

    def longest(self, ids: np.ndarray, matched: int, usable: int) -> tuple[Entry, int] | None:
        """File that continues a prompt furthest, and the number of tokens in common with it.

        Args:
            ids: token ids of the prompt.
            matched: tokens of it that are in memory.
            usable: tokens of it that may be reused.
        """
        best: tuple[Entry, int] | None = None
        for entry in list(self._entries.values()):
            if entry.start > matched or not entry.path.exists():
                continue
            count = min(entry.end, usable)
            differing = np.flatnonzero(entry.ids[:count] != ids[:count])
            common = int(differing[0]) if differing.size else count
            if common < entry.end and self._others:  # such layers can continue at the end only
                continue
            if common > max(matched, best[1] if best else 0):
                best = entry, common
        return best

    def load(self, entry: Entry) -> Stored | None:
        """Read a file, and note its use; None if it does not fit the caches, or is damaged."""
        try:
            arrays = cast(dict[str, mx.array], mx.load(str(entry.path)))
            stored = Stored(
                self._layers(arrays, "part", self._whole, entry),
                self._layers(arrays, "state", self._others, entry),
            )
            mx.eval(stored.parts, stored.states)
            os.utime(entry.path)
            return stored
        except (CheckpointError, RuntimeError, ValueError, OSError) as error:
            self._refuse(entry.path, error)
            return None

    def close(self) -> None:
        """Finish writing."""
        self._tasks.put(None)
        self._thread.join()

    def _layers(
        self, arrays: dict[str, mx.array], kind: str, caches: Sequence[Cache], entry: Entry
    ) -> list[State]:
        if not any(name.startswith(f"{kind}.") for name in arrays) and kind == "state":
            return []
        states: list[State] = []
        for layer, cache in enumerate(caches):
            count = len(cache.arrays())
            names = [f"{kind}.{layer}.{index}" for index in range(count)]
            state = tuple(arrays[name] for name in names if name in arrays)
            tokens = entry.end - entry.start if kind == "part" else entry.end
            if not cache.can_restore(tokens, state):
                raise CheckpointError(
                    f"{entry.path}: {kind} {layer} does not fit the model's cache"
                )
            states.append(state)
        return states

    def _open(self, path: Path) -> None:
        """Validate the header of a file, and read its token ids."""
        try:
            descriptor, status = open_regular_file(path)
            try:
                tensors, _ = read_header(descriptor, status.st_size, path)
                info = tensors.get("ids")
                start = int(path.name.removesuffix(SUFFIX).partition("-")[2])
                if info is None or info.dtype != "I32" or len(info.shape) != 1:
                    raise CheckpointError(f"{path}: it has no token ids")
                data = os.pread(descriptor, info.nbytes, info.start)
            finally:
                os.close(descriptor)
            ids = np.frombuffer(data, np.int32)
            if not 0 <= start < len(ids) or ids.min() < 0 or ids.max() >= self._vocab_size:
                raise CheckpointError(f"{path}: its token ids are out of range")
            self._entries[path.name.removesuffix(SUFFIX)] = Entry(path, ids, start)
        except (CheckpointError, ValueError, OSError) as error:
            self._refuse(path, error)

    def _refuse(self, path: Path, error: Exception) -> None:
        logger.warning("a cached prompt is deleted: %s", error)
        self._entries.pop(path.name.removesuffix(SUFFIX), None)
        with contextlib.suppress(OSError):
            path.unlink()

    def _write_all(self) -> None:
        while (task := self._tasks.get()) is not None:
            entry, arrays = task
            try:
                if not self._write(entry, arrays):
                    self._entries.pop(entry.path.name.removesuffix(SUFFIX), None)
            except Exception:  # the cache is a convenience: the engine goes on without it
                logger.exception("a prompt could not be cached in %s", entry.path)
                self._entries.pop(entry.path.name.removesuffix(SUFFIX), None)

    def _write(self, entry: Entry, arrays: dict[str, mx.array]) -> bool:
        """Write a file unless that would exceed a limit; gives whether it was written."""
        size = sum(array.nbytes for array in arrays.values())
        disk = shutil.disk_usage(self._folder)
        floor = min(self._limits.free_share * disk.total, self._limits.free_bytes)
        written = self._written_today()
        if disk.free - size < floor or written + size > self._limits.written_bytes:
            return False
        temporary = entry.path.with_suffix(".part")
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                mx.save_safetensors(file, arrays, {"format": FORMAT})
                file.flush()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(entry.path)
        self._note_written(written + size)
        self._delete_old()
        return True

    def _delete_old(self) -> None:
        """Delete the least recently used files beyond the limits, those of other models as well."""
        found = [(path, path.stat()) for path in self._root.glob(f"*/*{SUFFIX}")]
        found.sort(key=lambda each: each[1].st_mtime)
        total = sum(status.st_size for _, status in found)
        oldest = time.time() - self._limits.days * DAY
        for index, (path, status) in enumerate(found):
            too_many = len(found) - index > self._limits.most_files
            if total <= self._limits.most_bytes and not too_many and status.st_mtime >= oldest:
                break
            total -= status.st_size
            if path.parent == self._folder:
                self._entries.pop(path.name.removesuffix(SUFFIX), None)
            with contextlib.suppress(OSError):
                path.unlink()

    def _written_today(self) -> int:
        try:
            day, _, count = (self._root / "written").read_text().partition(" ")
            return int(count) if day == _today() else 0
        except (OSError, ValueError):
            return 0

    def _note_written(self, count: int) -> None:
        (self._root / "written").write_text(f"{_today()} {count}")


def _today() -> str:
    return time.strftime("%Y-%m-%d")
