"""The Hub's cache on this machine, read without network access."""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from mlxarch.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from mlxarch.checkpoint.tp_shards import find_tp_files
from mlxarch.errors import CheckpointError, MlxArchError
from mlxarch.hub.hub_errors import translate_hub_errors
from mlxarch.system.untrusted_files import read_json, safe_path

CACHED_REPOSITORY = re.compile("models--(.+?)--(.+)")
"""Folder of a repository in the Hub's cache."""
_ABBREVIATED_COMMIT = re.compile("[0-9a-f]{7,39}")
_NUMBERED_SHARD = re.compile(r".*-of-(\d+)\.safetensors")


def find_cached_snapshot(repo: str, revision: str = "main") -> Path | None:
    """Return the folder of a complete snapshot in the Hub's cache, without network access."""
    from huggingface_hub import try_to_load_from_cache

    with translate_hub_errors(repo, revision):
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    folder = Path(found).parent if isinstance(found, str) else _abbreviated_snapshot(repo, revision)
    return folder if folder and is_complete(folder) else None


def _abbreviated_snapshot(repo: str, revision: str) -> Path | None:
    """Return the snapshot whose commit begins with ``revision``, as in ``org/name@0123456789ab``."""
    if not _ABBREVIATED_COMMIT.fullmatch(revision):
        return None
    snapshots = repository_folder(repo) / "snapshots"
    found = list(snapshots.glob(f"{revision}*"))
    return found[0] if len(found) == 1 else None


def model_title(folder: Path) -> str:
    """Return the name by which commands know a folder: of a snapshot, ``org/name@commit``."""
    folder = folder.resolve()
    match = CACHED_REPOSITORY.fullmatch(folder.parent.parent.name)
    if folder.parent.name != "snapshots" or match is None:
        return folder.name
    return f"{match[1]}/{match[2]}@{folder.name[:12]}"


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a config.json and all of its weight files."""
    try:
        if not (folder / "config.json").is_file():
            return False
        index = folder / INDEX_FILE
        if index.is_file():
            return all((folder / name).is_file() for name in shard_names(index))
        names = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
        if SINGLE_FILE in names:
            return True
        find_tp_files(folder, names)  # raises if a slice is missing
        numbered = [found for name in names if (found := _NUMBERED_SHARD.fullmatch(name))]
        return bool(names) and all(len(numbered) >= int(found[1]) for found in numbered)
    except (OSError, MlxArchError):
        return False


def repository_folder(repo: str) -> Path:
    """Return the folder of a repository in the Hub's cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def remember_absent(repo: str, commit: str, names: Iterable[str]) -> None:
    """Note in the Hub's cache that a commit does not have these files."""
    folder = repository_folder(repo) / ".no_exist" / commit
    with contextlib.suppress(OSError):  # the cache may be read-only: it is asked again then
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()


def partial_downloads() -> dict[str, list[Path]]:
    """Return the files of interrupted downloads by repository; see ``file_download``."""
    found: dict[str, list[Path]] = {}
    for path in cache_folder().glob("models--*/blobs/*.incomplete"):
        match = CACHED_REPOSITORY.fullmatch(path.parent.parent.name)
        if match and "." not in path.stem:  # with a dot it is that of a running huggingface_hub
            found.setdefault(f"{match[1]}/{match[2]}", []).append(path)
    return found


def cache_folder() -> Path:
    """Return the folder of the Hub's cache (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def shard_names(index: Path) -> list[str]:
    """Return the sorted names of the weight files that a shard index lists.

    Raises:
        CheckpointError: the index is malformed, or a name could leave the folder (``safe_path``).
    """
    table = read_json(
        index, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError
    ).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(
            f"{index}: weight_map must name the file of each tensor; take another revision"
        )
    names = sorted(set(table.values()))
    for name in names:
        safe_path(index.parent, name)
    return names
