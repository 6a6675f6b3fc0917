"""Rotary position embeddings (arXiv:2104.09864): how a position turns a query or a key."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.errors import ConfigError


@dataclass(frozen=True)
class Rotation:
    """What config.json says of RoPE, in one form for both of its dialects.

    Attributes:
        theta: base of the geometric series of frequencies.
        scaling: the keys of ``rope_scaling`` (or of ``rope_parameters``), ``rope_type`` included.
    """

    theta: float
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``rope_type``, or the older ``type``; "default" where there is neither."""
        return str(self.scaling.get("rope_type", self.scaling.get("type")) or "default")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of the scaling.

        Raises:
            ConfigError: it is missing and has no default, or it is no finite number.
        """
        value = self.scaling.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"config.json: RoPE type {self.kind!r} needs the number {key!r}, found {value!r}; "
                "add it as the original model's config.json has it"
            )
        return float(value)


class RoPE(nn.Module):
    """Rotates the first ``dims`` features of every head by angles that grow with the position.

    Args:
        dims: even; the features behind it pass unchanged.
        rotation: base and scaling. Types: default, linear, llama3, yarn.
        interleaved: pairs are neighbours (2i, 2i+1) instead of halves (i, i + dims/2).

    Shape:
        x: (B, heads, L, D) -> the same; offset: position of the first query, an int or one for each row (B,)

    Raises:
        ConfigError: an unknown type, or a parameter that is missing or out of range.
    """

    def __init__(self, dims: int, rotation: Rotation, *, interleaved: bool = False) -> None:
        super().__init__()
        if dims < 2 or dims % 2 or dims > 2**20:
            raise ConfigError(f"config.json: RoPE turns pairs of features, an even number up to 2^20; found {dims}")
        if rotation.kind not in _SCALINGS:
            raise ConfigError(
                f"config.json: rope_type {rotation.kind!r} is unknown; known: {', '.join(sorted(_SCALINGS))}. "
                "Ignoring it would give wrong answers, so the model is not run"
            )
        self.dims, self.interleaved, self.rotation = dims, interleaved, rotation
        # float64 here: the frequencies of late positions are sensitive to the base's rounding
        plain = rotation.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
        frequencies, self.factor = np.zeros(1), 1.0
        with contextlib.suppress(ArithmeticError, ValueError), np.errstate(all="ignore"):
            frequencies, self.factor = _SCALINGS[rotation.kind](plain, rotation, dims)
        if not (np.isfinite(frequencies) & (frequencies > 0)).all():
            raise ConfigError(
                f"config.json: RoPE of type {rotation.kind!r} has no frequencies with {dict(rotation.scaling)}; "
                "take the numbers of the original model's"
            )
        # mx.fast.rope divides positions by what it calls freqs. The underscore keeps it out of the parameters
        self._freqs = mx.array((1 / frequencies).astype(np.float32))

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        if self.factor != 1.0:
            turned = x[..., : self.dims] * self.factor
            x = turned if self.dims == x.shape[-1] else mx.concatenate([turned, x[..., self.dims :]], axis=-1)
        return mx.fast.rope(
            x, self.dims, traditional=self.interleaved, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


class NoRoPE(nn.Module):
    """NoPE: the layer sees no position at all (arXiv:2305.19466)."""

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return x


def _default(frequencies: np.ndarray, rotation: Rotation, dims: int) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, rotation: Rotation, dims: int) -> tuple[np.ndarray, float]:
    """Positions divided by the factor (arXiv:2306.15595)."""
    return frequencies / rotation.number("factor"), 1.0


def _llama3(frequencies: np.ndarray, rotation: Rotation, dims: int) -> tuple[np.ndarray, float]:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between (Llama 3.1, meta-llama/llama-models)."""
    low, high = rotation.number("low_freq_factor"), rotation.number("high_freq_factor")
    turns = rotation.number("original_max_position_embeddings") * frequencies / (2 * math.pi)  # within the context
    # equal bounds (Llama 4 Scout) leave no ramp, only a step
    kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns > low).astype(np.float64)
    return frequencies * (kept + (1 - kept) / rotation.number("factor")), 1.0


def _yarn(frequencies: np.ndarray, rotation: Rotation, dims: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): the ramp runs over the pair's index; queries and keys grow by a factor."""
    factor = rotation.number("factor")
    original = rotation.number("original_max_position_embeddings")

    def pair_that_turns(times: float) -> float:
        return dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rotation.theta))

    low, high = pair_that_turns(rotation.number("beta_fast", 32)), pair_that_turns(rotation.number("beta_slow", 1))
    if rotation.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    scaled = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    return frequencies * (1 - scaled) + frequencies / factor * scaled, _yarn_attention_factor(rotation, factor)


def _yarn_attention_factor(rotation: Rotation, factor: float) -> float:
    if rotation.scaling.get("attention_factor") is not None:
        return rotation.number("attention_factor")
    mscale, all_dim = rotation.number("mscale", 0), rotation.number("mscale_all_dim", 0)
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of the attention logits' square root: 0.1 mscale ln(factor) + 1, and 1 up to a factor of 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
