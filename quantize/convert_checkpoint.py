"""Conversion of a checkpoint to a folder of MLX weights, quantized or cast.

``convert`` does it in one call. ``prepare`` returns a ``Conversion`` that can be inspected, and
changed by a target or a recipe, before its ``run``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from mlxarch.checkpoint.layout import plan_layout
from mlxarch.checkpoint.source import CheckpointSource, open_checkpoint
from mlxarch.errors import InvalidInput, OutputError
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.progress import Progress, silent
from mlxarch.quantization.scheme import check_quantization
from mlxarch.quantize.calibration.calibration import Calibration
from mlxarch.quantize.calibration.texts import Text
from mlxarch.quantize.conversion import Conversion, Limits, default_output_name
from mlxarch.quantize.output.model_card import Origin, origin_from_folder
from mlxarch.quantize.output.summary import Summary
from mlxarch.quantize.schedule import Method, check_method
from mlxarch.system.dtypes import COMPUTE_DTYPES, mlx_dtype
from mlxarch.system.durable_files import Disk

_DEFAULT_LIMITS = Limits()


def prepare(
    source: str | Path | CheckpointSource,
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
    limits: Limits = _DEFAULT_LIMITS,
    disk: Disk | None = None,
) -> Conversion:
    """Check a conversion and lay out its output, without reading weights or writing.

    Arguments and errors are those of ``convert``. ``texts`` are what the output is evaluated on, in
    place of the texts of the package.
    """
    quantization = None if bits is None else check_quantization(bits, group_size, mode)
    chosen_method = check_method(method, quantization, calibration)
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise InvalidInput(f"dtype {dtype!r} is none of {', '.join(COMPUTE_DTYPES)}")
    if isinstance(source, CheckpointSource):
        opened = source
        folders = {shard.path.parent for shard in source.shards}
        origin = origin or Origin(source.shards[0].path.stem if source.shards else "a model")
    else:
        opened = open_checkpoint(source)
        folders = {Path(source)}
        origin = origin or origin_from_folder(Path(source))
    if output is None:
        output = default_output_name(origin.name.rpartition("/")[2], quantization, dtype)
    output = _absolute_output(output, folders)
    resolved = resolve(opened)
    resolved.require_read()
    layout = plan_layout(
        resolved.published,
        resolved.published_matrices,
        quantization,
        mlx_dtype(dtype),
        limits.shard_bytes,
        resolved.published_exact,
    )
    return Conversion(
        source=opened,
        resolved=resolved,
        origin=origin,
        output=output,
        layout=layout,
        quantization=quantization,
        dtype=dtype,
        limits=limits,
        disk=disk or Disk(),
        method=chosen_method,
        calibration=_prepare_calibration(chosen_method, calibration, opened, resolved),
        texts=texts,
    )


def _absolute_output(output: str | Path, source_folders: set[Path]) -> Path:
    """The absolute path of the output; it must not contain the source."""
    path = Path(os.path.abspath(Path(output).expanduser()))
    for folder in source_folders:
        if folder.resolve().is_relative_to(path.resolve()):
            raise OutputError(f"{path} holds the source; name another output")
    return path


def _prepare_calibration(
    method: Method, file: str | Path | None, source: CheckpointSource, resolved: Resolved
) -> Calibration | None:
    """The calibration tokens of a method, from a text file if one is given; None for rounding."""
    if method == "round":
        return None
    calibration = Calibration.from_text(file, source, resolved) if file else None
    if calibration is None:
        calibration = Calibration.default(method, source, resolved)
    return calibration.with_asymmetric_tokens(method, resolved)


def convert(
    source: str | Path | CheckpointSource,
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
    """Convert a checkpoint to a folder of MLX weights.

    Peak memory does not depend on the size of the model. The output appears under its name when it
    is complete, never in part. If a run is killed, the same call (same source, settings and
    versions) resumes it. The same call always writes the same bytes.

    Args:
        source: a checkpoint folder, or an opened CheckpointSource.
        output: folder to make; None takes the source's name and the bits, in the current folder.
        bits: per weight: 2, 3, 4, 5, 6 or 8. None quantizes nothing and keeps what is quantized
            already. A source in a small float format (mxfp4, mxfp8, nvfp4) is kept unless fewer
            bits are asked for.
        group_size: consecutive weights of a row that share a scale: 32, 64 or 128; None takes the
            mode's own, 64 for affine. Rows whose length it does not divide get a smaller group or
            stay unquantized; the notes say so.
        mode: affine, or mxfp4, mxfp8, nvfp4, each of which has one number of bits and one group
            size.
        dtype: float32, float16 or bfloat16, of unquantized weights and of affine scales; None keeps
            the source's.
        method: "round" to the nearest level of a uniform grid over each group; "search" for scales
            and biases that minimize the expected output error, with error feedback; "gptq" also
            refits scales during error feedback, and needs memory for a Hessian, the square of a
            matrix's row length. None takes "search" in mode affine, else "round".
        calibration: text file, the beginning of which is the calibration text. None takes tokens
            that the model generates itself; for "gptq" a text of the package is added.
        origin: origin of the source, for the model card; None reads it from the folder.
        force: replace an existing output, once the new one is complete.
        evaluate: measure the KL divergence of the output from the source, which is read once more.
            The result is written to receipt.json and to the model card; if the evaluation fails,
            they give the reason.
        progress: called with the bytes of source weights converted so far.

    Returns:
        Sizes of the weights, and notes about anything unexpected.

    Raises:
        QuantizationError: the settings are not supported; a weight is NaN, infinite or too large
            for ``dtype``.
        InvalidInput: the dtype is unknown, or the calibration file is not a text.
        CheckpointError, ConfigError, TokenizerError: the source is not a sound checkpoint, or lacks
            a tokenizer.
        DiskSpaceError: the disk has less room than needed; what is written so far is kept.
        OutputError: the output exists, is being written by another process, or cannot be written.

    Length: mostly the description of the arguments.
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
        if not isinstance(source, CheckpointSource):
            conversion.close()
