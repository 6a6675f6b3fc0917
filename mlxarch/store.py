"""From a name to a folder that can be loaded: what is here, what is ready to download, what has to be quantized."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxarch import catalog
from mlxarch.candidates import Candidate, Conversion, Download, Import, Plan
from mlxarch.catalog import Bits, Entry, HubSource, Reference, WheelSource
from mlxarch.checkpoint import read_json
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
from mlxarch.inventory import Installed, describe, find, folder_name, installed, remove, stored_bits, unfinished
from mlxarch.progress import Progress, gigabytes, silent

if TYPE_CHECKING:
    from mlxarch.memory import Plan as MemoryPlan
    from mlxarch.memory import Request

__all__ = ["Installed", "Plan", "describe", "fitting_bits", "installed", "obtain", "remove", "unfinished"]

BITS = (2, 3, 4, 5, 6, 8, "original")

Confirm = Callable[[Plan], bool]


def obtain(
    name: str | os.PathLike[str],
    *,
    bits: int | str | None = None,
    progress: Progress = silent,
    confirm: Confirm | None = None,
    refresh: bool = False,
    request: "Request | None" = None,
    evaluate: bool = False,
) -> Path:
    """The folder of a model, made or downloaded first where it is not here.

    A path is itself (a GGUF file is imported). A catalog name is looked for at the bits asked for, else at the largest
    of 8 and 4 that fits this machine: among our own models, then as a repository that MLX quantized, else as the
    original, which is quantized while it downloads, file by file. ``org/repo`` is taken as it is, unless bits are asked
    for.

    Args:
        name: see ``catalog``.
        bits: 2, 3, 4, 5, 6, 8, or "original": as published.
        progress: told of downloads and conversion.
        confirm: asked before anything large happens; None agrees. False raises Declined.
        request: how it is to run; what does not fit so is not downloaded. None obtains it all the same.
        refresh: look for a newer revision of a repository that is here but not pinned to a commit.
        evaluate: measure what is quantized here against its source, where that stays here.

    Raises:
        ModelNotFound, GatedModel, OfflineError, DownloadError: it cannot be had.
        MemoryBudgetError: neither 8 nor 4 bits fit, or not what is asked for.
        DiskSpaceError: there is not enough room; nothing was downloaded.
        InvalidInput: bits that do not exist, or not those that the name asks for.
    """
    reference = catalog.parse(os.fspath(name))
    if isinstance(name, os.PathLike):
        reference = Reference("path", os.fspath(name), path=Path(name).expanduser())
    wanted = _wanted(reference, bits)
    if reference.path is not None:
        return _from_path(reference.path, wanted, progress, confirm, evaluate)
    if reference.entry is not None:
        wanted = wanted or fitting_bits(reference.entry, request)
        here = find(reference.entry.name, wanted)
    else:
        here = find(_own_name(reference), wanted) if wanted else None
    if here is not None:
        return here
    candidates = _candidates(reference, wanted)
    for candidate in candidates:
        if isinstance(candidate, Download) and (found := candidate.held(refresh)):
            return found
    if request is not None and reference.entry is not None and isinstance(wanted, int):
        _plan(reference.entry, request, wanted).require()

    def agreed(plan: Plan) -> bool:
        return confirm is None or confirm(replace(plan, verdict=_verdict(reference.entry, plan, request, wanted)))

    return _first_that_works(candidates, progress, agreed, reference.name, evaluate)


def fitting_bits(entry: Entry, request: "Request | None" = None) -> int:
    """The largest of 8 and 4 at which the model fits this machine: beside all else in memory, or else streamed.

    Raises:
        MemoryBudgetError: neither does.
    """
    return _plan(entry, request).require().bits


def _plan(entry: Entry, request: "Request | None", bits: int | None = None) -> "MemoryPlan":
    from mlxarch import machines
    from mlxarch.footprint import from_config
    from mlxarch.memory import Request, best_plan

    blueprint = from_config(entry.name, read_json(entry.config))
    return best_plan(blueprint, machines.here(), replace(request or Request(), bits=bits))


def _verdict(entry: Entry | None, what: Plan, request: "Request | None", bits: Bits | None) -> str:
    """How it will run here, in words."""
    from mlxarch import machines
    from mlxarch.footprint import from_config
    from mlxarch.memory import Request, plan

    config = what.config if entry is None else read_json(entry.config)
    if config is None:
        return ""
    known = bits if isinstance(bits, int) else stored_bits(config) or 16
    asked = replace(request or Request(), bits=known)
    return plan(from_config(what.name, config), machines.here(), asked).words


def _wanted(reference: Reference, bits: int | str | None) -> Bits | None:
    if bits is not None and bits not in BITS:
        raise InvalidInput(f"bits must be one of {', '.join(map(str, BITS))}, found {bits!r}")
    if bits is not None and reference.bits is not None and bits != reference.bits:
        raise InvalidInput(f"the name asks for {reference.bits} bits and bits={bits!r} for others; say it once")
    return reference.bits if bits is None else "original" if bits == "original" else int(bits)


def _candidates(reference: Reference, bits: Bits | None) -> list[Candidate]:
    """The ways to a model that is not a path, in the order of trying."""
    entry = reference.entry
    if entry is None:
        source = HubSource(str(reference.repo), reference.revision or "main")
        if bits is None or bits == "original":
            return [Download(reference.name, source)]
        return [Conversion(_own_name(reference), bits, source)]
    if bits is None:
        bits = fitting_bits(entry)
    ways: list[Candidate] = [Download(folder_name(entry.name, bits), r) for r in entry.ready if r.bits == bits]
    base = next((source.repo for source in entry.sources if isinstance(source, HubSource)), "")
    for source in entry.sources:
        if isinstance(source, WheelSource):
            ways.append(Import(entry.name, bits, source, base, entry.licence))
        elif bits == "original":
            ways.append(Download(folder_name(entry.name, bits), source))
        else:
            ways.append(Conversion(entry.name, bits, source, entry.licence))
    return ways


def _own_name(reference: Reference) -> str:
    revision = reference.revision or "main"
    return str(reference.repo) + ("" if revision == "main" else f"@{revision[:12].replace('/', '-')}")


def _from_path(path: Path, bits: Bits | None, progress: Progress, confirm: Confirm | None, evaluate: bool) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        status = path.stat()
        facts = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        name = f"{path.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
        importing = Import(name, bits or "original", path)
        here = find(name, importing.bits)
        return here or _first_that_works([importing], progress, confirm, str(path), evaluate)
    if not path.is_dir():
        raise ModelNotFound(f"{path}: there is no such folder; name one with config.json and safetensors files")
    if bits not in (None, "original") and stored_bits(read_json(path / "config.json")) != bits:
        raise InvalidInput(f"{path} is not stored at {bits} bits; `mlxarch quantize {path} --bits {bits}` makes it so")
    return path


def _first_that_works(
    candidates: list[Candidate], progress: Progress, confirm: Confirm | None, name: str, evaluate: bool
) -> Path:
    failures: list[MlxArchError] = []
    for candidate in candidates:
        if candidate.online and any(isinstance(failure, OfflineError) for failure in failures):
            continue  # the Hub was out of reach a moment ago
        try:
            plan = candidate.plan()
        except (ModelNotFound, OfflineError, DownloadError, BackendMissing) as failure:
            failures.append(failure)
            continue
        _check_room(plan)
        if confirm is not None and not confirm(plan):
            raise Declined(f"{plan.name}: not agreed to; nothing was downloaded")
        try:
            return candidate.run(progress, evaluate)
        except (ModelNotFound, OfflineError) as failure:
            failures.append(failure)
    raise _joined(failures, name)


def _joined(failures: list[MlxArchError], name: str) -> MlxArchError:
    """The failure that a person can do most about, with what was tried besides."""
    order = (GatedModel, BackendMissing, DownloadError, OfflineError, ModelNotFound)
    failures = sorted(
        failures, key=lambda failure: next(n for n, kind in enumerate(order) if isinstance(failure, kind))
    )
    text = "\n".join([str(failures[0]), *(f"also tried: {failure}" for failure in failures[1:])])
    here = [model.name for model in installed() if model.name.startswith(f"{name}-")]
    if here:
        text += f"\non this machine there is {', '.join(here)}"
    return type(failures[0])(text)


def _check_room(plan: Plan) -> None:
    place = next(place for place in (plan.target, *plan.target.parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if plan.disk_bytes > free:
        raise DiskSpaceError(
            f"{plan.name} needs {gigabytes(plan.disk_bytes)} ({plan.disk_bytes} bytes) at {place}, and "
            f"{gigabytes(free)} ({free} bytes) are free; free some space, or move the place (MLXARCH_HOME, HF_HOME)"
        )
