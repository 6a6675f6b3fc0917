"""Which layers look back all the way and which through a window, where the two kinds alternate."""

from dataclasses import dataclass
from typing import Literal

from mlxarch.blocks.config import DecoderConfig, Positive, Size
from mlxarch.blocks.rope import Rotation
from mlxarch.blocks.span import Full, Sliding, Span
from mlxarch.errors import ConfigError

Kind = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class LayerTypesConfig(DecoderConfig):
    """``layer_types`` names the kind of every layer; a subclass says in ``usual_kind`` what holds without it."""

    sliding_window: Size | None = None
    layer_types: tuple[Kind, ...] | None = None

    @property
    def window(self) -> int | None:
        """Of the sliding layers, in tokens; None where there is none, or where another key switches it off."""
        return self.sliding_window

    def usual_kind(self, index: int) -> Kind:
        """Of the layer with this index, counted from 0, in a file without ``layer_types``."""
        return "full_attention"

    def kind(self, index: int) -> Kind:
        """Of the layer with this index, counted from 0."""
        return self.layer_types[index] if self.layer_types is not None else self.usual_kind(index)

    def span(self, index: int) -> Span:
        """How far back the tokens of this layer look."""
        return Sliding(self.window) if self.window and self.kind(index) == "sliding_attention" else Full()

    def check(self) -> None:
        super().check()
        self.check_length("layer_types", self.layer_types)
        if self.window is None and any(map(self._slides, range(self.num_hidden_layers))):
            raise ConfigError(
                "config.json: there are layers of type 'sliding_attention', and sliding_window is missing, null or "
                "switched off; take the original model's"
            )

    def _slides(self, index: int) -> bool:
        return self.kind(index) == "sliding_attention"

    def check_length(self, key: str, values: object) -> None:
        """Refuse a list that has not one value for each layer; anything but a list passes.

        Raises:
            ConfigError: it is longer or shorter.
        """
        if isinstance(values, tuple) and len(values) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: {key} has {len(values)} values, and num_hidden_layers is {self.num_hidden_layers}; "
                "there must be one for each layer"
            )


@dataclass(frozen=True, kw_only=True)
class AlternatingConfig(LayerTypesConfig):
    """Without ``layer_types``, every ``sliding_window_pattern``-th layer is full and the others have the window."""

    sliding_window_pattern: Size

    def usual_kind(self, index: int) -> Kind:
        return "sliding_attention" if (index + 1) % self.sliding_window_pattern else "full_attention"


@dataclass(frozen=True, kw_only=True)
class TwoBasesConfig(AlternatingConfig):
    """Sliding layers have a RoPE base of their own, and no scaling.

    The older dialect has ``rope_theta`` and ``rope_scaling`` for the full layers, ``rope_local_base_freq`` for the
    sliding ones; in the newer one ``rope_parameters`` holds both.
    """

    rope_local_base_freq: Positive

    def rotation_of(self, kind: str) -> Rotation:
        if self.rope_parameters:
            if not isinstance(self.rope_parameters.get(kind), dict):
                raise ConfigError(
                    f"config.json: rope_parameters must hold those of {kind!r}, found "
                    f"{', '.join(map(repr, sorted(self.rope_parameters)))}; take the original model's"
                )
        elif kind == "sliding_attention":
            return Rotation(self.rope_local_base_freq)
        return super().rotation_of(kind)
