"""Quantized and packed in one command: an ordinary folder grows beside the output, is packed, and removed.

out.packing/
    staging   what is made here: one line; held by the process that works here
    model     the ordinary folder, from when it is complete
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxarch import receipts
from mlxarch.errors import DiskSpaceError, InvalidInput, OutputError
from mlxarch.expert_files import STRIDE
from mlxarch.progress import Progress, silent
from mlxarch.quantize.conversion import Conversion, Summary
from mlxarch.quantize.disk import Disk, as_output_error, size
from mlxarch.quantize.journal import Workspace, fingerprint
from mlxarch.quantize.pack import pack
from mlxarch.streaming.attach import experts_of


@dataclass(frozen=True)
class Staging:
    """What is made for ``output`` on the way.

    Nothing that stood there before is touched: a folder of this name that is no such place is refused. What a killed
    run left is gone on with.
    """

    output: Path
    disk: Disk = field(default_factory=Disk)

    @property
    def folder(self) -> Path:
        """The place beside the output."""
        return self.output.with_name(f"{self.output.name}.packing")

    @property
    def model(self) -> Path:
        """Where the ordinary folder goes: the output of the conversion that ``run`` is given."""
        return self.folder / "model"

    def needed(self, conversion: Conversion) -> int:
        """Bytes of disk while both are there, but for small files."""
        modules = [module for _, module in experts_of(conversion.resolved).values()]
        filling = sum(module.down_proj["weight"].shape[0] * STRIDE for module in modules)
        return conversion.needed + conversion.summary.output_bytes + filling

    def run(
        self, conversion: Conversion, *, force: bool = False, evaluate: bool = False, progress: Progress = silent
    ) -> tuple[Summary, dict[str, Any]]:
        """Convert and pack; what was done, and the receipt of the conversion. Arguments as of ``convert``.

        Raises:
            InvalidInput: the model has no experts.
            DiskSpaceError: there is no room for both folders; nothing was written.
            OutputError: the output exists, or is being written by another process, or cannot be written.
        """
        if not experts_of(conversion.resolved):
            raise InvalidInput("this model has no experts that could be packed")
        Workspace(self.output, self.disk).check_target(force)
        try:
            with self._held(conversion):
                self._check_space(conversion)
                if self.model.exists():
                    summary = conversion.summary
                else:
                    summary = conversion.run(evaluate=evaluate, progress=progress)
                receipt = receipts.read(self.model) or {}
                packed = pack(self.model, self.output, force=force, progress=progress)
                self.disk.remove(self.folder)
        except OSError as error:
            free = self.disk.free(self.output.parent)
            raise as_output_error(error, self.output, self.needed(conversion), free, self.model.exists()) from error
        filled = f"records of experts are filled up to pages with {size(packed.filled_bytes)}"
        notes = [*summary.notes, *([filled] if packed.filled_bytes else [])]
        return replace(summary, output=packed.output, notes=notes), receipt

    @contextlib.contextmanager
    def _held(self, conversion: Conversion) -> Iterator[None]:
        """Within, the place is this process's, and holds nothing but what an earlier run of the same work left."""
        mark, wanted = self.folder / "staging", _identity(conversion)
        if os.path.lexists(self.folder) and not mark.is_file():
            raise OutputError(f"{self.folder} is in the way: it is no unfinished output; move it elsewhere")
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another process is writing {self.output}; wait for it, or name another") from None
            if mark.read_text("utf-8", "replace") != wanted:
                for old in (self.model, self.model.with_name("model.partial")):
                    self.disk.remove(old)
                self.disk.write_file(mark, wanted.encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if os.listdir(self.folder) == [mark.name]:  # nothing is there to go on with
                        self.disk.remove(self.folder)
        finally:
            os.close(descriptor)

    def _check_space(self, conversion: Conversion) -> None:
        files = [path for path in self.folder.glob("*/**/*") if path.is_file()]
        held = sum(path.stat().st_blocks * 512 for path in files)
        needed, free = max(self.needed(conversion) - held, 0), self.disk.free(self.folder)
        if needed > free:
            raise DiskSpaceError(
                f"{self.output} needs {size(needed)} of disk, for an ordinary folder and the packed one made of it, "
                f"and {size(free)} are free; free some space, or name an output on another disk"
            )


def _identity(conversion: Conversion) -> str:
    """Of a conversion, in one line: those with the same one make the same folder."""
    calibration = conversion.calibration.digest if conversion.calibration else None
    facts = [fingerprint(conversion.source), conversion.plan.digest, conversion.method, conversion.dtype, calibration]
    return json.dumps(facts) + "\n"
