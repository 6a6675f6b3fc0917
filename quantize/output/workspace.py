"""Workspace of an unfinished output: a folder beside it that survives a kill at any moment.

For the output ``out`` it is

    out.partial/
        lock       locked while a process works here
        journal    line 1: identity of the work; then one line per sync: the parameters that are
                   on the medium, each with its measurements
        model/     renamed to out when it is complete
        replaced/  the former out, from just before that rename until just after it
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

from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import OutputError, QuantizationError
from mlxarch.system.durable_files import Disk

logger = logging.getLogger(__name__)


class Workspace:
    """The partial folder of one output.

    A ``with`` block locks it; on exit, whatever the next run can resume from is kept and everything
    else is removed. Methods raise OSError where the disk fails.

    Args:
        output: path of the finished folder.
        disk: file operations that write the output.

    Attributes:
        model: folder in which the output is built.
        resumable: whether the journal lists parameters, so that the next run of the same work can
            skip them.
    """

    def __init__(self, output: Path, disk: Disk) -> None:
        self.output = output
        self.disk = disk
        self.folder = output.with_name(output.name + ".partial")
        self.model = self.folder / "model"
        self.resumable = False
        self._replaced = self.folder / "replaced"
        self._journal = self.folder / "journal"
        self._journal_descriptor = -1
        self._journal_size = 0
        self._lock_file = self.folder / "lock"
        self._lock_descriptor = -1
        self._begun = False

    def __enter__(self) -> "Workspace":
        """Lock the folder and repair what a killed run left behind.

        Raises:
            OutputError: another process has locked it.
        """
        self._acquire_lock()
        try:
            self._recover()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if not os.path.lexists(self._replaced):
            with contextlib.suppress(OSError):
                if error is QuantizationError:
                    self.resumable = False  # the source has to be replaced: nothing to resume
                if self._begun and not self.resumable:
                    self.disk.remove(self.model)
                if self.model.exists():
                    self.model.rmdir()  # fails, and ends the removal, if there is work to resume
                self._journal.unlink(missing_ok=True)
                # while it is still locked: a process that opens it next creates a new file
                self._lock_file.unlink(missing_ok=True)
                self.folder.rmdir()
        for descriptor in (self._journal_descriptor, self._lock_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal_descriptor = -1
        self._lock_descriptor = -1

    def check_target(self, replace: bool) -> None:
        """Check that the output can be created, and that an existing one may be replaced.

        Args:
            replace: whether an existing model folder, or an empty folder, may be replaced.

        Raises:
            OutputError: nothing can be created in the parent folder, or the output exists and must
                stay.
        """
        parent = next(parent for parent in self.output.parents if os.path.lexists(parent))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            problem = "may not be written to" if parent.is_dir() else "is no folder"
            raise OutputError(
                f"{self.output} cannot be made: {parent} {problem}; name another output"
            )
        if not os.path.lexists(self.output):
            return
        if not replace:
            raise OutputError(
                f"{self.output} exists already; name another output, or replace it with --force"
            )
        is_model_or_empty = self.output.is_dir() and (
            (self.output / "config.json").is_file() or not any(self.output.iterdir())
        )
        if not is_model_or_empty:
            raise OutputError(
                f"{self.output} exists and holds no model (it has no config.json), so --force does "
                "not replace it; name another output, or remove it yourself"
            )

    def resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Start the work, or resume an earlier run of the same work.

        Args:
            identity: JSON values; runs with equal identity write the same bytes.

        Returns:
            Name -> measurements, for every parameter that the earlier run recorded; empty after a
            fresh start, for which the folder is cleared.
        """
        self._begun = True
        identity_line = json.dumps(identity, sort_keys=True)
        lines: list[str] = []
        if self._journal.is_file():
            lines = self._journal.read_text("ascii", "replace").splitlines(keepends=True)
        if lines and lines[0] == identity_line + "\n" and self.model.is_dir():
            lines = [line for line in lines if line.endswith("\n")]  # a crash may cut the last one
            self._journal_descriptor = self.disk.open(self._journal)
            self._journal_size = len("".join(lines))  # ASCII
            logger.info("%s: resuming an earlier run", self.folder)
            recorded: dict[str, Any] = {}
            for line in lines[1:]:
                recorded |= json.loads(line)
            self.resumable = bool(recorded)
            return recorded
        if lines:
            logger.info("%s: an earlier run made something else; starting over", self.folder)
        for old in (self._journal, self.model):
            self.disk.remove(old)
        self.model.mkdir()
        self._journal_descriptor = self.disk.open(self._journal)
        self._journal_size = 0
        self._append(identity_line)
        self.disk.sync_folder(self.folder)
        return {}

    def record(self, results: Mapping[str, Any]) -> None:
        """Record in the journal parameters that are on the medium: name -> measurements."""
        self._append(json.dumps(results, sort_keys=True, ensure_ascii=True))
        self.resumable = True

    def _append(self, line: str) -> None:
        data = line.encode() + b"\n"
        self.disk.write(self._journal_descriptor, data, self._journal_size)
        self.disk.sync(self._journal_descriptor)
        self._journal_size += len(data)

    def discard(self) -> None:
        """Discard everything written so far."""
        self.resumable = False
        self._begun = True

    def publish(self, files: Collection[str]) -> None:
        """Rename the finished model to the output; a former output is removed afterwards.

        Args:
            files: names of the model's files; any other file in its folder is removed.
        """
        for path in self.model.iterdir():
            if path.name not in files:
                self.disk.remove(path)
        self.disk.sync_folder(self.model)
        if os.path.lexists(self.output):
            self.disk.rename(self.output, self._replaced)
        self.disk.rename(self.model, self.output)
        self.disk.sync_folder(self.output.parent)
        self.disk.remove(self._replaced)

    def _acquire_lock(self) -> None:
        while self._lock_descriptor < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                present = os.listdir(self.folder)
                # a workspace has its lock file from beginning to end
                if present and self._lock_file.name not in present:
                    raise OutputError(
                        f"{self.folder} is in the way: it is no unfinished output; move it "
                        "elsewhere"
                    )
                descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # another process finished and removed the folder
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._lock_file)):
                    self._lock_descriptor = descriptor
            except BlockingIOError:
                raise OutputError(
                    f"another process is writing {self.output}; wait for it, or name another output"
                ) from None
            except FileNotFoundError:
                pass
            finally:
                if self._lock_descriptor < 0:
                    os.close(descriptor)

    def _recover(self) -> None:
        """Finish or undo the replacement of an output during which a run was killed."""
        if not os.path.lexists(self._replaced):
            return
        if not os.path.lexists(self.output):  # killed between the two renames
            self.disk.rename(self._replaced, self.output)
            self.disk.sync_folder(self.output.parent)
            logger.warning("%s: restored; a run that was replacing it had been killed", self.output)
        elif not self.model.exists():  # killed after both
            self.disk.remove(self._replaced)
        else:
            raise OutputError(
                f"{self.output} was made by somebody else while its former contents are in "
                f"{self._replaced}, where a killed run had set them aside; move one of the two away"
            )


def source_fingerprint(source: CheckpointSource) -> str:
    """Hash of a source: of names, sizes and times of its files, of tensor shapes and config."""
    files = [
        (shard.path.name, shard.size, os.stat(shard.path).st_mtime_ns) for shard in source.shards
    ]
    tensors = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in source.tensors.items()]
    facts = repr((sorted(files), tensors, source.notes)) + json.dumps(source.config, sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()
