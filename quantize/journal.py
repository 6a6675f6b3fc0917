"""The place where an output grows: beside its target, held by one process, safe to kill at any moment.

out.partial/
    lock       held while somebody works here
    journal    line 1: what is being made; then, line by line, which parameters are on the medium and what of
              each was lost
    model/     becomes out by one rename
    replaced/  what was out before, from just before that rename until just after it
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlxarch.errors import OutputError, QuantizationError
from mlxarch.quantize.disk import Disk
from mlxarch.weights import Source

logger = logging.getLogger(__name__)


class Workspace:
    """The partial folder of one output. Enter it to hold it; leaving keeps what the next run can go on with.

    Methods raise OSError where the disk fails.

    Attributes:
        resumable: whether the journal names parameters, so that the next run of the same work has less to do.
    """

    def __init__(self, output: Path, disk: Disk) -> None:
        self.output, self.disk = output, disk
        self.folder = output.with_name(output.name + ".partial")
        self.model = self.folder / "model"
        self._replaced = self.folder / "replaced"
        self._journal = self.folder / "journal"
        self._lock_file = self.folder / "lock"
        self._lock = self._log = -1
        self._log_size = 0
        self.resumable = self._begun = False

    def __enter__(self) -> "Workspace":
        """Take the lock and put right what a killed run left.

        Raises:
            OutputError: another process holds it.
        """
        self._acquire()
        try:
            self._recover()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if not os.path.lexists(self._replaced):
            with contextlib.suppress(OSError):
                if error is QuantizationError:  # another source is needed, and what came of this one is of no use
                    self.resumable = False
                if self._begun and not self.resumable:
                    self.disk.remove(self.model)
                if self.model.exists():
                    self.model.rmdir()  # fails, and ends this, where there is something to go on with
                self._journal.unlink(missing_ok=True)
                self._lock_file.unlink(missing_ok=True)  # while it is held: whoever opens it next makes a new one
                self.folder.rmdir()
        for descriptor in (self._log, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._log = self._lock = -1

    def check_target(self, replace: bool) -> None:
        """Refuse a place that cannot be written to, and an existing target, unless it may be replaced and is a model
        folder or an empty one.

        Raises:
            OutputError: it is there and must stay, or nothing can be made beside it.
        """
        place = next(place for place in self.output.parents if os.path.lexists(place))
        if not place.is_dir() or not os.access(place, os.W_OK):
            found = "may not be written to" if place.is_dir() else "is no folder"
            raise OutputError(f"{self.output} cannot be made: {place} {found}; name another output")
        if not os.path.lexists(self.output):
            return
        if not replace:
            raise OutputError(f"{self.output} exists already; name another output, or replace it with --force")
        folder = self.output.is_dir()
        if not folder or not ((self.output / "config.json").is_file() or not any(self.output.iterdir())):
            raise OutputError(
                f"{self.output} exists and holds no model (it has no config.json), so --force does not replace it; "
                "name another output, or remove it yourself"
            )

    def resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What an earlier run of the same work recorded, by name; empty, and a clean start, if there was none."""
        self._begun, line = True, json.dumps(identity, sort_keys=True)
        lines = self._journal.read_text("ascii", "replace").splitlines(keepends=True) if self._journal.is_file() else []
        if lines and lines[0] == line + "\n" and self.model.is_dir():
            lines = [entry for entry in lines if entry.endswith("\n")]  # one cut short by a crash is not there
            self._log, self._log_size = self.disk.open(self._journal), len("".join(lines))  # ASCII
            logger.info("%s: going on where an earlier run stopped", self.folder)
            facts = {name: fact for entry in lines[1:] for name, fact in json.loads(entry).items()}
            self.resumable = bool(facts)
            return facts
        if lines:
            logger.info("%s: an earlier run made something else; starting anew", self.folder)
        for old in (self._journal, self.model):
            self.disk.remove(old)
        self.model.mkdir()
        self._log, self._log_size = self.disk.open(self._journal), 0
        self._append(line)
        self.disk.sync_folder(self.folder)
        return {}

    def record(self, facts: Mapping[str, Any]) -> None:
        """Note that the bytes of these names have been synced, with a fact about each, in JSON."""
        self._append(json.dumps(facts, sort_keys=True, ensure_ascii=True))
        self.resumable = True

    def _append(self, line: str) -> None:
        data = line.encode() + b"\n"
        self.disk.write(self._log, data, self._log_size)
        self.disk.sync(self._log)
        self._log_size += len(data)

    def discard(self) -> None:
        """Keep nothing of what was made."""
        self.resumable, self._begun = False, True

    def publish(self, files: Collection[str]) -> None:
        """Rename the model, which consists of ``files``, to its target. What stood there is removed afterwards."""
        for path in self.model.iterdir():
            if path.name not in files:
                self.disk.remove(path)
        self.disk.sync_folder(self.model)
        if os.path.lexists(self.output):
            self.disk.rename(self.output, self._replaced)
        self.disk.rename(self.model, self.output)
        self.disk.sync_folder(self.output.parent)
        self.disk.remove(self._replaced)

    def _acquire(self) -> None:
        while self._lock < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                present = os.listdir(self.folder)
                if present and self._lock_file.name not in present:  # ours have one from first to last
                    raise OutputError(f"{self.folder} is in the way: it is no unfinished output; move it elsewhere")
                lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its last holder was just done and removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_file)):
                    self._lock = lock
            except BlockingIOError:
                raise OutputError(
                    f"another process is writing {self.output}; wait for it, or name another output"
                ) from None
            except FileNotFoundError:
                pass
            finally:
                if self._lock < 0:
                    os.close(lock)

    def _recover(self) -> None:
        if os.path.lexists(self._replaced):
            if not os.path.lexists(self.output):  # killed between the two renames
                self.disk.rename(self._replaced, self.output)
                self.disk.sync_folder(self.output.parent)
                logger.warning("%s: put back; a run that was to replace it had been killed", self.output)
            elif not self.model.exists():  # killed after both
                self.disk.remove(self._replaced)
            else:
                raise OutputError(
                    f"{self.output} was made by somebody else while its former contents are in {self._replaced}, where "
                    "a killed run had set them aside; move one of the two away"
                )


def fingerprint(source: Source) -> str:
    """Changes when the source does: by names, sizes and times of its files, or what it says of itself."""
    files = [(shard.path.name, shard.size, os.stat(shard.path).st_mtime_ns) for shard in source.shards]
    tensors = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in source.tensors.items()]
    facts = repr((sorted(files), tensors, source.notes)) + json.dumps(source.config, sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()
