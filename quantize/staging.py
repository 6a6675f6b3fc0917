"""Quantizing and packing in one command, by way of a stacked model folder in between.

The model is quantized to an ordinary folder beside the output; that folder is packed into the
output and removed. For the output ``out`` it is

    out.packing/
        staging   identity of the work, one line; locked while a process works here
        model     the quantized, unpacked model, once it is complete
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.packed_experts import RECORD_ALIGNMENT
from mlxarch.checkpoint.receipt import read_receipt
from mlxarch.errors import DiskSpaceError, InvalidInput, OutputError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.conversion import Conversion
from mlxarch.quantize.output.summary import Summary
from mlxarch.quantize.output.workspace import Workspace, source_fingerprint
from mlxarch.quantize.repack.pack_experts import pack
from mlxarch.ssd_streaming.attach import experts_of
from mlxarch.system.durable_files import Disk, format_bytes, to_output_error


@dataclass(frozen=True)
class Staging:
    """The folder in which a model is quantized before it is packed.

    A folder of this name that is not a staging folder is left alone and refused. Work that a killed
    run left behind is resumed.

    Attributes:
        output: path of the packed model.
        disk: file operations that write the output.
    """

    output: Path
    disk: Disk = field(default_factory=Disk)

    @property
    def folder(self) -> Path:
        """Path of the staging folder, beside the output."""
        return self.output.with_name(f"{self.output.name}.packing")

    @property
    def model(self) -> Path:
        """Path of the unpacked model: must be the output of the conversion given to ``run``."""
        return self.folder / "model"

    def disk_bytes(self, conversion: Conversion) -> int:
        """Disk space in bytes while both models exist, without small files of the packed one."""
        modules = [module for _, module in experts_of(conversion.resolved.model).values()]
        padding = sum(module.down_proj["weight"].shape[0] * RECORD_ALIGNMENT for module in modules)
        return conversion.disk_bytes + conversion.summary.output_bytes + padding

    def run(
        self,
        conversion: Conversion,
        *,
        force: bool = False,
        evaluate: bool = False,
        progress: Progress = silent,
    ) -> tuple[Summary, dict[str, Any]]:
        """Convert and pack; the options are those of ``convert``.

        Returns:
            The summary, and the receipt of the conversion.

        Raises:
            InvalidInput: the model has no experts.
            DiskSpaceError: the disk has no room for both models; nothing was written.
            OutputError: the output exists, is being written by another process, or cannot be
                written.
        """
        if not experts_of(conversion.resolved.model):
            raise InvalidInput("this model has no experts that could be packed")
        Workspace(self.output, self.disk).check_target(force)
        try:
            with self._locked(conversion):
                self._check_space(conversion)
                if self.model.exists():
                    summary = conversion.summary
                else:
                    summary = conversion.run(evaluate=evaluate, progress=progress)
                receipt = read_receipt(self.model) or {}
                packed = pack(self.model, self.output, force=force, progress=progress)
                self.disk.remove(self.folder)
        except OSError as error:
            free = self.disk.free(self.output.parent)
            raise to_output_error(
                error, self.output, self.disk_bytes(conversion), free, self.model.exists()
            ) from error
        notes = list(summary.notes)
        if packed.filled_bytes:
            padding = format_bytes(packed.filled_bytes)
            notes.append(f"records of experts are filled up to pages with {padding}")
        return replace(summary, output=packed.output, notes=notes), receipt

    @contextlib.contextmanager
    def _locked(self, conversion: Conversion) -> Iterator[None]:
        """Lock the folder, and remove from it what an earlier run of different work left."""
        lock_file = self.folder / "staging"
        identity = _work_identity(conversion)
        if os.path.lexists(self.folder) and not lock_file.is_file():
            raise OutputError(
                f"{self.folder} is in the way: it is no unfinished output; move it elsewhere"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another process is writing {self.output}; wait for it, or name another"
                ) from None
            if lock_file.read_text("utf-8", "replace") != identity:
                for old in (self.model, self.model.with_name("model.partial")):
                    self.disk.remove(old)
                self.disk.write_file(lock_file, identity.encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if os.listdir(self.folder) == [lock_file.name]:  # nothing to resume
                        self.disk.remove(self.folder)
        finally:
            os.close(descriptor)

    def _check_space(self, conversion: Conversion) -> None:
        files = [path for path in self.folder.glob("*/**/*") if path.is_file()]
        written = sum(path.stat().st_blocks * 512 for path in files)
        needed = max(self.disk_bytes(conversion) - written, 0)
        free = self.disk.free(self.folder)
        if needed > free:
            raise DiskSpaceError(
                f"{self.output} needs {format_bytes(needed)} of disk, for an ordinary folder and "
                f"the packed one made of it, and {format_bytes(free)} are free; free some space, "
                "or name an output on another disk"
            )


def _work_identity(conversion: Conversion) -> str:
    """One line that identifies the work: conversions with the same line write the same folder."""
    calibration = conversion.calibration.digest if conversion.calibration else None
    facts = [
        source_fingerprint(conversion.source),
        conversion.layout.digest,
        conversion.description,
        conversion.dtype,
        calibration,
    ]
    return json.dumps(facts) + "\n"
