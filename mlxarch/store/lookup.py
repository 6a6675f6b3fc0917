"""Blueprints and plans of a folder: shapes and dtypes are read, weights are not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.hub import hub_cache
from mlxarch.loading.load import compute_dtype, open_resolved
from mlxarch.loading.matformer import Slice
from mlxarch.loading.resolve import Resolved
from mlxarch.planner.blueprint import Blueprint, blueprint_from_checkpoint
from mlxarch.planner.plan import Plan, Request
from mlxarch.planner.planner import plan
from mlxarch.system import machines, paths


def blueprint_from_folder(folder: Path, name: str | None = None) -> Blueprint:
    """Return the blueprint of a checkpoint folder, exact to the byte."""
    with open_resolved(folder) as checkpoint:
        return blueprint_from_checkpoint(name or hub_cache.model_title(folder), checkpoint)


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
    blueprint = blueprint_from_checkpoint(hub_cache.model_title(folder), checkpoint)
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
