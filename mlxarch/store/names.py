"""Names of models, as any command takes and prints them, and the copies on this machine."""

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxarch.errors import BackendMissing, InvalidInput, ModelNotFound
from mlxarch.hub import catalog, hub_cache
from mlxarch.hub.catalog import Bits, CatalogEntry, HubSource, ModelReference
from mlxarch.progress import format_size
from mlxarch.store.installed import (
    InstalledModel,
    find_folders,
    find_model,
    list_installed,
    list_unfinished,
    local_name,
)
from mlxarch.system.backend import require_backend

if TYPE_CHECKING:
    from mlxarch.planner.plan import Request

# Bits of copies on this machine, in the order of preference; the original needs the most memory
_COPY_BITS: tuple[Bits, ...] = (8, 6, 5, 4, 3, 2, "original")
# Folder of a repository that was quantized here: org--name-4bit, org--name@revision-original
_MADE_FROM_REPOSITORY = re.compile(
    r"(?P<org>[\w.-]+?)--(?P<name>[\w.-]+?)(?:@(?P<revision>[\w.-]+))?-(?:(?P<bits>[234568])bit|original)"
)
# Weights below this fraction of the memory budget surely leave room for caches and activations
_SAFE_WEIGHT_FRACTION = 0.5


def resolve_name(name: str | os.PathLike[str]) -> ModelReference:
    """Return the model that a name refers to: all that ``catalog.parse`` knows, and installed ones.

    Every name that a command prints is known: of a folder in MLXARCH_MODELS, of a model that was
    quantized or imported here (``org--name-4bit``), or of a conversion that is unfinished.

    Raises:
        ModelNotFound: there is no such model; the message proposes others.
        InvalidInput: several folders have the name.
        ConfigError: the user's config.toml is malformed.
    """
    if isinstance(name, os.PathLike):
        return ModelReference("path", os.fspath(name), path=Path(name).expanduser())
    text = catalog.follow_aliases(name)
    try:
        return _look_up(text)
    except ModelNotFound as error:
        raise _explain_unknown(text) or error from None


def is_name(text: str) -> bool:
    """Return whether a text names a model, which need not be on this machine."""
    try:
        return _look_up(catalog.follow_aliases(text)) is not None
    except ModelNotFound:
        return False


def _look_up(text: str) -> ModelReference:
    reference = failure = None
    try:
        reference = catalog.parse(text)
    except ModelNotFound as error:
        failure = error
    if reference is not None and (reference.path is not None or reference.bits is not None):
        return reference
    folders = find_folders(text)
    if len(folders) > 1:
        places = ", ".join(str(folder) for folder in folders)
        raise InvalidInput(f"{text} may be {places}; give the path of one")
    if folders:
        return ModelReference("path", text, path=folders[0])
    if reference is not None:
        return reference
    if found := _MADE_FROM_REPOSITORY.fullmatch(text):
        repo = f"{found['org']}/{found['name']}"
        bits = int(found["bits"]) if found["bits"] else "original"
        revision = found["revision"] or "main"
        return ModelReference("repo", repo, repo=repo, revision=revision, bits=bits)
    raise failure or ModelNotFound(f"no model is called {text!r}")


def find_copies(name: str) -> list[InstalledModel]:
    """Return the installed models with a name, or else those that a catalog name refers to.

    Raises:
        ModelNotFound: there is no such name.
    """
    models = list_installed()
    found = [model for model in models if model.name.lower() == name.strip().lower()]
    if not found:
        reference = resolve_name(name)
        found = [model for model in models if _matches(model, reference)]
    return found


def find_local_copy(
    reference: ModelReference, request: "Request | None" = None, *, refresh: bool = False
) -> Path | None:
    """Return the folder of a model that is on this machine already, or None.

    With bits in the reference, only a copy of these bits counts. Without, an exact copy of a
    repository comes first, then the copy with the most bits that fits into the memory.

    Args:
        request: how the model is to run; decides which copy fits.
        refresh: only copies whose revision can never change.
    """
    repo = reference.repo
    revision = reference.revision or "main"
    if repo is not None and reference.bits in (None, "original"):
        source = HubSource(repo, revision)
        cached = hub_cache.find_cached_snapshot(repo, revision)
        if cached is not None and (source.pinned or not refresh):
            return cached
    if reference.bits is not None:
        return dict(local_copies(reference, refresh=refresh)).get(reference.bits)
    if refresh:
        return None
    return _largest_that_fits([folder for _, folder in local_copies(reference)], request)


def local_copies(reference: ModelReference, *, refresh: bool = False) -> list[tuple[Bits, Path]]:
    """Return bits and folder of each copy of a catalog model or a repository, largest first."""
    entry = reference.entry
    copies: list[tuple[Bits, Path]] = []
    for bits in _COPY_BITS:
        folder = find_model(entry.name if entry else local_name(reference), bits)
        if folder is None and entry is not None:
            folder = _cached_copy(entry, bits, refresh)
        if folder is not None:
            copies.append((bits, folder))
    return copies


def _cached_copy(entry: CatalogEntry, bits: Bits, refresh: bool) -> Path | None:
    """Return the snapshot of a catalog model in the Hub's cache."""
    ready = [source for source in entry.ready if source.bits == bits]
    original = [source for source in entry.sources if isinstance(source, HubSource)]
    for source in original if bits == "original" else ready:
        if refresh and not source.pinned:
            continue
        if cached := hub_cache.find_cached_snapshot(source.repo, source.revision):
            return cached
    return None


def _largest_that_fits(folders: list[Path], request: "Request | None") -> Path | None:
    """Return the first folder that fits into memory, or else the first that can be streamed."""
    if not folders:
        return None
    from mlxarch.system import machines

    budget = machines.this_machine().memory
    if request is not None and request.memory is not None:
        budget = request.memory
    streamed = None
    for folder in folders:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        has_context = request is not None and request.context is not None
        if not has_context and weights < _SAFE_WEIGHT_FRACTION * budget:
            return folder
        verdict = _verdict(folder, request)
        if verdict == "resident":
            return folder
        if verdict != "does not fit":
            streamed = streamed or folder
    return streamed


def _verdict(folder: Path, request: "Request | None") -> str:
    from mlxarch.planner.plan import Request
    from mlxarch.store.lookup import plan_folder

    return plan_folder(folder, replace(request or Request(), bits=None)).verdict


def _matches(model: InstalledModel, reference: ModelReference) -> bool:
    if reference.path is not None:
        return model.path.resolve() == reference.path.resolve()
    if reference.repo is not None:
        stem = reference.repo.replace("/", "--")
        return model.name == reference.repo or model.name.startswith((f"{stem}-", f"{stem}@"))
    base, bits = catalog.normalize_name(model.name)
    return base == reference.name and reference.bits in (None, bits)


def _explain_unknown(text: str) -> ModelNotFound | None:
    """Return an error with better proposals than the nearest names of the catalog, or None."""
    if members := catalog.family(text):
        names = ", ".join(entry.name for entry in members)
        return ModelNotFound(f"{text} is a family of models: {names}. {_propose_largest(members)}")
    if text in list_unfinished():
        return ModelNotFound(
            f"{text} is the unfinished import of a GGUF file; `mlxarch pull FILE` goes on with it, "
            f"`mlxarch rm {text}` removes it"
        )
    installed = {model.name.lower(): model.name for model in list_installed()}
    if near := difflib.get_close_matches(text.lower(), installed, n=3, cutoff=0.75):
        here = ", ".join(installed[name] for name in near)
        return ModelNotFound(
            f"no model is called {text!r}; on this machine there is {here}. `mlxarch list` shows "
            "all that can be had"
        )
    return None


def _propose_largest(members: list[CatalogEntry]) -> str:
    """Name the largest model of a family that fits into this machine's memory."""
    try:
        require_backend()
    except BackendMissing:
        return "Name one of them"
    if found := _largest_member(members):
        return f"The largest that fits into this machine is {found}: name that, or another"
    smallest = min(members, key=lambda entry: entry.parameters)
    return f"None of them fits into this machine; `mlxarch fit {smallest.name}` says why"


def _largest_member(members: list[CatalogEntry]) -> str | None:
    from mlxarch.planner.blueprint import blueprint_from_config
    from mlxarch.planner.planner import best_plan
    from mlxarch.system import machines
    from mlxarch.system.untrusted_files import read_json

    machine = machines.this_machine()
    for entry in sorted(members, key=lambda entry: entry.parameters, reverse=True):
        if entry.quantized_bytes(4) > machine.memory:
            continue
        blueprint = blueprint_from_config(entry.name, read_json(entry.config_path))
        plan = best_plan(blueprint, machine)
        if plan.verdict == "resident":
            size = format_size(entry.quantized_bytes(plan.bits))
            return f"{entry.name}-{plan.bits}bit ({size})"
    return None
