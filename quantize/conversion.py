"""A prepared conversion of a checkpoint to MLX weights, and its run.

``prepare`` (see ``convert_checkpoint``) makes a ``Conversion``. Its output can be inspected and
changed before ``run`` writes it, a few rows at a time: peak memory does not depend on the size of
the model.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.checkpoint.layout import SHARD_BYTES, OutputLayout
from mlxarch.checkpoint.receipt import RECEIPT_FILE
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import DiskSpaceError, MlxArchError
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantization.config_section import quantization_to_config
from mlxarch.quantization.scheme import Quantization, describe_quantization
from mlxarch.quantize.calibration.calibration import Calibration, CalibrationTokens
from mlxarch.quantize.calibration.texts import Text
from mlxarch.quantize.evaluation.evaluate import Evaluation
from mlxarch.quantize.evaluation.report import evaluation_to_markdown
from mlxarch.quantize.methods.row_chunks import ErrorStats, convert_rows, row_ranges
from mlxarch.quantize.output.companion_files import companion_files
from mlxarch.quantize.output.model_card import Origin, render_model_card
from mlxarch.quantize.output.receipt import build_receipt, evaluate_output, source_hashes
from mlxarch.quantize.output.safetensors_writer import SafetensorsWriter
from mlxarch.quantize.output.summary import ParameterResult, Summary, notes_on_results
from mlxarch.quantize.output.workspace import Workspace, source_fingerprint
from mlxarch.quantize.schedule import METHODS, Method, schedule_parameters, scratch_bytes
from mlxarch.system.checksums import sha256_files
from mlxarch.system.durable_files import Disk, format_bytes, to_output_error

logger = logging.getLogger(__name__)

_DISK_BLOCK = 4096  # bytes; file systems allocate multiples of it


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes that bound a conversion's memory and the work lost when it is killed.

    Attributes:
        chunk_bytes: size of the rows converted at once, in float32.
        sync_bytes: bytes written between two syncs, after each of which the journal is extended.
        shard_bytes: maximum size of an output file.
    """

    chunk_bytes: int = 8 << 20
    sync_bytes: int = 256 << 20
    shard_bytes: int = SHARD_BYTES


@dataclass
class Conversion:
    """A conversion that has been checked and laid out; ``run`` carries it out.

    Attributes:
        source: checkpoint to convert.
        resolved: the same, resolved to a model.
        origin: repository and licence of the source, for the model card.
        output: folder to make.
        layout: treatment of every parameter, and its place in the output files.
        quantization: default quantization of matrices, if the layout has no other; None copies or
            casts the weights.
        dtype: dtype of unquantized weights, scales and biases; None keeps the source's.
        limits: limits on memory and file sizes.
        disk: file operations that write the output.
        method: name of the quantization method.
        calibration: tokens that the method uses; None for rounding.
        texts: evaluation texts; None takes those of the package.
        expected_kl: forecast of the KL divergence in nats per token; None if the bits were not
            chosen by one.
        results: path of the parameter -> measurements, filled in by ``run``.
    """

    source: CheckpointSource
    resolved: Resolved
    origin: Origin
    output: Path
    layout: OutputLayout
    quantization: Quantization | None
    dtype: str | None
    limits: Limits = Limits()
    disk: Disk = field(default_factory=Disk)
    method: Method = "round"
    calibration: Calibration | None = None
    texts: Sequence[Text] | None = None
    expected_kl: float | None = None
    results: dict[str, ParameterResult] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        """Disk space of the output in bytes, with the journal that exists while it is made."""
        sizes = [shard.size for shard in self.layout.shards]
        sizes += [_size(data) for data in self._small_files.values()]
        sizes.append(sum(len(path) + 96 for path in self.layout.entries) + 1024)  # journal
        typical = ParameterResult(error=0.00123456, against_rounding=0.123456)
        digest = "0" * 64
        receipt = self._receipt(
            dict.fromkeys(self.layout.entries, typical),
            evaluation="",
            files=dict.fromkeys(self._file_names, digest),
            source_files={shard.path.name: digest for shard in self.source.shards},
        )
        sizes.append(len(receipt))
        return sum(-(-size // _DISK_BLOCK) * _DISK_BLOCK for size in sizes)

    @property
    def description(self) -> str:
        """The quantization and the method in words."""
        if self.quantization is None:
            return f"weights cast to {self.dtype}" if self.dtype else "weights copied without loss"
        formats = describe_quantization(*self.layout.quantizations or [self.quantization])
        inputs = f" (inputs of {self.calibration.description})" if self.calibration else ""
        floats = f", the rest in {self.dtype}" if self.dtype else ""
        return f"quantized to {formats}, {METHODS[self.method]}{inputs}{floats}"

    @property
    def summary(self) -> Summary:
        """Sizes and notes; the sizes are known before the run."""
        entries = self.layout.entries.values()
        return Summary(
            output=self.output,
            source_bytes=sum(entry.source_bytes for entry in entries),
            output_bytes=self.layout.weight_bytes,
            tensors=len(entries),
            quantized=sum(entry.quantization is not None for entry in entries),
            bits_per_weight=8 * self.layout.weight_bytes / max(self.layout.elements, 1),
            notes=[
                *self.source.notes,
                *self.resolved.notes,
                *self.layout.notes,
                *notes_on_results(self.results),
            ],
        )

    def run(
        self, *, force: bool = False, evaluate: bool = False, progress: Progress = silent
    ) -> Summary:
        """Write the output; arguments and errors as ``convert``."""
        logger.info(
            "%s: %s, needs %s of disk", self.output, self.description, format_bytes(self.disk_bytes)
        )
        workspace = Workspace(self.output, self.disk)
        try:
            with workspace, _limited_mlx_cache():
                workspace.check_target(force)
                recorded = workspace.resume(self._identity)
                with SafetensorsWriter(self.layout, workspace.model, self.disk) as writer:
                    self.results = {
                        path: ParameterResult.from_json(result)
                        for path, result in recorded.items()
                        if path in self.layout.entries and writer.file_covers(path)
                    }
                    self._check_space(workspace.model)
                    self._write_weights(workspace, writer, progress)
                for shard in self.source.shards:
                    shard.check_unchanged()
                self._write_small_files(workspace.model, evaluate, progress)
                workspace.publish([*self._file_names, RECEIPT_FILE])
        except OSError as error:
            needed, free = self._space(workspace.model)
            raise to_output_error(error, self.output, needed, free, workspace.resumable) from error
        except (KeyboardInterrupt, MlxArchError) as error:
            said = getattr(error, "__notes__", ())  # by a source that is fetched meanwhile
            if workspace.resumable or isinstance(error, KeyboardInterrupt) and not said:
                error.add_note(f"{self.output}: {self._what_is_kept(workspace.resumable)}")
            raise
        return self.summary

    def _what_is_kept(self, resumable: bool) -> str:
        """Say what a run that ended early leaves to the next one."""
        if not resumable:
            return "there is nothing to keep yet; the same command begins anew"
        text = "what is written so far is kept; the same command goes on from there"
        if self.calibration:
            text += ", after it has repeated the calibration"
        return text

    def close(self) -> None:
        """Close the source's files."""
        for shard in self.source.shards:
            shard.close()

    def _write_weights(
        self, workspace: Workspace, writer: SafetensorsWriter, progress: Progress
    ) -> None:
        """Convert every parameter without a result, and record it once it is on the medium."""
        parameters = self.resolved.published
        entries = self.layout.entries
        # in the order of the source, so that a source read file by file is read once
        todo = [path for path in parameters if path not in self.results]
        label = "copying" if self.quantization is None else "quantizing"
        total = self.summary.source_bytes
        finished = sum(entries[path].source_bytes for path in self.results)
        progress(label, finished, total)
        tokens = CalibrationTokens([], [])
        if self.calibration and todo:
            tokens = self.calibration.generate_tokens(self.resolved, progress)
        scheduled = schedule_parameters(
            self.resolved,
            self.method,
            tokens,
            todo,
            progress,
            writer.written_tensor,
            workspace.folder,
        )
        unsynced = 0
        unrecorded: dict[str, ParameterResult] = {}
        for path, quantize_rows, unrouted_experts, block_rows in scheduled:
            entry = entries[path]
            tensor = parameters[path]
            error_stats = ErrorStats()
            for start, stop in row_ranges(tensor, self.limits.chunk_bytes, block_rows):
                parts = convert_rows(entry, tensor, start, stop, error_stats, quantize_rows)
                for part, rows in parts.items():
                    writer.write_rows(path, entry.tensors[part], start, rows)
                done = entry.source_bytes * stop // max(tensor.row_count, 1)
                progress(label, finished + done, total)
            finished += entry.source_bytes
            unsynced += entry.nbytes
            unrecorded[path] = ParameterResult.from_error_stats(
                error_stats, unrouted_experts if entry.treatment == "quantized" else []
            )
            if unsynced >= self.limits.sync_bytes:
                self._record(workspace, writer, unrecorded)
                unsynced = 0
                unrecorded = {}
        self._record(workspace, writer, unrecorded)

    def _record(
        self,
        workspace: Workspace,
        writer: SafetensorsWriter,
        results: dict[str, ParameterResult],
    ) -> None:
        writer.sync()
        if results:
            workspace.record({path: result.to_json() for path, result in results.items()})
        self.results |= results

    def _write_small_files(self, model: Path, evaluate: bool, progress: Progress) -> None:
        """Write all files but the weights to ``model``, with the evaluation if it is asked for."""
        for name, data in self._small_files.items():
            content = data if isinstance(data, bytes) else data.read_bytes()
            self.disk.write_file(model / name, content)
        evaluation: Evaluation | str = "it was not asked for"
        if evaluate:
            evaluation = evaluate_output(
                model, self._title, self.source, self.resolved, self.origin, self.texts, progress
            )
        markdown = ""
        if isinstance(evaluation, Evaluation):
            markdown = evaluation_to_markdown(evaluation, self.expected_kl)
        self.disk.write_file(model / "README.md", self._card(markdown))
        receipt = self._receipt(
            self.results,
            evaluation,
            files=sha256_files(model / name for name in self._file_names),
            source_files=source_hashes(self.source, self.origin),
        )
        self.disk.write_file(model / RECEIPT_FILE, receipt)

    def _check_space(self, folder: Path) -> None:
        needed, free = self._space(folder)
        if needed > free:
            raise DiskSpaceError(
                f"{self.output} needs {format_bytes(needed)} ({needed} bytes) of disk, and "
                f"{format_bytes(free)} ({free} bytes) are free; free some space, or name an output "
                "on another disk"
            )

    def _space(self, folder: Path) -> tuple[int, int]:
        """Bytes still to be written, with temporary files, and bytes free on the disk."""
        written = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
        needed = max(self.disk_bytes - written, 0)
        unfinished = len(self.results) < len(self.layout.entries)
        batches = self.calibration.batches if self.calibration and unfinished else ()
        needed += scratch_bytes(self.resolved, self.method, batches)
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        return needed, self.disk.free(existing)

    @cached_property
    def _small_files(self) -> dict[str, bytes | Path]:
        """Name -> contents, or the file to copy, of everything but weights and receipt."""
        files = companion_files(self.source, self.resolved, self.origin, self.layout, self.dtype)
        return files | {"README.md": self._card()}

    @property
    def _file_names(self) -> list[str]:
        """Names of all output files but the receipt."""
        return [shard.file for shard in self.layout.shards] + list(self._small_files)

    @property
    def _title(self) -> str:
        name = self.origin.name.rpartition("/")[2]
        if len({quantization.bits for quantization in self.layout.quantizations}) > 1:
            return f"{name}-mixed"
        return default_output_name(name, self.quantization, self.dtype)

    def _card(self, evaluation: str = "") -> bytes:
        notes = tuple(self.summary.notes)
        card = render_model_card(
            self._title, self.origin, self.description, notes, _versions(), evaluation
        )
        return card.encode()

    def _receipt(
        self,
        results: Mapping[str, ParameterResult],
        evaluation: Evaluation | str,
        files: Mapping[str, str],
        source_files: Mapping[str, str],
    ) -> bytes:
        return build_receipt(
            method=self.description,
            origin=self.origin,
            source_files=source_files,
            layout=self.layout,
            results=results,
            notes=self.summary.notes,
            expected_kl=self.expected_kl,
            evaluation=evaluation,
            versions=_versions(),
            files=files,
        )

    @property
    def _identity(self) -> dict[str, Any]:
        """Identity of the work: an unfinished run of the same identity can be resumed."""
        return {
            "source": source_fingerprint(self.source),
            "settings": quantization_to_config(self.quantization) if self.quantization else None,
            "method": [self.method, self.calibration.digest if self.calibration else None],
            "plan": self.layout.digest,
            "device": str(mx.default_device()),
            **_versions(),
        }


def default_output_name(
    source_name: str, quantization: Quantization | None, dtype: str | None
) -> str:
    """Name of an output after its source, such as ``qwen3-4b-4bit``."""
    if quantization is None:
        return f"{source_name}-{dtype or 'copy'}"
    if quantization.mode == "affine":
        return f"{source_name}-{quantization.bits}bit"
    return f"{source_name}-{quantization.mode}"


@contextmanager
def _limited_mlx_cache() -> Iterator[None]:
    """Limit MLX's cache of freed memory to 64 MiB, and restore the former limit at the end."""
    gc.collect()
    former = mx.set_cache_limit(0)
    mx.set_cache_limit(min(former, 64 << 20))
    try:
        yield
    finally:
        mx.set_cache_limit(former)
        mx.clear_cache()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("mlxarch", "mlx")}


def _size(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size
