"""Configs of decoders in which layers with full and with sliding-window attention alternate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlxarch.blocks.attention.span import Full, Sliding, Span
from mlxarch.blocks.config import DecoderConfig, Positive, Size
from mlxarch.blocks.rope import RoPEConfig
from mlxarch.errors import ConfigError

LayerType = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class LayerTypesConfig(DecoderConfig):
    """Config with an attention type per layer: ``layer_types``, or a rule if the file has none.

    A subclass implements the rule in ``default_layer_type``.
    """

    sliding_window: Size | None = None
    layer_types: tuple[LayerType, ...] | None = None

    @property
    def window(self) -> int | None:
        """Window of the sliding layers in tokens; None if there is none or it is switched off."""
        return self.sliding_window

    def default_layer_type(self, index: int) -> LayerType:
        """Type of the layer at ``index``, counted from 0, in a file without ``layer_types``."""
        return "full_attention"

    def layer_type(self, index: int) -> LayerType:
        """Type of the layer at ``index``, counted from 0."""
        if self.layer_types is None:
            return self.default_layer_type(index)
        return self.layer_types[index]

    def span(self, index: int) -> Span:
        """Attention span of the layer at ``index``."""
        if self.window and self.layer_type(index) == "sliding_attention":
            return Sliding(self.window)
        return Full()

    def check(self) -> None:
        super().check()
        self.check_length("layer_types", self.layer_types)
        if self.window is None and any(map(self._is_sliding, range(self.num_hidden_layers))):
            raise ConfigError(
                "config.json: there are layers of type 'sliding_attention', and sliding_window is "
                "missing, null or switched off; take the original model's"
            )

    def _is_sliding(self, index: int) -> bool:
        return self.layer_type(index) == "sliding_attention"

    def check_length(self, key: str, values: object) -> None:
        """Check that a list has one value per layer; anything but a list passes.

        Raises:
            ConfigError: it is longer or shorter.
        """
        if isinstance(values, tuple) and len(values) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: {key} has {len(values)} values, and num_hidden_layers is "
                f"{self.num_hidden_layers}; there must be one for each layer"
            )


@dataclass(frozen=True, kw_only=True)
class SlidingPatternConfig(LayerTypesConfig):
    """Config in which every ``sliding_window_pattern``-th layer has full attention."""

    sliding_window_pattern: Size

    def default_layer_type(self, index: int) -> LayerType:
        if (index + 1) % self.sliding_window_pattern:
            return "sliding_attention"
        return "full_attention"


@dataclass(frozen=True, kw_only=True)
class LocalRoPEConfig(SlidingPatternConfig):
    """Config whose sliding layers have a RoPE base of their own, and no RoPE scaling.

    In the older dialect ``rope_theta`` and ``rope_scaling`` apply to full layers and
    ``rope_local_base_freq`` to sliding ones; in the newer one ``rope_parameters`` has both.
    """

    rope_local_base_freq: Positive

    def rope_for(self, layer_type: str) -> RoPEConfig:
        own = (self.rope_parameters or {}).get(layer_type)
        if self.rope_parameters and not isinstance(own, dict):
            raise ConfigError(
                f"config.json: rope_parameters must hold those of {layer_type!r}, found "
                f"{', '.join(map(repr, sorted(self.rope_parameters)))}; take the original "
                "model's"
            )
        if layer_type == "sliding_attention":
            return self.complete_rope({"rope_theta": self.rope_local_base_freq} | (own or {}))
        return super().rope_for(layer_type)

    @property
    def context_length(self) -> int:
        """Tokens that the model is made for: published files count the scaling already."""
        return self.max_position_embeddings


def rope_of_layers(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """RoPE parameters of a layer type, from lists with a value for each layer.

    Raises:
        ConfigError: layers of this type differ.
    """
    types = config["layer_types"]
    factors = config.get("partial_rotary_factors") or [1.0] * len(types)
    rows = zip(types, config["rope_theta"], factors, strict=False)
    pairs = {(base, factor) for kind, base, factor in rows if kind == layer_type}
    if len(pairs) != 1:
        raise ConfigError(
            "config.json: rope_theta and partial_rotary_factors must be the same in all layers of "
            f"type {layer_type!r}, found {sorted(pairs)}"
        )
    [(base, factor)] = pairs
    scaled = layer_type in (config.get("yarn_only_types") or types)
    scaling = (config.get("rope_scaling") if scaled else None) or {}
    return {**scaling, "rope_theta": base, "partial_rotary_factor": factor}
