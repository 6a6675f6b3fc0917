"""Files of an output beside its weights: config, index, tokenizer and licence files."""

import json
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.layout import OutputLayout
from mlxarch.checkpoint.shards import INDEX_FILE
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.loading.resolve import Resolved
from mlxarch.quantize.output.model_card import Origin
from mlxarch.system.untrusted_files import safe_path


def companion_files(
    source: CheckpointSource,
    resolved: Resolved,
    origin: Origin,
    layout: OutputLayout,
    dtype: str | None,
) -> dict[str, bytes | Path]:
    """List the files of an output beside its weights, model card and receipt.

    Args:
        source: whose config, tokenizer files and other small files are taken over.
        resolved: the same, resolved to a model.
        origin: whose licence files are copied.
        layout: layout of the weights.
        dtype: dtype of unquantized weights, as in config.json; None keeps the source's.

    Returns:
        File name -> contents, or the path of the file to copy.
    """
    copied = {path.name: path for path in origin.licences} | dict(source.sidecars)
    files: dict[str, bytes | Path] = {
        name: safe_path(file.parent, file.name) if isinstance(file, Path) else file
        for name, file in copied.items()
    }
    files["config.json"] = _to_json(_output_config(source, resolved, layout, dtype))
    if len(layout.shards) > 1:
        files[INDEX_FILE] = _to_json(layout.index())
    return files


def _output_config(
    source: CheckpointSource, resolved: Resolved, layout: OutputLayout, dtype: str | None
) -> dict[str, Any]:
    config = dict(source.config)
    section = layout.quantization_section()
    for key in ("quantization", "quantization_config"):  # readers look at either
        config.pop(key, None)
        if section:
            config[key] = section
    if dtype:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = dtype
    if not resolved.architecture.config.tie_word_embeddings:
        # the source's config may say otherwise; the tensors decide
        config["tie_word_embeddings"] = False
    return config


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
