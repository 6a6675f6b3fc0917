"""Opening a checkpoint folder as lazily read tensors, with its config and tokenizer files."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.checkpoint.lazy_tensor import LazyTensor, SafetensorsTensor
from mlxarch.checkpoint.packed_experts import open_packed_experts
from mlxarch.checkpoint.packed_rows import open_packed_rows
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.shards import Checkpoint, Shard
from mlxarch.errors import CheckpointError
from mlxarch.quantization.config_section import quantization_from_config
from mlxarch.system.untrusted_files import read_json
from mlxarch.tokenizer.chat_template import named_templates, read_additional_templates

SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "tekken.json",
    "tokenizer.tok.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that belong to a model besides config and weights."""

_COMPONENTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint as lazily read tensors, by their published names.

    Attributes:
        config: config.json, parsed.
        tensors: name -> tensor; a quantized matrix is one QuantizedTensor under the name of its
            weight.
        sidecars: tokenizer files and the like, copied with the model: name -> contents or path.
        shards: the files of the tensors, for fingerprints; empty if there are none.
        notes: messages for the user.
    """

    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    sidecars: Mapping[str, bytes | Path] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was changed, replaced or removed after validation."""
        for shard in self.shards:
            shard.check_unchanged()


def open_checkpoint(folder: str | Path) -> CheckpointSource:
    """Open a checkpoint folder: validate headers and index without reading a tensor.

    Raises:
        CheckpointError: a file breaks a rule of the format.
        ConfigError: config.json is malformed, or names an unsupported quantization method.
    """
    checkpoint = Checkpoint.open(folder)
    stored = {
        name: SafetensorsTensor(shard, info) for name, (shard, info) in checkpoint.tensors.items()
    }
    sidecars: dict[str, bytes | Path] = {
        name: path for name in SIDECARS if (path := checkpoint.folder / name).is_file()
    }
    add_named_templates(sidecars, read_additional_templates(checkpoint.folder))
    experts, expert_files = open_packed_experts(checkpoint.folder)
    embeddings, row_files = open_packed_rows(checkpoint.folder)
    tensors = join_quantized_tensors(stored, checkpoint.config) | experts | embeddings
    shards = (*checkpoint.shards, *expert_files, *row_files)
    return CheckpointSource(checkpoint.config, tensors, sidecars, shards, describe_origins(tensors))


def add_named_templates(sidecars: dict[str, bytes | Path], templates: Mapping[str, str]) -> None:
    """Add chat templates of ``additional_chat_templates`` to chat_template.json.

    A model is copied without folders, and the prompts stay the same.

    Args:
        sidecars: extended in place.
        templates: name -> Jinja source.
    """
    if not templates:
        return
    name = "chat_template.json"
    content = sidecars.get(name)
    earlier = read_json(content).get("chat_template") if isinstance(content, Path) else None
    merged = {**named_templates(earlier, name), **templates}
    listed = [{"name": key, "template": source} for key, source in merged.items()]
    sidecars[name] = json.dumps({"chat_template": listed}, indent=1, ensure_ascii=False).encode()


def describe_origins(tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Describe how matrices in other quantization formats were converted, a sentence per kind."""
    kinds = Counter(tensor.origin for tensor in tensors.values() if tensor.origin)
    return tuple(f"{count} matrices {origin}" for origin, count in kinds.items())


def join_quantized_tensors(
    stored: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Join each quantized weight with its scales and biases; ``config`` gives the quantization."""
    if not config.get("quantization"):
        stored = convert_to_mlx(stored, config)
    quantized = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        path, _, key = name.rpartition(".")
        if path not in quantized or key not in _COMPONENTS:
            tensors[name] = tensor
        elif key == "weight":
            components = {
                key: stored[f"{path}.{key}"] for key in _COMPONENTS if f"{path}.{key}" in stored
            }
            tensors[name] = QuantizedTensor(
                name, components, quantization_from_config(config, path)
            )
        elif f"{path}.weight" not in stored:
            raise CheckpointError(
                f"tensor {name} has no {path}.weight beside it; download the checkpoint again"
            )
    return tensors
