"""Hugging Face config.json as typed fields. Field names are the file's own keys."""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, Self

import msgspec

from mlxarch.blocks.rope import ROPE_KEYS, RoPEConfig
from mlxarch.errors import ConfigError

_logger = logging.getLogger(__name__)

Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
MAX_CONTEXT = 2**31 - 1
ORIGINAL_CONTEXT = "original_max_position_embeddings"
MAX_HEAD_SIZE = 4096  # RoPE tables grow with it, before any tensor reveals a wrong config

# Keys that change the mathematics, with the values that leave it unchanged. A config with another
# value is refused, unless its architecture has a field of that name.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (None, False),
    "attention_bias": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_temperature_tuning": (None, False),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_bias": (None, False),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_residual": (None, False),
    "partial_rotary_factor": (None, 1),
    "qkv_bias": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "use_bias": (None, False),
    "use_bidirectional_attention": (None, False),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Config keys that nearly every decoder has; a subclass adds those of its architecture.

    Attributes:
        aliases: other spellings of keys in published files, each with the name of its field.
    """

    aliases: ClassVar[Mapping[str, str]] = {}

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of KV heads; equal to the query heads unless the file gives another number."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope(self) -> RoPEConfig:
        """RoPE parameters; those of full-attention layers if the layer types differ."""
        return self.rope_for("full_attention")

    def rope_for(self, layer_type: str) -> RoPEConfig:
        """RoPE parameters of a layer type, from either dialect of config.json.

        ``rope_parameters`` contains them directly or by layer type. In the older dialect
        ``rope_theta`` and ``rope_scaling`` apply to all layers; an architecture whose layer types
        differ overrides this method. Where a file has both, ``rope_scaling`` counts, as in
        transformers: it takes the place of the other, or changes it if that is by layer type.

        Raises:
            ConfigError: neither gives a base. There is no default: a wrong base gives fluent
                nonsense.
        """
        newer = _layer_section(self.rope_parameters, layer_type)
        older = _layer_section(self.rope_scaling, layer_type)
        by_layer_type = isinstance((self.rope_parameters or {}).get(layer_type), dict)
        scaling = newer | older if by_layer_type else dict(older or newer)
        if scaling.get("rope_theta") is None:
            scaling["rope_theta"] = newer.get("rope_theta", self.rope_theta)
        if "partial_rotary_factor" in newer:  # no scaling, so it is not replaced by one
            scaling.setdefault("partial_rotary_factor", newer["partial_rotary_factor"])
        return self.complete_rope(scaling)

    def complete_rope(self, section: Mapping[str, Any]) -> RoPEConfig:
        """RoPE parameters from one section of config.json, with the defaults of transformers.

        Raises:
            ConfigError: the section gives no base.
        """
        theta = section.get("rope_theta")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise ConfigError(f"config.json: rope_theta must be a positive number, found {theta!r}")
        scaling = {key: value for key, value in section.items() if key != "rope_theta"}
        if scaling.get(ORIGINAL_CONTEXT) is None:
            scaling[ORIGINAL_CONTEXT] = self.max_position_embeddings
        return RoPEConfig(float(theta), scaling)

    @property
    def context_length(self) -> int:
        """Tokens that the model is made for, its RoPE scaling counted.

        With YaRN that is the original context times the factor, with linear scaling
        ``max_position_embeddings`` times the factor, if that is more than the file's
        ``max_position_embeddings``, which may count the scaling or not.
        """
        stated = self.max_position_embeddings
        if not (self.rope_scaling or self.rope_parameters):
            return stated
        rope = self.rope
        if rope.type not in ("yarn", "linear"):
            return stated
        scaled = rope.number(ORIGINAL_CONTEXT) * rope.number("factor")
        return max(stated, int(min(scaled, MAX_CONTEXT)))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of this architecture and check their types and ranges.

        Raises:
            ConfigError: keys are missing (all are named) or malformed, or have values that are not
                implemented and would give wrong results.
        """
        model_type = config.get("model_type")
        renamed = {cls.aliases[key]: value for key, value in config.items() if key in cls.aliases}
        config = {key: value for key, value in config.items() if key not in cls.aliases} | renamed
        missing = sorted(
            f.name for f in fields(cls) if f.name not in config and f.default is MISSING
        )
        if missing:
            raise ConfigError(f"config.json of a {model_type!r} model lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls)}
        listed = config.get("layer_types") or []
        layer_types = set(map(str, listed if isinstance(listed, list) else [listed]))
        layer_types -= {"full_attention"}
        if layer_types and "layer_types" not in known:
            raise ConfigError(
                f"config.json: layer_types holds {', '.join(map(repr, sorted(layer_types)))}; "
                f"mlxarch's {model_type!r} knows 'full_attention' only"
            )
        sections: list[Any] = [config]
        for rope in (config.get("rope_parameters"), config.get("rope_scaling")):
            if isinstance(rope, dict):  # transformers 5 moved a key into it
                sections += [rope, *rope.values()]
        for section in sections:
            if isinstance(section, Mapping):
                _refuse_other_mathematics(section, known, model_type)
        try:
            parsed = msgspec.convert({k: v for k, v in config.items() if k in known}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"config.json of a {model_type!r} model: {error}") from None
        parsed.check()
        _name_unread_rope_keys(parsed)
        return parsed

    def check(self) -> None:
        """Check relations between the values; a subclass adds its own.

        Raises:
            ConfigError: a relation is violated.
        """
        if self.head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"config.json: heads of {self.head_size} features; at most {MAX_HEAD_SIZE} are "
                "allowed, and no known model comes near"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads = {self.num_attention_heads} must be a multiple "
                f"of num_key_value_heads = {self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config.json: hidden_size = {self.hidden_size} is no multiple of "
                f"num_attention_heads = {self.num_attention_heads}, and there is no head_dim"
            )
        chosen = getattr(self, "num_experts_per_tok", 0)
        experts = max(
            getattr(self, key, 0) or 0
            for key in ("num_experts", "num_local_experts", "n_routed_experts")
        )
        if chosen > experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok is {chosen}, and there are {experts} experts"
            )


@dataclass(frozen=True, kw_only=True)
class PartialRoPEConfig(DecoderConfig):
    """Config of a decoder whose heads have RoPE on their first features only.

    transformers 5 writes the factor into ``rope_parameters``.
    """

    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0

    @property
    def rope_dims(self) -> int:
        """Features of a head with RoPE."""
        factor = self.rope.number("partial_rotary_factor", self.partial_rotary_factor)
        return int(self.head_size * factor)


def _layer_section(rope: Mapping[str, Any] | None, layer_type: str) -> dict[str, Any]:
    """RoPE keys of a layer type, from a section that has them directly or by layer type."""
    section = dict(rope or {})
    if isinstance(own := section.get(layer_type), dict):
        section = dict(own)
    if "type" in section:  # the older spelling
        section.setdefault("rope_type", section["type"])
    return section


def _name_unread_rope_keys(config: DecoderConfig) -> None:
    """Warn of RoPE keys that nothing reads: they may be meant to change the model."""
    sections = [config.rope_scaling or {}, config.rope_parameters or {}]
    sections += [own for rope in sections for own in rope.values() if isinstance(own, dict)]
    found = {
        key
        for rope in sections
        for key, value in rope.items()
        if value is not None and not isinstance(value, dict)
    }
    if unread := sorted(found - ROPE_KEYS):
        _logger.warning(
            "config.json: RoPE scaling has %s, which mlxarch does not read",
            ", ".join(map(repr, unread)),
        )


def _refuse_other_mathematics(section: Mapping[str, Any], known: set[str], model_type: Any) -> None:
    """Check that keys without a field have a value that does not change the mathematics.

    Raises:
        ConfigError: one has another value.
    """
    for key in NEUTRAL.keys() - known:
        if section.get(key) not in NEUTRAL[key]:
            raise ConfigError(
                f"config.json: {key} = {section[key]!r} changes the mathematics, and mlxarch's "
                f"{model_type!r} does not implement it; allowed here: "
                f"{', '.join(map(repr, NEUTRAL[key]))}"
            )
