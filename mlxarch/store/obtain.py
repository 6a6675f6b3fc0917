"""Obtain a model by name: find it here, download it, or quantize it while it downloads."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxarch.errors import (
    BackendMissing,
    Declined,
    DiskSpaceError,
    DownloadError,
    GatedModel,
    InvalidInput,
    MlxArchError,
    ModelNotFound,
    OfflineError,
)
from mlxarch.hub.catalog import Bits, CatalogEntry, HubSource, ModelReference, WheelSource
from mlxarch.hub.complete_snapshot import complete_snapshot
from mlxarch.progress import Progress, format_duration, format_size, silent
from mlxarch.store.acquire import (
    Acquisition,
    AcquisitionMethod,
    Download,
    DownloadAndQuantize,
    ImportGguf,
)
from mlxarch.store.describe import describe
from mlxarch.store.installed import (
    InstalledModel,
    find_model,
    folder_name,
    list_installed,
    list_unfinished,
    local_name,
    stored_bits,
)
from mlxarch.store.names import find_local_copy, resolve_name
from mlxarch.store.remove import remove
from mlxarch.system.untrusted_files import read_json

if TYPE_CHECKING:
    from mlxarch.planner.plan import Plan as MemoryPlan
    from mlxarch.planner.plan import Request

__all__ = [
    "Acquisition",
    "InstalledModel",
    "describe",
    "largest_fitting_bits",
    "list_installed",
    "list_unfinished",
    "obtain",
    "remove",
]

logger = logging.getLogger(__name__)

SUPPORTED_BITS = (2, 3, 4, 5, 6, 8, "original")
LONG_SECONDS = 60
"""Duration from which a quantization is announced, and asked about on the command line."""
Confirm = Callable[[Acquisition], bool]


def obtain(
    name: str | os.PathLike[str],
    *,
    bits: int | str | None = None,
    progress: Progress = silent,
    confirm: Confirm | None = None,
    refresh: bool = False,
    request: "Request | None" = None,
    evaluate: bool = False,
    method: str | None = None,
) -> Path:
    """Return the folder of a model; it is downloaded or quantized first if necessary.

    A folder is returned as it is, and a GGUF file is imported. A catalog name is resolved at the
    requested bits, by default the largest of 8 and 4 that fits this machine: from models quantized
    here, then from a repository that is already quantized for MLX, then from the original, which is
    quantized file by file while it downloads. ``org/repo`` is downloaded as it is unless bits are
    requested.

    Args:
        name: a path or a name; see ``catalog``.
        bits: 2, 3, 4, 5, 6, 8, or "original": as published.
        progress: reports downloads and conversion.
        confirm: called before anything large happens; returning False raises Declined. None: agree.
        refresh: look for a newer revision of a repository that is not pinned to a commit.
        request: how the model is to run; a model that does not fit is not downloaded. None: obtain
            it anyway.
        evaluate: evaluate a model quantized here against its source, if the source stays here.
        method: quantization method below 8 bits: "round", or the search for better scales, which
            takes minutes to hours; None: search.

    Raises:
        ModelNotFound, GatedModel, OfflineError, DownloadError: the model cannot be obtained.
        MemoryBudgetError: it does not fit at the requested bits, or at neither 8 nor 4.
        DiskSpaceError: there is not enough disk space; nothing was downloaded.
        InvalidInput: bits that are not supported, or that contradict the name.
    """
    folder = _obtain(
        name,
        bits,
        progress,
        confirm or _announce,
        refresh=refresh,
        request=request,
        evaluate=evaluate,
        method=method if method == "round" else None,
    )
    complete_snapshot(folder, progress)
    return folder


def _obtain(
    name: str | os.PathLike[str],
    bits: int | str | None,
    progress: Progress,
    confirm: Confirm,
    *,
    refresh: bool,
    request: "Request | None",
    evaluate: bool,
    method: str | None,
) -> Path:
    """Return the folder of a model; a snapshot in the Hub's cache may lack files beside the weights."""
    reference = resolve_name(name)
    resolved_bits = _resolve_bits(reference, bits)
    if reference.path is not None:
        return _obtain_path(reference.path, resolved_bits, progress, confirm, evaluate, method)
    wanted = replace(reference, bits=resolved_bits)
    if local := find_local_copy(wanted, request, refresh=refresh):
        return local
    if reference.entry is not None and resolved_bits is None:
        resolved_bits = largest_fitting_bits(reference.entry, request)
        if local := find_local_copy(replace(wanted, bits=resolved_bits), refresh=refresh):
            return local
    methods = _acquisition_methods(reference, resolved_bits, method)
    if request is not None and reference.entry is not None and isinstance(resolved_bits, int):
        _best_plan(reference.entry, request, resolved_bits).require()

    def confirm_with_verdict(acquisition: Acquisition) -> bool:
        verdict = _plan_summary(reference.entry, acquisition, request, resolved_bits)
        quicker = _quicker_ways(name, reference.entry, resolved_bits) if acquisition.seconds else ""
        return confirm(replace(acquisition, verdict=verdict, quicker=quicker))

    try:
        return _run_first_available(
            methods, progress, confirm_with_verdict, reference.name, evaluate
        )
    except OfflineError:
        local = find_local_copy(replace(wanted, bits=resolved_bits)) if refresh else None
        if local is None:
            raise
        logger.warning("%s: the Hub cannot be asked for a newer revision", reference.name)
        return local


def _announce(acquisition: Acquisition) -> bool:
    """Agree to an acquisition that nobody is asked about, and log one that takes long."""
    if acquisition.seconds > LONG_SECONDS:
        logger.warning(
            "%s: %s; the quantization takes about %s",
            acquisition.name,
            acquisition.description,
            format_duration(acquisition.seconds),
        )
    return True


def _quicker_ways(
    name: str | os.PathLike[str], entry: CatalogEntry | None, bits: Bits | None
) -> str:
    """Name what is ready sooner than a search for better scales."""
    ways = []
    if entry is not None:
        ways = [f"`{entry.name}-{ready.bits}bit` is quantized already" for ready in entry.ready]
    text = os.fspath(name)
    ways.append(f"`mlxarch pull {text} --bits {bits} --method round` rounds without a search")
    if not text.lower().endswith(".gguf"):
        ways.append("a GGUF file with 4 bits is imported as it is: `mlxarch pull FILE.gguf`")
    return "; ".join(ways)


def largest_fitting_bits(entry: CatalogEntry, request: "Request | None" = None) -> int:
    """Return 8 if the model fits in memory at 8 bits, else 4 if it fits at 4, if need be streamed.

    Raises:
        MemoryBudgetError: it fits at neither.
    """
    return _best_plan(entry, request).require().bits


def _best_plan(
    entry: CatalogEntry, request: "Request | None", bits: int | None = None
) -> "MemoryPlan":
    from mlxarch.planner.blueprint import blueprint_from_config
    from mlxarch.planner.plan import Request
    from mlxarch.planner.planner import best_plan
    from mlxarch.system import machines

    blueprint = blueprint_from_config(entry.name, read_json(entry.config_path))
    return best_plan(blueprint, machines.this_machine(), replace(request or Request(), bits=bits))


def _plan_summary(
    entry: CatalogEntry | None,
    acquisition: Acquisition,
    request: "Request | None",
    bits: Bits | None,
) -> str:
    """Summarize how the model will run on this machine; empty if its config is unknown."""
    from mlxarch.planner.blueprint import blueprint_from_config
    from mlxarch.planner.plan import Request
    from mlxarch.planner.planner import plan
    from mlxarch.system import machines

    config = acquisition.config if entry is None else read_json(entry.config_path)
    if config is None:
        return ""
    weight_bits = bits if isinstance(bits, int) else stored_bits(config) or 16
    blueprint = blueprint_from_config(acquisition.name, config)
    request = replace(request or Request(), bits=weight_bits)
    return plan(blueprint, machines.this_machine(), request).summary


def _resolve_bits(reference: ModelReference, bits: int | str | None) -> Bits | None:
    """Check the requested bits and combine them with those of the name; None if there are none."""
    if bits is not None and bits not in SUPPORTED_BITS:
        raise InvalidInput(
            f"bits must be one of {', '.join(map(str, SUPPORTED_BITS))}, found {bits!r}"
        )
    if bits is not None and reference.bits is not None and bits != reference.bits:
        raise InvalidInput(
            f"the name asks for {reference.bits} bits and bits={bits!r} for others; say it once"
        )
    if bits is None:
        return reference.bits
    return "original" if bits == "original" else int(bits)


def _acquisition_methods(
    reference: ModelReference, bits: Bits | None, method: str | None
) -> list[AcquisitionMethod]:
    """Return the methods to obtain a model that is not a path, in the order of preference."""
    entry = reference.entry
    if entry is None:
        source = HubSource(str(reference.repo), reference.revision or "main")
        if bits is None or bits == "original":
            return [Download(reference.name, source)]
        return [DownloadAndQuantize(local_name(reference), bits, source, method=method)]
    if bits is None:
        bits = largest_fitting_bits(entry)
    methods: list[AcquisitionMethod] = [
        Download(folder_name(entry.name, bits), ready)
        for ready in entry.ready
        if ready.bits == bits
    ]
    original = next((source.repo for source in entry.sources if isinstance(source, HubSource)), "")
    for source in entry.sources:
        if isinstance(source, WheelSource):
            methods.append(ImportGguf(entry.name, bits, source, original, entry.licence, method))
        elif bits == "original":
            methods.append(Download(folder_name(entry.name, bits), source))
        else:
            methods.append(DownloadAndQuantize(entry.name, bits, source, entry.licence, method))
    return methods


def _obtain_path(
    path: Path,
    bits: Bits | None,
    progress: Progress,
    confirm: Confirm,
    evaluate: bool,
    method: str | None,
) -> Path:
    if path.is_file() and path.suffix.lower() == ".gguf":
        status = path.stat()
        identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        importer = ImportGguf(name, bits or "original", path, method=method)
        if local := find_model(name, importer.bits):
            return local

        def confirm_with_ways(acquisition: Acquisition) -> bool:
            quicker = _quicker_ways(path, None, bits) if acquisition.seconds else ""
            return confirm(replace(acquisition, quicker=quicker))

        return _run_first_available([importer], progress, confirm_with_ways, str(path), evaluate)
    if not path.is_dir():
        raise ModelNotFound(
            f"{path}: there is no such folder; name one with config.json and safetensors files"
        )
    if bits not in (None, "original") and stored_bits(read_json(path / "config.json")) != bits:
        raise InvalidInput(
            f"{path} is not stored at {bits} bits; `mlxarch quantize {path} --bits {bits}` "
            "makes it so"
        )
    return path


def _run_first_available(
    methods: list[AcquisitionMethod],
    progress: Progress,
    confirm: Confirm,
    name: str,
    evaluate: bool,
) -> Path:
    """Obtain a model by the first method that works, and return its folder."""
    failures: list[MlxArchError] = []
    for method in methods:
        if method.online and any(isinstance(failure, OfflineError) for failure in failures):
            continue  # the Hub was unreachable a moment ago
        try:
            acquisition = method.plan()
        except (ModelNotFound, OfflineError, DownloadError, BackendMissing) as failure:
            failures.append(failure)
            continue
        _check_disk_space(acquisition)
        if not confirm(acquisition):
            raise Declined(f"{acquisition.name}: not agreed to; nothing was downloaded")
        try:
            return method.run(progress, evaluate)
        except (ModelNotFound, OfflineError) as failure:
            failures.append(failure)
    raise _combine_failures(failures, name)


def _combine_failures(failures: list[MlxArchError], name: str) -> MlxArchError:
    """Return the failure that the user can best act on, followed by the others."""
    order = (GatedModel, BackendMissing, DownloadError, OfflineError, ModelNotFound)
    failures = sorted(
        failures,
        key=lambda failure: next(n for n, kind in enumerate(order) if isinstance(failure, kind)),
    )
    text = "\n".join([str(failures[0]), *(f"also tried: {failure}" for failure in failures[1:])])
    copies = [model.name for model in list_installed() if model.name.startswith(f"{name}-")]
    if copies:
        text += f"\non this machine there is {', '.join(copies)}"
    return type(failures[0])(text)


def _check_disk_space(acquisition: Acquisition) -> None:
    target = acquisition.target
    folder = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if acquisition.disk_bytes > free:
        raise DiskSpaceError(
            f"{acquisition.name} needs {format_size(acquisition.disk_bytes)} "
            f"({acquisition.disk_bytes} bytes) at {folder}, and {format_size(free)} ({free} bytes) "
            "are free; free some space, or move the place (MLXARCH_HOME, HF_HOME)"
        )
