"""Models on this machine: made by mlxarch, in folders of the user, or in the Hub's cache.

A model is listed once its folder is complete.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlxarch.errors import MlxArchError, ModelNotFound
from mlxarch.hub import catalog, hub_client
from mlxarch.hub.catalog import Bits, CatalogEntry, HubSource, ModelReference, WheelSource
from mlxarch.loading.model_types import RUNNABLE
from mlxarch.system import paths
from mlxarch.system.untrusted_files import read_json

# Folder of a repository in the Hub's cache
_HUB_CACHE_FOLDER = re.compile("models--(.+?)--(.+)")


@dataclass(frozen=True)
class InstalledModel:
    """A complete model on this machine.

    Attributes:
        name: name by which the model is found.
        bits: bits of most of its weights; None if they are not quantized.
        bytes: size of all files.
        architecture: ``model_type`` of its config.
        origin: "mlxarch" made it, it is in the cache of the "hub", or in a "folder" of the user
            (MLXARCH_MODELS), which is never written to.
        path: its folder.
    """

    name: str
    bits: int | None
    bytes: int
    architecture: str
    origin: Literal["mlxarch", "hub", "folder"]
    path: Path


def folder_name(name: str, bits: Bits) -> str:
    """Return the folder name of a model made here: ``qwen3-8b-8bit``, ``org--repo-original``."""
    return f"{name.replace('/', '--')}-{bits if bits == 'original' else f'{bits}bit'}"


def find_model(name: str, bits: Bits) -> Path | None:
    """Return the complete folder of a model at some bits, of mlxarch or of the user, or None."""
    wanted = folder_name(name, bits)
    for root in [paths.models(), *_user_roots()]:
        for folder in _model_folders(root):
            names = (folder.name, _canonical_name(folder.name))
            if wanted in names and hub_client.is_complete(folder):
                return folder
    return None


def list_installed() -> list[InstalledModel]:
    """Return every complete model whose architecture is supported, sorted by name."""
    found: list[InstalledModel] = []
    for root in [paths.models(), *_user_roots()]:
        origin = "mlxarch" if root == paths.models() else "folder"
        for folder in _model_folders(root):
            if model := _read_model(folder.name, folder, origin):
                found.append(model)
    for repo, commit, folder in _cached_snapshots():
        if model := _read_model(_snapshot_name(repo, commit, folder), folder, "hub"):
            found.append(model)
    return sorted(found, key=lambda model: (model.name.lower(), str(model.path)))


def list_unfinished() -> dict[str, int]:
    """Return the names of models whose conversion was interrupted, with the bytes on the disk."""
    folders = [folder for folder in _subfolders(paths.models()) if folder.suffix == ".partial"]
    return {folder.stem: bytes_below(folder) for folder in folders}


def find_copies(name: str) -> list[InstalledModel]:
    """Return the installed models with a name, or else those that a catalog name refers to.

    Raises:
        ModelNotFound: there is no such name.
    """
    models = list_installed()
    found = [model for model in models if model.name.lower() == name.strip().lower()]
    if not found:
        reference = catalog.parse(name)
        found = [model for model in models if _matches(model, reference)]
    return found


def describe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a model without downloading it: facts, sizes in bytes, sources, installed copies.

    Raises:
        ModelNotFound, OfflineError: the folder does not exist, or the repository cannot be looked
            up.
    """
    reference = catalog.parse(os.fspath(name))
    copies = [asdict(model) | {"path": str(model.path)} for model in list_installed()]
    if reference.entry is not None:
        return _describe_entry(reference.entry, copies)
    revision = reference.revision or "main"
    folder = reference.path or hub_client.find_cached_snapshot(str(reference.repo), revision)
    if folder is not None:
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFound(
                f"{folder}: there is no such folder; name one with config.json and safetensors "
                "files"
            )
        config = read_json(folder / "config.json")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        source = str(folder)
    else:
        repository = hub_client.fetch_repository_info(str(reference.repo), revision)
        config = dict(repository.config)
        size = sum(file.size for file in repository.files)
        source = f"{repository.repo}@{repository.revision}"
    return {
        "name": reference.name,
        "architecture": config.get("model_type"),
        "bits": _all_stored_bits(config),
        "context": _context_length(config),
        "source_bytes": size,
        "sources": [source],
        "installed": [
            copy for copy in copies if copy["name"] == reference.name or copy["path"] == str(folder)
        ],
    }


def _describe_entry(entry: CatalogEntry, copies: list[dict[str, Any]]) -> dict[str, Any]:
    prefix = entry.name + "-"
    return {
        "name": entry.name,
        "title": entry.title,
        "architecture": entry.architecture,
        "parameters": entry.parameters,
        "active": entry.active or entry.parameters,
        "layers": entry.layers,
        "context": entry.context,
        "licence": entry.licence,
        "gated": entry.gated,
        "sampling": dict(entry.sampling),
        "source_bytes": entry.weight_bytes,
        "bytes": {bits: entry.quantized_bytes(bits) for bits in (8, 6, 5, 4, 3, 2)},
        "sources": [_describe_source(source) for source in entry.sources],
        "ready": {ready.bits: _describe_source(ready) for ready in entry.ready},
        "installed": [copy for copy in copies if copy["name"].startswith(prefix)],
    }


def _context_length(config: dict[str, Any]) -> int | None:
    """Context length in tokens; a multimodal model has it in the section of its text decoder."""
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if key in section:
                return section[key]
    return None


def find_catalog_entry(folder: Path) -> CatalogEntry | None:
    """Return the catalog entry of a folder that mlxarch made or the Hub's cache holds, or None."""
    folder = folder.resolve()
    if folder.parent == paths.models().resolve():
        return catalog.entries().get(catalog.normalize_name(folder.name)[0])
    match = None
    if folder.parent.name == "snapshots":
        match = _HUB_CACHE_FOLDER.fullmatch(folder.parent.parent.name)
    repo = f"{match[1]}/{match[2]}" if match else None
    for entry in catalog.entries().values():
        sources = (*entry.sources, *entry.ready)
        if any(isinstance(source, HubSource) and source.repo == repo for source in sources):
            return entry
    return None


def _describe_source(source: HubSource | WheelSource) -> str:
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision}"
    return f"{source.package} ({source.member})"


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _matches(model: InstalledModel, reference: ModelReference) -> bool:
    if reference.path is not None:
        return model.path.resolve() == reference.path.resolve()
    if reference.repo is not None:
        stem = reference.repo.replace("/", "--")
        return model.name == reference.repo or model.name.startswith((f"{stem}-", f"{stem}@"))
    base, bits = catalog.normalize_name(model.name)
    return base == reference.name and reference.bits in (None, bits)


def _canonical_name(folder: str) -> str:
    """Folder name in the spelling that ``folder_name`` would give the model."""
    if "--" in folder:
        return folder.lower()
    base, bits = catalog.normalize_name(folder)
    return folder_name(base, bits) if bits else base


def _user_roots() -> list[Path]:
    """Folders of the user that contain models (MLXARCH_MODELS)."""
    roots = os.environ.get("MLXARCH_MODELS", "").split(os.pathsep)
    return [Path(root).expanduser() for root in roots if root]


def _model_folders(root: Path) -> list[Path]:
    """Model folders in ``root`` and one level deeper, as LM Studio keeps them.

    Hidden and partial folders are left out.
    """
    found: list[Path] = []
    for folder in _finished_subfolders(root):
        if (folder / "config.json").exists():
            found.append(folder)
        else:
            found += _finished_subfolders(folder)
    return found


def _finished_subfolders(root: Path) -> list[Path]:
    return [folder for folder in _subfolders(root) if folder.suffix != ".partial"]


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(
            entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError:
        return []


def _cached_snapshots() -> Iterator[tuple[str, str, Path]]:
    """Yield repository, commit and folder of every model in the Hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return
    for repository in repositories:
        if repository.repo_type == "model":
            for revision in repository.revisions:
                yield repository.repo_id, revision.commit_hash, revision.snapshot_path


def _read_model(
    name: str, folder: Path, origin: Literal["mlxarch", "hub", "folder"]
) -> InstalledModel | None:
    """Return the model in a folder; None if it is incomplete or its architecture not supported."""
    if not hub_client.is_complete(folder):
        return None
    try:
        config = read_json(folder / "config.json")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except (OSError, MlxArchError):
        return None
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in RUNNABLE:
        return None
    return InstalledModel(name, stored_bits(config), size, model_type, origin, folder)


def stored_bits(config: object) -> int | None:
    """Return the default bits in the ``quantization`` section of a config.json, or None."""
    section = config.get("quantization") if isinstance(config, dict) else None
    bits = section.get("bits") if isinstance(section, dict) else None
    return bits if type(bits) is int else None


def _all_stored_bits(config: dict[str, Any]) -> int | list[int] | None:
    """Bits of the weight matrices; with mixed precision a sorted list of all bits that occur."""
    section = config.get("quantization")
    if not isinstance(section, dict):
        return None
    found = sorted(
        {
            entry["bits"]
            for entry in (section, *section.values())
            if isinstance(entry, dict) and type(entry.get("bits")) is int
        }
    )
    return found if len(found) > 1 else next(iter(found), None)


def _snapshot_name(repo: str, commit: str, folder: Path) -> str:
    """Name of a snapshot in the Hub's cache.

    It is the catalog name of the repository if it has one, else that of the repository, with the
    commit unless it is the current one.
    """
    for entry in catalog.entries().values():
        for ready in entry.ready:
            if ready.repo == repo and (ready.revision == commit or not ready.pinned):
                return folder_name(entry.name, ready.bits)
        for source in entry.sources:
            if isinstance(source, HubSource) and source.repo == repo and source.revision == commit:
                return folder_name(entry.name, "original")
    current = hub_client.find_cached_snapshot(repo)
    if current is not None and current.resolve() == folder.resolve():
        return repo
    return f"{repo}@{commit[:12]}"
