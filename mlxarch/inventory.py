"""Which models are on this machine: what mlxarch made, folders that the user named, and what the Hub's cache holds."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlxarch import catalog, hub, paths
from mlxarch.catalog import Bits, Entry, HubSource, Reference, WheelSource
from mlxarch.checkpoint import read_json
from mlxarch.errors import Declined, InvalidInput, MlxArchError, ModelNotFound, OutputError

_CACHED = re.compile("models--(.+?)--(.+)")  # what huggingface_hub calls the folder of a repository
# model types that run here and that no model of the catalog has
OTHER_ARCHITECTURES = ("deepseek_v2", "gemma3n_text", "llama4_text", "ministral3", "olmo3", "qwen2", "qwen2_moe")


@dataclass(frozen=True)
class Installed:
    """A complete model: ``bytes`` of all its files; ``bits`` of its weights, None where they are not quantized.

    ``origin`` says whose it is: "mlxarch" made it, the "hub" cache holds it, or it lies in a "folder" of the user's
    (MLXARCH_MODELS), which is never written to.
    """

    name: str
    bits: int | None
    bytes: int
    architecture: str
    origin: Literal["mlxarch", "hub", "folder"]
    path: Path


def folder_name(name: str, bits: Bits) -> str:
    """What a model made here is called on the disk: ``qwen3-8b-8bit``, ``org--repo-original``."""
    return f"{name.replace('/', '--')}-{bits if bits == 'original' else f'{bits}bit'}"


def find(name: str, bits: Bits) -> Path | None:
    """The complete folder of that name and those bits among our own and the user's, or None."""
    wanted = folder_name(name, bits)
    for root in [paths.models(), *_extra_roots()]:
        for folder in _folders(root):
            if wanted in (folder.name, _canonical(folder.name)) and hub.is_complete(folder):
                return folder
    return None


def installed() -> list[Installed]:
    """Every complete model of an architecture that this release runs, by name. Partial ones are left out."""
    found: list[Installed] = []
    for root in [paths.models(), *_extra_roots()]:
        origin = "mlxarch" if root == paths.models() else "folder"
        found += [model for folder in _folders(root) if (model := _model(folder.name, folder, origin))]
    for repo, commit, folder in _cached():
        if model := _model(_known_as(repo, commit, folder), folder, "hub"):
            found.append(model)
    return sorted(found, key=lambda model: (model.name.lower(), str(model.path)))


def unfinished() -> dict[str, int]:
    """Models that mlxarch was making when it was killed, and the bytes of what is there of each."""
    folders = [folder for folder in _entries(paths.models()) if folder.suffix == ".partial"]
    return {folder.stem: _bytes_below(folder) for folder in folders}


def copies_of(name: str) -> list[Installed]:
    """The models on this machine that go by a name: by their own, or else by one of the catalog.

    Raises:
        ModelNotFound: there is no such name.
    """
    everything = installed()
    found = [model for model in everything if model.name.lower() == name.strip().lower()]
    if not found:
        reference = catalog.parse(name)
        found = [model for model in everything if _fits(model, reference)]
    return found


def remove(name: str, *, from_hub_cache: bool = False, confirm: Callable[[int], bool] | None = None) -> int:
    """Delete a model that mlxarch made, or what a killed run left of one, and return the bytes that frees.

    With ``from_hub_cache`` it is the copy in the Hub's cache that goes, by huggingface_hub's own hand: other programs
    use that cache too. Folders of the user's are never touched. ``confirm`` is asked, with the bytes, when it is known
    that the model can be removed; None agrees.

    Raises:
        Declined: ``confirm`` did not agree.
        ModelNotFound: there is no such model here, or only one that is not ours to delete.
        InvalidInput: several fit the name.
        OutputError: it cannot be removed, or is being made just now.
    """
    if not from_hub_cache and name in unfinished() and not (paths.models() / name).exists():
        return _remove_unfinished(name, confirm)
    mine = copies_of(name)
    if from_hub_cache:
        return _remove_cached([model for model in mine if model.origin == "hub"], name, confirm)
    own = [model for model in mine if model.origin == "mlxarch"]
    if len(own) > 1:
        raise InvalidInput(f"{name!r} fits {', '.join(model.name for model in own)}; name one of them")
    if not own:
        where = next((model.path for model in mine), None)
        raise ModelNotFound(
            f"mlxarch made no model {name!r}"
            + (f"; the one at {where} is not its own. " if where else ". ")
            + "`mlxarch list` shows what is here; --hub removes a copy from the Hub's cache, which other programs share"
        )
    _ask(confirm, name, own[0].bytes)
    folder = own[0].path
    going = folder.with_name(f".removing-{os.getpid()}-{folder.name}")
    try:
        folder.rename(going)  # first, so that half of a model is never found
        shutil.rmtree(going)
    except OSError as error:
        raise OutputError(f"{folder} could not be removed: {error.strerror or error}") from error
    return own[0].bytes


def describe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a model without downloading it: facts, sizes in bytes, sources, and copies on this machine.

    Raises:
        ModelNotFound, OfflineError: a folder that is not there, or a repository that cannot be looked up.
    """
    reference = catalog.parse(os.fspath(name))
    copies = [asdict(model) | {"path": str(model.path)} for model in installed()]
    if reference.entry is not None:
        entry = reference.entry
        prefix = entry.name + "-"
        return {
            **{"name": entry.name, "title": entry.title, "architecture": entry.architecture},
            **{"parameters": entry.parameters, "active": entry.active or entry.parameters, "layers": entry.layers},
            **{"context": entry.context, "licence": entry.licence},
            **{"gated": entry.gated, "sampling": dict(entry.sampling), "source_bytes": entry.weight_bytes},
            "bytes": {bits: entry.quantized_bytes(bits) for bits in (8, 6, 5, 4, 3, 2)},
            "sources": [_in_words(source) for source in entry.sources],
            "ready": {ready.bits: _in_words(ready) for ready in entry.ready},
            "installed": [copy for copy in copies if copy["name"].startswith(prefix)],
        }
    folder = reference.path or hub.cached(str(reference.repo), reference.revision or "main")
    if folder is not None:
        if not Path(folder).is_dir():
            raise ModelNotFound(f"{folder}: there is no such folder; name one with config.json and safetensors files")
        config = read_json(Path(folder) / "config.json")
        files = [path for path in Path(folder).iterdir() if path.is_file()]
        size, source = sum(path.stat().st_size for path in files), str(folder)
    else:
        repository = hub.look_up(str(reference.repo), reference.revision or "main")
        config, size = dict(repository.config), sum(file.size for file in repository.files)
        source = f"{repository.repo}@{repository.revision}"
    return {
        **{"name": reference.name, "architecture": config.get("model_type"), "bits": _widths(config)},
        **{"context": _context(config), "source_bytes": size, "sources": [source]},
        "installed": [copy for copy in copies if copy["name"] == reference.name or copy["path"] == str(folder)],
    }


def _context(config: dict[str, Any]) -> int | None:
    """Tokens; a model that also sees or hears has them in a section of their own."""
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    return next(
        (place[key] for place in places for key in ("max_position_embeddings", "n_positions") if key in place), None
    )


def entry_of(folder: Path) -> Entry | None:
    """The model of the catalog that lies in a folder which mlxarch made, or in the Hub's cache; None for others."""
    folder = folder.resolve()
    if folder.parent == paths.models().resolve():
        return catalog.entries().get(catalog.normalize(folder.name)[0])
    found = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    repo = f"{found[1]}/{found[2]}" if found else None
    for entry in catalog.entries().values():
        sources = (*entry.sources, *entry.ready)
        if any(isinstance(source, HubSource) and source.repo == repo for source in sources):
            return entry
    return None


def _in_words(source: HubSource | WheelSource) -> str:
    return (
        f"{source.repo}@{source.revision}" if isinstance(source, HubSource) else f"{source.package} ({source.member})"
    )


def _remove_unfinished(name: str, confirm: Callable[[int], bool] | None) -> int:
    from mlxarch.quantize.disk import Disk
    from mlxarch.quantize.journal import Workspace

    workspace = Workspace(paths.models() / name, Disk())
    with workspace:  # or it would be taken from under a process that works on it
        _ask(confirm, name, freed := _bytes_below(workspace.folder))
        workspace.discard()
    if workspace.folder.exists():
        raise OutputError(f"{workspace.folder} could not be removed; look at who may write there")
    return freed


def _remove_cached(models: list[Installed], name: str, confirm: Callable[[int], bool] | None) -> int:
    from huggingface_hub import scan_cache_dir

    if not models:
        raise ModelNotFound(f"the Hub's cache holds no model {name!r}; `mlxarch list` shows what is here")
    strategy = scan_cache_dir().delete_revisions(*(model.path.name for model in models))
    _ask(confirm, name, strategy.expected_freed_size)
    strategy.execute()
    return strategy.expected_freed_size


def _ask(confirm: Callable[[int], bool] | None, name: str, freed: int) -> None:
    if confirm is not None and not confirm(freed):
        raise Declined(f"{name} stays")


def _bytes_below(folder: Path) -> int:
    """Of all files in a folder, in which somebody may be at work: what vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _fits(model: Installed, reference: Reference) -> bool:
    if reference.path is not None:
        return model.path.resolve() == reference.path.resolve()
    if reference.repo is not None:
        stem = reference.repo.replace("/", "--")
        return model.name == reference.repo or model.name.startswith((f"{stem}-", f"{stem}@"))
    base, bits = catalog.normalize(model.name)
    return base == reference.name and reference.bits in (None, bits)


def _canonical(folder: str) -> str:
    base, bits = catalog.normalize(folder) if "--" not in folder else (folder.lower(), None)
    return folder_name(base, bits) if bits else base


def _extra_roots() -> list[Path]:
    return [Path(part).expanduser() for part in os.environ.get("MLXARCH_MODELS", "").split(os.pathsep) if part]


def _folders(root: Path) -> list[Path]:
    """Model folders directly in ``root``, and one level deeper as LM Studio keeps them; hidden and partial ones not."""
    found: list[Path] = []
    for folder in _subfolders(root):
        found += [folder] if (folder / "config.json").exists() else _subfolders(folder)
    return found


def _subfolders(root: Path) -> list[Path]:
    return [e for e in _entries(root) if e.suffix != ".partial"]


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(e for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def _cached() -> Iterator[tuple[str, str, Path]]:
    """Repository, commit and folder of all that the Hub's cache holds."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return
    for repository in repositories:
        if repository.repo_type == "model":
            for revision in repository.revisions:
                yield repository.repo_id, revision.commit_hash, revision.snapshot_path


def _model(name: str, folder: Path, origin: Literal["mlxarch", "hub", "folder"]) -> Installed | None:
    if not hub.is_complete(folder):
        return None
    try:
        config = read_json(folder / "config.json")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except (OSError, MlxArchError):
        return None
    kind = config.get("model_type")
    if kind not in {*OTHER_ARCHITECTURES, *(entry.architecture for entry in catalog.entries().values())}:
        return None
    return Installed(name, stored_bits(config), size, kind, origin, folder)


def stored_bits(config: object) -> int | None:
    """The common bits in the ``quantization`` of a config.json."""
    section = config.get("quantization") if isinstance(config, dict) else None
    bits = section.get("bits") if isinstance(section, dict) else None
    return bits if type(bits) is int else None


def _widths(config: dict[str, Any]) -> int | list[int] | None:
    """The bits of a model's matrices, and of a mixture all there are."""
    section = config.get("quantization")
    parts = [section, *section.values()] if isinstance(section, dict) else []
    found = sorted({part["bits"] for part in parts if isinstance(part, dict) and type(part.get("bits")) is int})
    return found if len(found) > 1 else next(iter(found), None)


def _known_as(repo: str, commit: str, folder: Path) -> str:
    """The catalog's name for a repository, or the repository's own, with its commit where several could be meant."""
    for entry in catalog.entries().values():
        for ready in entry.ready:
            if ready.repo == repo and (ready.revision == commit or not ready.pinned):
                return folder_name(entry.name, ready.bits)
        for source in entry.sources:
            if isinstance(source, HubSource) and source.repo == repo and source.revision == commit:
                return folder_name(entry.name, "original")
    current = hub.cached(repo)
    return repo if current is not None and current.resolve() == folder.resolve() else f"{repo}@{commit[:12]}"
