"""Blueprints and plans by model name or folder: shapes and dtypes are read, weights are not."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.errors import InvalidInput
from mlxarch.hub import catalog, hub_client
from mlxarch.hub.catalog import Bits
from mlxarch.hub.hub_checkpoint import read_remote_headers
from mlxarch.loading.load import compute_dtype, open_resolved
from mlxarch.loading.matformer import Slice
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.planner.blueprint import Blueprint, blueprint_from_checkpoint, blueprint_from_config
from mlxarch.planner.plan import Plan, Request
from mlxarch.planner.planner import plan
from mlxarch.system import machines, paths
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
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        raise InvalidInput(
            f"{text} is a GGUF file: `mlxarch pull {text}` imports it into a folder, which can be "
            "planned for"
        )
    if path.is_file():
        return blueprint_from_config(path.name, read_json(path)), None
    reference = catalog.parse(text)
    if entry := reference.entry:
        return blueprint_from_config(entry.name, read_json(entry.config_path)), reference.bits
    if reference.path is not None:
        return blueprint_from_folder(reference.path), "original"
    repo = str(reference.repo)
    revision = reference.revision or "main"
    folder = hub_client.find_cached_snapshot(repo, revision)
    if folder is not None:
        return blueprint_from_folder(folder, reference.name), "original"
    repository = hub_client.fetch_repository_info(repo, revision)
    checkpoint = resolve(read_remote_headers(repository))
    return blueprint_from_checkpoint(reference.name, checkpoint), "original"


def blueprint_from_folder(folder: Path, name: str | None = None) -> Blueprint:
    """Return the blueprint of a checkpoint folder, exact to the byte."""
    with open_resolved(folder) as checkpoint:
        return blueprint_from_checkpoint(name or folder.name, checkpoint)


def plan_folder(
    folder: Path,
    request: Request,
    *,
    dtype: str | mx.Dtype | None = None,
    slice: str | Slice | None = None,
) -> Plan:
    """Plan how the model of a folder runs on this machine.

    Args:
        folder: checkpoint folder.
        request: options of the user.
        dtype, slice: see ``load_model``.

    Raises:
        CheckpointError, ConfigError: the folder is not a valid checkpoint.
        InvalidInput: an argument is out of range.
    """
    with open_resolved(folder, slice) as checkpoint:
        return plan_checkpoint(folder, checkpoint, request, dtype)


def plan_checkpoint(
    folder: Path, checkpoint: Resolved, request: Request, dtype: str | mx.Dtype | None = None
) -> Plan:
    """Plan how the open checkpoint of ``folder`` runs on this machine."""
    float_bytes = compute_dtype(dtype, checkpoint).size
    expert_cache_bytes = request.expert_cache_bytes
    if expert_cache_bytes is None:
        tuned = read_tuning_results().get(str(folder.resolve()), {})
        expert_cache_bytes = tuned.get("bank")
    request = replace(request, float_bytes=float_bytes, expert_cache_bytes=expert_cache_bytes)
    blueprint = blueprint_from_checkpoint(folder.name, checkpoint)
    return plan(blueprint, machines.this_machine(), request)


def tuning_file() -> Path:
    """Path of the file in which ``mlxarch tune`` stores its results."""
    return paths.cache() / "tuned.json"


def read_tuning_results() -> dict[str, Any]:
    """Return the results of ``mlxarch tune`` on this machine; empty if there are none.

    They map a model's folder to {"bank": bytes for experts, "rate": tokens a second}.
    """
    try:
        results = json.loads(tuning_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(results, dict) and all(
        isinstance(result, dict) and type(result.get("bank")) is int for result in results.values()
    )
    return results if is_valid else {}
