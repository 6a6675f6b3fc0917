"""Which file in ``models/`` runs a checkpoint: the only place that knows architectures by name."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxarch.blocks import CausalLM, DecoderConfig
from mlxarch.errors import UnsupportedArchitecture

MODELS = {
    "llama": "llama3",
    "mistral": "llama3",
    "qwen3": "qwen3",
}


@dataclass(frozen=True)
class Architecture:
    """A config together with the code that runs it."""

    name: str
    config: DecoderConfig
    _build: Callable[[Any], CausalLM]

    def build(self) -> CausalLM:
        """The model with its shapes and no weights: every array is still unevaluated, so this costs no memory."""
        return self._build(self.config)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Parse a config.json, in either of its dialects.

    Raises:
        UnsupportedArchitecture: no file in ``models/`` serves its ``model_type``.
        ConfigError: a key is missing, malformed or not understood.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UnsupportedArchitecture(
            f"config.json: model_type {kind!r} is unknown; known: {', '.join(sorted(MODELS))}. "
            "docs/adding-a-model.md shows how to add one"
        )
    module = importlib.import_module(f"mlxarch.models.{MODELS[kind]}")  # a name of our own table, never of the file
    return Architecture(MODELS[kind], module.Config.from_dict(config), module.build)
