"""From the name of a model to its blueprint: what is known of its tensors without its weights."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch import catalog, hub, machines, paths
from mlxarch.catalog import Bits
from mlxarch.checkpoint import read_json
from mlxarch.errors import InvalidInput
from mlxarch.footprint import Blueprint, from_config, from_resolved
from mlxarch.loading import compute_dtype
from mlxarch.memory import Plan, Request, plan
from mlxarch.remote import headers
from mlxarch.slicing import Slice, slice_source
from mlxarch.weights import Resolved, open_source, resolve


def blueprint_of(name: str | os.PathLike[str]) -> tuple[Blueprint, Bits | None]:
    """The blueprint of a model, and the bits that its name asks for: "original" of weights that run as they are stored.

    Args:
        name: of the catalog, for which the published config comes with mlxarch; a config.json, or a folder of weights;
            a repository of the Hub, of which config.json and the headers of its weight files are fetched.

    Raises:
        ModelNotFound, OfflineError, GatedModel: it cannot be had.
        CheckpointError, ConfigError, UnsupportedArchitecture: it is none that runs here.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        raise InvalidInput(f"{text} is a GGUF file: `mlxarch pull {text}` imports it, which its folder can be asked of")
    if path.is_file():
        return from_config(path.name, read_json(path)), None
    reference = catalog.parse(text)
    if entry := reference.entry:
        return from_config(entry.name, read_json(entry.config)), reference.bits
    if reference.path is not None:
        return of_folder(reference.path), "original"
    repo, revision = str(reference.repo), reference.revision or "main"
    if (folder := hub.cached(repo, revision)) is not None:
        return of_folder(folder, reference.name), "original"
    return from_resolved(reference.name, resolve(headers(hub.look_up(repo, revision)))), "original"


def of_folder(folder: Path, name: str | None = None) -> Blueprint:
    """The blueprint of a checkpoint folder, exact."""
    with _resolved(folder) as resolved:
        return from_resolved(name or folder.name, resolved)


def plan_for(
    folder: Path, request: Request, *, dtype: str | mx.Dtype | None = None, slice: str | Slice | None = None
) -> Plan:
    """How the model of a folder runs on this machine; ``dtype`` and ``slice`` as ``loading.load_model`` has them.

    Raises:
        CheckpointError, ConfigError: the folder is not a sound checkpoint.
        InvalidInput: an argument is out of range.
    """
    with _resolved(folder, slice) as resolved:
        wide = compute_dtype(dtype, resolved).size
        machine, blueprint = machines.here(), from_resolved(folder.name, resolved)
    bank = remembered().get(str(folder.resolve()), {}).get("bank") if request.bank is None else request.bank
    return plan(blueprint, machine, replace(request, float_bytes=wide, bank=bank))


def tuned_file() -> Path:
    """Where ``mlxarch tune`` keeps what was best for this machine."""
    return paths.cache() / "tuned.json"


def remembered() -> dict[str, Any]:
    """What was best: folder -> {"bank": bytes for experts, "rate": tokens a second}; empty where nothing is known."""
    try:
        found = json.loads(tuned_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sound = isinstance(found, dict) and all(isinstance(v, dict) and type(v.get("bank")) is int for v in found.values())
    return found if sound else {}


@contextmanager
def _resolved(folder: Path, slice: str | Slice | None = None) -> Iterator[Resolved]:
    source = open_source(folder)
    try:
        yield resolve(source if slice is None else slice_source(source, slice))
    finally:
        for shard in source.shards:
            shard.close()
