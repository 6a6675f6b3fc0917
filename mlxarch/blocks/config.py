"""What an architecture reads from a Hugging Face config.json. Field names are the file's own keys."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Self

import msgspec

from mlxarch.blocks.rope import Rotation
from mlxarch.errors import ConfigError

Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
MAX_HEAD_SIZE = 4096  # tables of RoPE grow with it, before any tensor shows that a config is wrong

# Keys that change the mathematics, and the values with which they do not. A config that sets one of them otherwise
# is refused unless its architecture has a field of that name.
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
    """The keys that nearly every 2025 decoder shares; a subclass lists only what is special about its architecture."""

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
        """Heads of keys and values; as many as query heads unless the file says otherwise."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotation(self) -> Rotation:
        """RoPE's parameters; of the full-attention layers where the kinds of layers differ."""
        return self.rotation_of("full_attention")

    def rotation_of(self, kind: str) -> Rotation:
        """RoPE's parameters for a layer type, from either dialect of config.json.

        ``rope_parameters`` holds them flat or by layer type; in the older dialect ``rope_theta`` and ``rope_scaling``
        speak of all layers, and an architecture whose kinds differ overrides this.

        Raises:
            ConfigError: neither names a base. There is no default: a wrong base gives fluent nonsense.
        """
        scaling = self.rope_parameters or self.rope_scaling or {}
        scaling = scaling[kind] if isinstance(scaling.get(kind), dict) else scaling
        theta = scaling.get("rope_theta", self.rope_theta)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise ConfigError(f"config.json: rope_theta must be a positive number, found {theta!r}")
        return Rotation(float(theta), {k: v for k, v in scaling.items() if k != "rope_theta"})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of this architecture, check their types and ranges, and refuse what it would compute wrongly.

        Raises:
            ConfigError: keys are missing (all are named), malformed, or set to something not implemented.
        """
        kind = config.get("model_type")
        missing = sorted(f.name for f in fields(cls) if f.name not in config and f.default is MISSING)
        if missing:
            raise ConfigError(f"config.json of a {kind!r} model lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls)}
        listed = config.get("layer_types") or []
        kinds = set(map(str, listed if isinstance(listed, list) else [listed])) - {"full_attention"}
        if kinds and "layer_types" not in known:
            raise ConfigError(
                f"config.json: layer_types holds {', '.join(map(repr, sorted(kinds)))}; mlxarch's {kind!r} "
                "knows 'full_attention' only"
            )
        rope = config.get("rope_parameters")  # transformers 5 moved a key into it
        places = [config, rope, *rope.values()] if isinstance(rope, dict) else [config]
        for place, key in ((p, k) for p in places if isinstance(p, Mapping) for k in NEUTRAL.keys() - known):
            if place.get(key) not in NEUTRAL[key]:
                raise ConfigError(
                    f"config.json: {key} = {place[key]!r} changes the mathematics, and mlxarch's {kind!r} does not "
                    f"implement it; allowed here: {', '.join(repr(n) for n in NEUTRAL[key])}"
                )
        try:
            parsed = msgspec.convert({k: v for k, v in config.items() if k in known}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"config.json of a {kind!r} model: {error}") from None
        parsed.check()
        return parsed

    def check(self) -> None:
        """Relations between the values; a subclass adds its own.

        Raises:
            ConfigError: one does not hold.
        """
        if self.head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"config.json: heads of {self.head_size} features; at most {MAX_HEAD_SIZE} are allowed, and no known "
                "model comes near"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config.json: hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
                f"{self.num_attention_heads}, and there is no head_dim"
            )
        chosen = getattr(self, "num_experts_per_tok", 0)
        experts = max(getattr(self, key, 0) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        if chosen > experts:
            raise ConfigError(f"config.json: num_experts_per_tok is {chosen}, and there are {experts} experts")
