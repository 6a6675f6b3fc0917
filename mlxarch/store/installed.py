"""Models on this machine: made by mlxarch, in folders of the user, or in the Hub's cache.

A model is listed once its folder is complete.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlxarch.errors import MlxArchError, ModelNotFound
from mlxarch.hub import catalog, hub_cache
from mlxarch.hub.catalog import Bits, CatalogEntry, HubSource, ModelReference
from mlxarch.loading.model_types import RUNNABLE
from mlxarch.system import paths
from mlxarch.system.untrusted_files import read_json


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
            if wanted in names and hub_cache.is_complete(folder):
                return folder
    return None


def local_name(reference: ModelReference) -> str:
    """Name of what is made here from a repository: with its revision unless that is ``main``."""
    revision = reference.revision or "main"
    if revision == "main":
        return str(reference.repo)
    return f"{reference.repo}@{revision[:12].replace('/', '-')}"


def find_folders(name: str) -> list[Path]:
    """Return the complete folders that ``list_installed`` shows under a name, outside of the Hub's cache.

    A folder one level deeper is known as ``publisher/name`` too.
    """
    wanted = name.lower()
    found: list[Path] = []
    for root in [paths.models(), *_user_roots()]:
        for folder in _model_folders(root):
            names = {folder.name.lower()}
            if folder.parent != root:
                names.add(f"{folder.parent.name}/{folder.name}".lower())
            if wanted in names and hub_cache.is_complete(folder):
                found.append(folder)
        if found and root == paths.models():
            break  # what was made here comes first
    return found


def default_model() -> str:
    """Name of the model that is used where none is named: MLXARCH_MODEL, or the newest that is here.

    Raises:
        ModelNotFound: there is none.
    """
    if name := os.environ.get("MLXARCH_MODEL"):
        return name
    models = list_installed()
    if not models:
        raise ModelNotFound(
            "no model is named, and none is on this machine; `mlxarch list` shows names, and "
            "`mlxarch pull smollm2-135m` brings a small one"
        )
    return str(max(models, key=lambda model: model.path.stat().st_mtime).path)


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
    """Return what was interrupted, with the bytes on the disk: names of conversions, repositories."""
    folders = [folder for folder in _subfolders(paths.models()) if folder.suffix == ".partial"]
    found = {folder.stem: bytes_below(folder) for folder in folders}
    for repo, files in hub_cache.partial_downloads().items():
        found[repo] = sum(file.stat().st_size for file in files if file.exists())
    return found


def find_catalog_entry(folder: Path) -> CatalogEntry | None:
    """Return the catalog entry of a folder that mlxarch made or the Hub's cache holds, or None."""
    folder = folder.resolve()
    if folder.parent == paths.models().resolve():
        return catalog.entries().get(catalog.normalize_name(folder.name)[0])
    match = None
    if folder.parent.name == "snapshots":
        match = hub_cache.CACHED_REPOSITORY.fullmatch(folder.parent.parent.name)
    repo = f"{match[1]}/{match[2]}" if match else None
    for entry in catalog.entries().values():
        sources = (*entry.sources, *entry.ready)
        if any(isinstance(source, HubSource) and source.repo == repo for source in sources):
            return entry
    return None


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


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
    if not hub_cache.is_complete(folder):
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


def _snapshot_name(repo: str, commit: str, folder: Path) -> str:
    """Name of a snapshot in the Hub's cache.

    It is the catalog name of the repository if it has one, else that of the repository, with the
    commit unless it is the current one.
    """
    current = hub_cache.find_cached_snapshot(repo)
    is_current = current is not None and current.resolve() == folder.resolve()
    for entry in catalog.entries().values():
        for ready in entry.ready:
            if ready.repo == repo and (
                ready.revision == commit or (is_current and not ready.pinned)
            ):
                return folder_name(entry.name, ready.bits)
        for source in entry.sources:
            if isinstance(source, HubSource) and source.repo == repo and source.revision == commit:
                return folder_name(entry.name, "original")
    return repo if is_current else f"{repo}@{commit[:12]}"
