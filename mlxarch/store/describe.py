"""Properties of a model, known without its weights."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxarch.errors import MlxArchError, ModelNotFound
from mlxarch.hub import hub_client
from mlxarch.hub.catalog import CatalogEntry, HubSource, WheelSource
from mlxarch.store.installed import list_installed
from mlxarch.store.names import find_local_copy, resolve_name
from mlxarch.system.untrusted_files import read_json


def describe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a model without downloading it: facts, sizes in bytes, sources, installed copies.

    Raises:
        ModelNotFound, OfflineError: the folder does not exist, or the repository cannot be looked
            up.
    """
    reference = resolve_name(name)
    copies = [asdict(model) | {"path": str(model.path)} for model in list_installed()]
    if reference.entry is not None:
        return _describe_entry(reference.entry, copies)
    path = reference.path or find_local_copy(reference)
    if path is None:
        repo = str(reference.repo)
        repository = hub_client.fetch_repository_info(repo, reference.revision or "main")
        size = sum(file.size for file in repository.files)
        source = f"{repository.repo}@{repository.revision}"
        return _facts(reference.name, repository.config, size, source)
    if path.suffix.lower() == ".gguf":
        return _describe_gguf(path)
    if not path.is_dir():
        raise ModelNotFound(
            f"{path}: there is no such folder; name one with config.json and safetensors files"
        )
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    facts = _facts(reference.name, read_json(path / "config.json"), size, str(path))
    facts["installed"] = [
        copy for copy in copies if copy["name"] == reference.name or copy["path"] == str(path)
    ]
    return facts


def _facts(name: str, config: Mapping[str, Any], size: int, source: str) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": config.get("model_type"),
        "bits": _all_stored_bits(config),
        "context": _context_length(config),
        "source_bytes": size,
        "sources": [source],
        "installed": [],
    }


def _describe_gguf(path: Path) -> dict[str, Any]:
    """Describe a GGUF file, and the folder that was imported from it if there is one.

    Raises:
        ModelNotFound: there is no such file.
        CheckpointError, ConfigError, UnsupportedArchitecture, BackendMissing: see ``open_gguf``.
    """
    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such file")
    from mlxarch.checkpoint.gguf.source import open_gguf

    source = open_gguf(path)
    try:
        types = Counter(
            tensor.dtype for shard in source.shards for tensor in shard.tensors.values()
        )
        facts = _facts(path.name, source.config, path.stat().st_size, str(path))
    finally:
        for shard in source.shards:
            shard.close()
    del facts["bits"]
    facts["tensors"] = dict(types.most_common())
    facts["use"] = (
        f"`mlxarch run {path}` imports it into a folder first, `mlxarch pull {path}` alone"
    )
    return facts


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


def _context_length(config: Mapping[str, Any]) -> int | None:
    """Context length in tokens, RoPE scaling counted if the architecture is known.

    A multimodal model has it in the section of its text decoder.
    """
    with suppress(MlxArchError, ImportError):  # of MLX, on a machine that cannot run it
        from mlxarch.loading.registry import architecture

        return architecture(config).config.context_length
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if key in section:
                return section[key]
    return None


def _describe_source(source: HubSource | WheelSource) -> str:
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision}"
    return f"{source.package} ({source.member})"


def _all_stored_bits(config: Mapping[str, Any]) -> int | list[int] | None:
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
