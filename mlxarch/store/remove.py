"""Remove models that mlxarch made, and on request copies in the Hub's cache."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mlxarch.errors import Declined, InvalidInput, ModelNotFound, OutputError
from mlxarch.hub import hub_cache
from mlxarch.store.installed import InstalledModel, bytes_below
from mlxarch.store.names import find_copies
from mlxarch.system import paths


def remove(
    name: str, *, from_hub_cache: bool = False, confirm: Callable[[int], bool] | None = None
) -> int:
    """Delete a model that mlxarch made, or the remains of an interrupted conversion or download.

    Folders of the user are never touched.

    Args:
        name: name of an installed model, or a catalog name.
        from_hub_cache: delete the copy in the Hub's cache instead, which other programs share; it
            is deleted through huggingface_hub.
        confirm: called with the bytes to be freed once the model is known to be removable; None:
            agree.

    Returns:
        The bytes that were freed.

    Raises:
        Declined: ``confirm`` returned False.
        ModelNotFound: there is no such model, or only one that mlxarch did not make.
        InvalidInput: several models match the name.
        OutputError: it cannot be removed, or is being made at this moment.
    """
    if (paths.models() / f"{name}.partial").is_dir() and not (paths.models() / name).exists():
        return _remove_unfinished(name, confirm)
    if partial := hub_cache.partial_downloads().get(name):
        return _remove_partial_download(partial, name, confirm)
    copies = find_copies(name)
    if from_hub_cache:
        return _remove_cached([model for model in copies if model.origin == "hub"], name, confirm)
    own = [model for model in copies if model.origin == "mlxarch"]
    if len(own) > 1:
        raise InvalidInput(
            f"{name!r} fits {', '.join(model.name for model in own)}; name one of them"
        )
    if not own:
        elsewhere = f"; the one at {copies[0].path} is not its own" if copies else ""
        raise ModelNotFound(
            f"mlxarch made no model {name!r}{elsewhere}. `mlxarch list` shows what is here; --hub "
            "removes a copy from the Hub's cache, which other programs share"
        )
    _require_consent(confirm, name, own[0].bytes)
    folder = own[0].path
    hidden = folder.with_name(f".removing-{os.getpid()}-{folder.name}")
    try:
        folder.rename(hidden)  # first, so that half of a model is never found
        shutil.rmtree(hidden)
    except OSError as error:
        raise OutputError(f"{folder} could not be removed: {error.strerror or error}") from error
    return own[0].bytes


def _remove_unfinished(name: str, confirm: Callable[[int], bool] | None) -> int:
    from mlxarch.quantize.output.workspace import Workspace
    from mlxarch.system.durable_files import Disk

    workspace = Workspace(paths.models() / name, Disk())
    with workspace:  # locks it, so that no other process is working on it
        freed = bytes_below(workspace.folder)
        _require_consent(confirm, name, freed)
        workspace.discard()
    if workspace.folder.exists():
        raise OutputError(f"{workspace.folder} could not be removed; look at who may write there")
    return freed


def _remove_partial_download(
    files: list[Path], name: str, confirm: Callable[[int], bool] | None
) -> int:
    """Delete what an interrupted download left in the Hub's cache."""
    freed = sum(file.stat().st_size for file in files)
    _require_consent(confirm, name, freed)
    for file in files:
        file.unlink(missing_ok=True)
    return freed


def _remove_cached(
    models: list[InstalledModel], name: str, confirm: Callable[[int], bool] | None
) -> int:
    from huggingface_hub import scan_cache_dir

    if not models:
        raise ModelNotFound(
            f"the Hub's cache holds no model {name!r}; `mlxarch list` shows what is here"
        )
    strategy = scan_cache_dir().delete_revisions(*(model.path.name for model in models))
    _require_consent(confirm, name, strategy.expected_freed_size)
    strategy.execute()
    return strategy.expected_freed_size


def _require_consent(confirm: Callable[[int], bool] | None, name: str, freed: int) -> None:
    if confirm is not None and not confirm(freed):
        raise Declined(f"{name} stays")
