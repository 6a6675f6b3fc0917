"""A checkpoint in, a smaller one out, in the memory of one chunk; see ``convert``."""

import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.blocks import Quantization
from mlxarch.checkpoint import INDEX, child
from mlxarch.errors import DiskSpaceError, InvalidInput, MlxArchError, OutputError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration import Calibration, Tokens
from mlxarch.quantize.card import Origin, card, origin_of
from mlxarch.quantize.corpus import Text
from mlxarch.quantize.disk import Disk, as_output_error, size
from mlxarch.quantize.evaluation import Evaluation
from mlxarch.quantize.formats import as_config, in_words, settings
from mlxarch.quantize.journal import Workspace, fingerprint
from mlxarch.quantize.methods import METHODS, Method, checked, in_turn, scratch_bytes
from mlxarch.quantize.plan import SHARD_BYTES, Plan, make_plan
from mlxarch.quantize.receipt import hashes_of, judge, make
from mlxarch.quantize.report import markdown
from mlxarch.quantize.rows import Loss, chunks, converted
from mlxarch.quantize.summary import Fact, Summary, notes
from mlxarch.quantize.writer import Writer
from mlxarch.receipts import RECEIPT, sha256
from mlxarch.weights import Resolved, Source, open_source, resolve

logger = logging.getLogger(__name__)

DTYPE_NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_FILE_BLOCK = 4096  # what file systems allocate by


@dataclass(frozen=True)
class Limits:
    """Bytes: of a chunk in float32, written between two syncs, of an output file."""

    chunk: int = 8 << 20
    sync: int = 256 << 20
    shard: int = SHARD_BYTES


@dataclass
class Conversion:
    """A conversion that is decided on and has not begun. ``convert`` makes one and runs it.

    Attributes:
        plan: what becomes of every parameter.
        chosen: the method; ``calibration`` are the tokens that it looks at.
        texts: what the output is judged by; None takes those that come with the package.
        forecast: nats per token that the output was chosen to lose; None of one that was not chosen by them.
        facts: what is learned on the way, by parameter.
        needed: bytes that the output takes on the disk.
    """

    source: Source
    resolved: Resolved
    origin: Origin
    output: Path
    plan: Plan
    wanted: Quantization | None
    dtype: str | None
    limits: Limits = Limits()
    disk: Disk = field(default_factory=Disk)
    chosen: Method = "round"
    calibration: Calibration | None = None
    texts: Sequence[Text] | None = None
    forecast: float | None = None
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """Bytes that the output takes on the disk; the journal's while it is made included."""
        files = [shard.size for shard in self.plan.shards] + [_length(data) for data in self._small_files.values()]
        journal = sum(len(path) + 96 for path in self.plan.entries) + 1024
        receipt = len(self._receipt(dict.fromkeys(self.plan.entries, Fact(0.00123456, 0.123456)), "", "0" * 64))
        return sum(-(-count // _FILE_BLOCK) * _FILE_BLOCK for count in [*files, journal, receipt])

    @property
    def method(self) -> str:
        """What is done, in words."""
        if self.wanted is None:
            return "weights copied without loss" if self.dtype is None else f"weights cast to {self.dtype}"
        floats = f", the rest in {self.dtype}" if self.dtype else ""
        known = f" (inputs of {self.calibration.words})" if self.calibration else ""
        return f"quantized to {in_words(*self.plan.settings or [self.wanted])}, {METHODS[self.chosen]}{known}{floats}"

    @property
    def summary(self) -> Summary:
        """The figures, which are known beforehand."""
        entries = self.plan.entries.values()
        return Summary(
            output=self.output,
            source_bytes=sum(entry.source_bytes for entry in entries),
            output_bytes=self.plan.weight_bytes,
            tensors=len(entries),
            quantized=sum(entry.quantization is not None for entry in entries),
            bits_per_weight=8 * self.plan.weight_bytes / max(self.plan.elements, 1),
            notes=[*self.source.notes, *self.plan.notes, *notes(self.facts)],
        )

    def run(self, *, force: bool = False, evaluate: bool = False, progress: Progress = silent) -> Summary:
        """Write the output; see ``convert``."""
        logger.info("%s: %s, needs %s of disk", self.output, self.method, size(self.needed))
        workspace = Workspace(self.output, self.disk)
        try:
            with workspace, _small_cache():
                workspace.check_target(force)
                done = workspace.resume(self._identity)
                with Writer(self.plan, workspace.model, self.disk) as writer:
                    held = (path for path in done if path in self.plan.entries and writer.holds(path))
                    self.facts = {path: Fact.read(done[path]) for path in held}
                    self._check_space(workspace.model)
                    self._write_weights(workspace, writer, progress)
                for shard in self.source.shards:
                    shard.check_unchanged()
                for name, data in self._small_files.items():
                    self.disk.write_file(workspace.model / name, data if isinstance(data, bytes) else data.read_bytes())
                self._conclude(workspace.model, evaluate, progress)
                workspace.publish([*(shard.file for shard in self.plan.shards), *self._small_files, RECEIPT])
        except OSError as error:
            raise as_output_error(error, self.output, *self._space(workspace.model), workspace.resumable) from error
        except (KeyboardInterrupt, MlxArchError) as error:
            if workspace.resumable:
                error.add_note(f"{self.output}: what is written so far is kept; the same command goes on from there")
            raise
        return self.summary

    def close(self) -> None:
        """Close the source's files."""
        for shard in self.source.shards:
            shard.close()

    def _conclude(self, model: Path, evaluate: bool, progress: Progress) -> None:
        """Judge what was written to ``model``, tell of it in the card, and write the receipt of it all."""
        outcome = "it was not asked for"
        if evaluate:
            outcome = judge(model, self._title, self.source, self.resolved, self.origin, self.texts, progress)
        measured = markdown(outcome, self.forecast) if isinstance(outcome, Evaluation) else ""
        self.disk.write_file(model / "README.md", self._card(measured))
        self.disk.write_file(model / RECEIPT, self._receipt(self.facts, outcome, model))

    def _write_weights(self, workspace: Workspace, writer: Writer, progress: Progress) -> None:
        parameters, entries = self.resolved.published, self.plan.entries
        # they stand in the source's order, so that a source that comes file by file is passed once
        todo = [path for path in parameters if path not in self.facts]
        total, finished = self.summary.source_bytes, sum(entries[path].source_bytes for path in self.facts)
        label, unsynced, new = "copying" if self.wanted is None else "quantizing", 0, dict[str, Fact]()
        progress(label, finished, total)
        told = self.calibration.tokens(self.resolved, progress) if self.calibration and todo else Tokens([], [])
        turns = in_turn(self.resolved, self.chosen, told, todo, progress, writer.stored, workspace.folder)
        for path, pack, unreached, together in turns:
            entry, tensor, loss = entries[path], parameters[path], Loss()
            for start, stop in chunks(tensor, self.limits.chunk, together):
                for part, values in converted(entry, tensor, start, stop, loss, pack).items():
                    writer.put(path, entry.parts[part], start, values)
                progress(label, finished + entry.source_bytes * stop // max(tensor.row_count, 1), total)
            finished, unsynced = finished + entry.source_bytes, unsynced + entry.nbytes
            new[path] = Fact.of(loss, unreached if entry.treatment == "quantized" else [])
            if unsynced >= self.limits.sync:
                self._record(workspace, writer, new)
                unsynced, new = 0, {}
        self._record(workspace, writer, new)

    def _record(self, workspace: Workspace, writer: Writer, new: dict[str, Fact]) -> None:
        writer.sync()
        if new:
            workspace.record({path: fact.record() for path, fact in new.items()})
        self.facts |= new

    def _check_space(self, folder: Path) -> None:
        needed, free = self._space(folder)
        if needed > free:
            raise DiskSpaceError(
                f"{self.output} needs {size(needed)} ({needed} bytes) of disk, and {size(free)} ({free} bytes) are "
                "free; free some space, or name an output on another disk"
            )

    def _space(self, folder: Path) -> tuple[int, int]:
        """Bytes still to be written, those that are put aside meanwhile included, and bytes free."""
        held = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
        place = next(place for place in (folder, *folder.parents) if place.is_dir())
        batches = self.calibration.batches if self.calibration and len(self.facts) < len(self.plan.entries) else ()
        needed = max(self.needed - held, 0) + scratch_bytes(self.resolved, self.chosen, batches)
        return needed, self.disk.free(place)

    @cached_property
    def _small_files(self) -> dict[str, bytes | Path]:
        """Everything but the weights: name -> contents, or the file to copy."""
        config = dict(self.source.config)
        section = self.plan.quantization()
        for key in ("quantization", "quantization_config"):  # readers look at either
            config.pop(key, None)
            if section:
                config[key] = section
        if self.dtype:
            for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
                config[key] = self.dtype
        if not self.resolved.architecture.config.tie_word_embeddings:
            config["tie_word_embeddings"] = False  # what the tensors say
        beside = {path.name: path for path in self.origin.licences} | dict(self.source.sidecars)
        files = {name: child(at.parent, at.name) if isinstance(at, Path) else at for name, at in beside.items()}
        files["config.json"] = _json(config)
        if len(self.plan.shards) > 1:
            files[INDEX] = _json(self.plan.index())
        return files | {"README.md": self._card()}

    @property
    def _title(self) -> str:
        name = self.origin.name.rpartition("/")[2]
        mixed = len({packed.bits for packed in self.plan.settings}) > 1
        return f"{name}-mixed" if mixed else _name(name, self.wanted, self.dtype)

    def _card(self, measured: str = "") -> bytes:
        return card(self._title, self.origin, self.method, tuple(self.summary.notes), _versions(), measured).encode()

    def _receipt(self, facts: Mapping[str, Fact], outcome: Evaluation | str, model: Path | str) -> bytes:
        """With the hashes of what lies in ``model``; a text stands for all of them, to see how long it will be."""
        names = [shard.file for shard in self.plan.shards] + list(self._small_files)
        if isinstance(model, str):
            files, source_files = dict.fromkeys(names, model), {s.path.name: model for s in self.source.shards}
        else:
            files, source_files = sha256(model / name for name in names), hashes_of(self.source, self.origin)
        return make(
            method=self.method,
            origin=self.origin,
            source_files=source_files,
            plan=self.plan,
            facts=facts,
            notes=self.summary.notes,
            forecast=self.forecast,
            outcome=outcome,
            versions=_versions(),
            files=files,
        )

    @property
    def _identity(self) -> dict[str, Any]:
        """Two conversions of the same identity write the same bytes, so one may go on where the other stopped."""
        return {
            "source": fingerprint(self.source),
            "settings": as_config(self.wanted) if self.wanted else None,
            "method": [self.chosen, self.calibration.digest if self.calibration else None],
            "plan": self.plan.digest,
            "device": str(mx.default_device()),
            **_versions(),
        }


def prepare(
    source: str | Path | Source,
    output: str | Path | None = None,
    *,
    bits: int | None = 4,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    method: Method | None = None,
    calibration: str | Path | None = None,
    texts: Sequence[Text] | None = None,
    origin: Origin | None = None,
    limits: Limits = Limits(),
    disk: Disk | None = None,
) -> Conversion:
    """Check everything that can be checked without reading weights or writing; arguments and errors as ``convert``.

    ``texts`` are what the result is to be judged by, in place of those that come with the package.
    """
    wanted = None if bits is None else settings(bits, group_size, mode)
    chosen = checked(method, wanted, calibration)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise InvalidInput(f"dtype {dtype!r} is none of {', '.join(DTYPE_NAMES)}")
    if isinstance(source, Source):
        opened, folders = source, {shard.path.parent for shard in source.shards}
        origin = origin or Origin(source.shards[0].path.stem if source.shards else "a model")
    else:
        opened, folders = open_source(source), {Path(source)}
        origin = origin or origin_of(Path(source))
    if output is None:
        output = _name(origin.name.rpartition("/")[2], wanted, dtype)
    output = Path(os.path.abspath(Path(output).expanduser()))
    for folder in folders:
        if folder.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output} holds the source; name another output")
    resolved = resolve(opened)
    kind = DTYPE_NAMES[dtype] if dtype else None
    matrices, exact = resolved.published_matrices, resolved.published_exact
    plan = make_plan(resolved.published, matrices, wanted, kind, limits.shard, exact)
    tokens = None
    if chosen != "round":
        named = Calibration.text(calibration, opened, resolved) if calibration else None
        tokens = (named or Calibration.usual(chosen, opened, resolved)).beside(chosen, resolved)
    return Conversion(
        opened, resolved, origin, output, plan, wanted, dtype, limits, disk or Disk(), chosen, tokens, texts
    )


def convert(
    source: str | Path | Source,
    output: str | Path | None = None,
    *,
    bits: int | None = 4,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    method: Method | None = None,
    calibration: str | Path | None = None,
    origin: Origin | None = None,
    force: bool = False,
    evaluate: bool = False,
    progress: Progress = silent,
) -> Summary:
    """Write ``source`` as a folder of MLX weights. Peak memory is that of a few chunks, whatever the model's size.

    The output appears under its name complete or not at all. A run that was killed is taken up again by the same call:
    same source, settings and versions. The same call writes the same bytes.

    Args:
        source: a checkpoint folder, or a Source.
        output: the folder to make; by default the source's name and the bits, in the current folder.
        bits: 2, 3, 4, 5, 6 or 8; None packs nothing and keeps packed what is. What comes in one of the small float
            formats (mxfp4, mxfp8, nvfp4) stays so unless fewer bits are asked for.
        group_size: elements of a row that share a scale: 32, 64 or 128; None is the mode's own, 64 for affine. Rows
            that it does not divide take a smaller group or stay as they are, and the notes say so.
        mode: affine, or mxfp4, mxfp8, nvfp4, whose bits and group size are given.
        dtype: float32, float16 or bfloat16, of what is not packed and of affine scales; None keeps the source's.
        method: "round" to the nearest level of grids from the smallest to the largest weight; "search" for grids that
            fit the weights that matter, later ones making up for the errors of others; "gptq" fits grids to that too,
            and holds the square of a row of a matrix in memory. None is "search" in mode affine, else "round".
        calibration: a text file, whose beginning tells a method which weights matter; None takes random
            tokens for "search", and a text that comes with the package for "gptq".
        origin: what the model card says of the source; None reads it from the folder.
        force: replace an output that exists; it is removed when the new one is complete.
        evaluate: end by measuring the output against the source, which then is read once more; see ``evaluation``. The
            result stands in receipt.json and on the model card. If it cannot be done, they say why.
        progress: told the bytes of source weights done.

    Raises:
        QuantizationError: settings that do not exist; a weight that is NaN, infinite or too large for ``dtype``.
        CheckpointError, ConfigError: the source is not a sound checkpoint.
        DiskSpaceError: the disk has less room than is needed; nothing is lost.
        OutputError: the output exists, is being written by another process, or cannot be written.
    """
    conversion = prepare(
        source,
        output,
        bits=bits,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
        method=method,
        calibration=calibration,
        origin=origin,
    )
    try:
        return conversion.run(force=force, evaluate=evaluate, progress=progress)
    finally:
        if not isinstance(source, Source):
            conversion.close()


def _name(source: str, wanted: Quantization | None, dtype: str | None) -> str:
    if wanted is None:
        return f"{source}-{dtype or 'copy'}"
    return f"{source}-{wanted.bits}bit" if wanted.mode == "affine" else f"{source}-{wanted.mode}"


@contextmanager
def _small_cache() -> Iterator[None]:
    """Keep MLX from holding on to freed chunks; its limit is as before afterwards."""
    gc.collect()
    before = mx.set_cache_limit(0)
    mx.set_cache_limit(min(before, 64 << 20))
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("mlxarch", "mlx")}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _length(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size
