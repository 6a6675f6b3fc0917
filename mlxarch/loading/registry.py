"""Registry of architectures: from config.json to the file in ``models/`` that runs it."""

import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxarch.blocks import CausalLM, DecoderConfig
from mlxarch.blocks.weight_mapping import AddModelPrefix, Ignore, Rename, Rule
from mlxarch.errors import ConfigError, UnsupportedArchitecture
from mlxarch.loading.model_types import BY_CLASS, BY_TEXT_MODEL, MODELS

# Keys of a multimodal config that apply to its text model
INHERITED_KEYS = ("tie_word_embeddings",)

# Published checkpoints, transformers 5 and models saved without a head spell the prefix of the text
# model in different ways, which become one
MULTIMODAL_RULES: tuple[Rule, ...] = (
    Ignore(
        r"^(model\.)?(vision_tower|vision_model|visual|vision_embedder|vision_adapter|vision_projection|audio_tower|embed_vision"
        r"|embed_audio|multi_modal_projector|mm_projector)\.",
        "tower",
    ),
    Rename(r"^language_model\.(?=model\.|lm_head\.)", ""),
    Rename(r"^(model\.)?language_model\.", "model."),
    AddModelPrefix(),
)


@dataclass(frozen=True)
class Architecture:
    """Parsed config and the code that runs it.

    Attributes:
        name: name of the file in ``models/``.
        config: the keys of config.json that this file reads.
        rules: ``WEIGHTS`` of the file: mapping from published tensors to parameters.
        prefix: prefix of parameter names in a checkpoint of this ``model_type``; if it begins with
            "model.", it replaces that word.
        saved: ``SAVED`` of the file: names of parameters in a checkpoint, where they differ.
    """

    name: str
    config: DecoderConfig
    rules: tuple[Rule, ...]
    prefix: str
    saved: tuple[Rename, ...]
    _build: Callable[[Any], CausalLM]

    def published_name(self, path: str) -> str:
        """Name of the parameter ``path`` in a checkpoint of this ``model_type``."""
        for rule in self.saved:
            path = re.sub(rule.pattern, rule.to, path)
        if self.prefix.startswith("model."):
            return re.sub(r"^model\.", self.prefix, path)
        return self.prefix + path

    def build(self) -> CausalLM:
        """Build the network with its shapes; arrays stay unevaluated, so this takes no memory.

        Raises:
            ConfigError: each number of the config is in range, but together they describe no model.
        """
        try:
            return self._build(self.config)
        except (OverflowError, ValueError) as error:
            raise ConfigError(
                f"config.json of a {self.config.model_type!r} model: its numbers make no model ({error}); take the "
                "original model's"
            ) from error


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Find the architecture of a config.json, in its published or transformers-5 spelling.

    Raises:
        UnsupportedArchitecture: no file in ``models/`` serves its ``model_type``.
        ConfigError: a key is missing, malformed or not understood.
    """
    model_type = config.get("model_type")
    name = _file_name(config)
    if name is None:
        raise UnsupportedArchitecture(
            f"config.json: model_type {model_type!r} is unknown; {_nearest(config)}"
            f"known: {', '.join(sorted(MODELS))}. docs/adding-a-model.md shows how to add one"
        )
    # The name comes from our own table, never from the file
    module = importlib.import_module(f"mlxarch.models.{name}")
    # These rules apply to text configs too: such a config may lie beside multimodal weights
    rules = (*MULTIMODAL_RULES, *getattr(module, "WEIGHTS", ()))
    saved = getattr(module, "SAVED", ())
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        parsed = module.Config.from_dict(config)
        return Architecture(name, parsed, rules, "", saved, module.build)
    inherited = {key: config[key] for key in INHERITED_KEYS if key in config}
    parsed = module.Config.from_dict({"model_type": model_type, **text_config, **inherited})
    prefix = getattr(module, "PREFIX", "language_model.")
    return Architecture(name, parsed, rules, prefix, saved, module.build)


def _nearest(config: Mapping[str, Any]) -> str:
    """Part of a message that names the known types whose names are most like those of a config."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    names = [str(config.get("model_type")), re.sub(r"For[A-Z]\w+$", "", str(first)).lower()]
    found = [match for name in names for match in difflib.get_close_matches(name, MODELS, n=2)]
    return f"nearest by name: {', '.join(dict.fromkeys(found))}; " if found else ""


def _file_name(config: Mapping[str, Any]) -> str | None:
    """Name of the file in ``models/`` that runs a config; None if there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    text = config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(text_type, str) and (model_type, text_type) in BY_TEXT_MODEL:
        return BY_TEXT_MODEL[model_type, text_type]
    if model_type in MODELS:
        return MODELS[model_type]
    classes = config.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if isinstance(name, str) and (model_type, name) in BY_CLASS:
            return BY_CLASS[model_type, name]
    return None
