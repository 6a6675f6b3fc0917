"""Which file in ``models/`` runs a checkpoint: the only place that knows architectures by name."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxarch.blocks import CausalLM, DecoderConfig
from mlxarch.blocks.renames import Ignore, Rename, Rule
from mlxarch.errors import ConfigError, UnsupportedArchitecture

MODELS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "glm4_moe": "glm4_moe",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "kimi_k2": "kimi_k2",
    "llama": "llama3",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "ministral3": "mistral3",
    "mistral": "llama3",
    "mistral3": "mistral3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "qwen2": "qwen3",
    "qwen2_moe": "qwen3_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
}
# Kinds of which several architectures call themselves so: they are told by the class that config.json names
BY_CLASS = {("git", "Grok1ForCausalLM"): "grok2"}
# Of a wrapper's own keys, those that speak of its text model too
PASSED_ON = ("tie_word_embeddings",)

# Both spellings of a text model inside a wrapper, the published and that of transformers 5, lose their prefix
WRAPPED: tuple[Rule, ...] = (
    Ignore(
        r"^(model\.)?(vision_tower|vision_model|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.", "tower"
    ),
    Rename(r"^language_model\.(?=model\.|lm_head\.)", ""),
    Rename(r"^model\.language_model\.", "model."),
)


@dataclass(frozen=True)
class Architecture:
    """A config together with the code that runs it.

    Attributes:
        name: of the file in ``models/``.
        config: what that file reads of config.json.
        rules: its ``WEIGHTS``: how published tensors become its parameters.
        prefix: what stands before the parameters' names in a checkpoint of this ``model_type``, or, if it begins
            with "model.", in that word's place.
    """

    name: str
    config: DecoderConfig
    rules: tuple[Rule, ...]
    prefix: str
    _build: Callable[[Any], CausalLM]

    def published(self, path: str) -> str:
        """What a checkpoint of this ``model_type`` calls the parameter at ``path``."""
        if self.prefix.startswith("model."):
            return re.sub(r"^model\.", self.prefix, path)
        return self.prefix + path

    def build(self) -> CausalLM:
        """The model with its shapes and no weights: every array is still unevaluated, so this costs no memory.

        Raises:
            ConfigError: there is no such model, of numbers that are each in their range.
        """
        try:
            return self._build(self.config)
        except (OverflowError, ValueError) as error:
            raise ConfigError(
                f"config.json of a {self.config.model_type!r} model: its numbers make no model ({error}); take the "
                "original model's"
            ) from error


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Parse a config.json, in either of its dialects.

    Raises:
        UnsupportedArchitecture: no file in ``models/`` serves its ``model_type``.
        ConfigError: a key is missing, malformed or not understood.
    """
    kind = config.get("model_type")
    name = _file(config)
    if name is None:
        raise UnsupportedArchitecture(
            f"config.json: model_type {kind!r} is unknown; known: {', '.join(sorted(MODELS))}. "
            "docs/adding-a-model.md shows how to add one"
        )
    text = config.get("text_config")
    wrapped = isinstance(text, dict)  # a vision or audio model around the text model: its towers are left out
    inner = {"model_type": kind, **text, **{k: config[k] for k in PASSED_ON if k in config}} if wrapped else config
    module = importlib.import_module(f"mlxarch.models.{name}")  # a name of our own table, never of the file
    rules = (*WRAPPED, *getattr(module, "WEIGHTS", ()))  # a text model's config may stand beside a wrapper's weights
    prefix = getattr(module, "PREFIX", "language_model.") if wrapped else ""
    return Architecture(name, module.Config.from_dict(inner), rules, prefix, module.build)


def _file(config: Mapping[str, Any]) -> str | None:
    """The file in ``models/`` that serves a config."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str):
        return None
    named = [BY_CLASS.get((kind, name)) for name in classes if isinstance(name, str)] if type(classes) is list else []
    return MODELS.get(kind) or next(filter(None, named), None)
