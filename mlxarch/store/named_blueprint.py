"""Blueprint of a model by its name: shapes and dtypes, read without the weights."""

import os
from pathlib import Path

from mlxarch.errors import InvalidInput
from mlxarch.hub import hub_client
from mlxarch.hub.catalog import Bits
from mlxarch.hub.hub_checkpoint import read_remote_headers
from mlxarch.loading.resolve import resolve
from mlxarch.planner.blueprint import Blueprint, blueprint_from_checkpoint, blueprint_from_config
from mlxarch.store.lookup import blueprint_from_folder
from mlxarch.store.names import find_local_copy, resolve_name
from mlxarch.system.untrusted_files import read_json


def blueprint_from_name(name: str | os.PathLike[str]) -> tuple[Blueprint, Bits | None]:
    """Return the blueprint of a model, and the bits that its name asks for.

    Args:
        name: a catalog name, whose published config comes with mlxarch; a config.json, or a folder
            with weights; or a Hub repository, from which config.json and the headers of the weight
            files are downloaded.

    Returns:
        The blueprint, and the bits: "original" for a folder or repository, whose weights run as
        they are stored; None if the name does not say.

    Raises:
        ModelNotFound, OfflineError, GatedModel: the model cannot be obtained.
        CheckpointError, ConfigError, UnsupportedArchitecture: the model is not supported.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        return blueprint_from_config(path.name, read_json(path)), None
    reference = resolve_name(name)
    if entry := reference.entry:
        return blueprint_from_config(entry.name, read_json(entry.config_path)), reference.bits
    folder = reference.path or find_local_copy(reference)
    if folder is not None and folder.suffix.lower() == ".gguf":
        raise InvalidInput(
            f"{folder} is a GGUF file: `mlxarch pull {folder}` imports it into a folder, which can "
            "be planned for"
        )
    if folder is not None:
        return blueprint_from_folder(folder, reference.name), "original"
    repo = str(reference.repo)
    revision = reference.revision or "main"
    repository = hub_client.fetch_repository_info(repo, revision)
    checkpoint = resolve(read_remote_headers(repository))
    return blueprint_from_checkpoint(reference.name, checkpoint), "original"
