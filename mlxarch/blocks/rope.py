"""Rotary position embeddings (RoPE, arXiv:2104.09864) and their scaling to longer contexts."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.cpu_kernels import native
from mlxarch.errors import ConfigError

ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor",
        "factor", "original_max_position_embeddings",
        "low_freq_factor", "high_freq_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        "attention_factor", "attn_factor", "llama_4_scaling_beta", "short_factor", "long_factor",
        "mrope_section", "mrope_interleaved",  # of images: for text it is the usual RoPE
    }
)  # fmt: skip
"""Keys of ``rope_scaling`` and ``rope_parameters`` that some RoPE type or architecture reads."""


@dataclass(frozen=True)
class RoPEConfig:
    """RoPE parameters from either dialect of config.json.

    Attributes:
        theta: base of the geometric series of frequencies.
        scaling: keys of ``rope_scaling`` (or ``rope_parameters``), including ``rope_type``.
    """

    theta: float
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """``rope_type``, or the older ``type``; "default" if there is neither."""
        return str(self.scaling.get("rope_type", self.scaling.get("type")) or "default")

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number from ``scaling``.

        Raises:
            ConfigError: it is missing and has no default, or it is not a finite number.
        """
        value = self.scaling.get(key)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ConfigError(
                f"config.json: RoPE type {self.type!r} needs the number {key!r}, found {value!r}; "
                "add it as the original model's config.json has it"
            )
        return float(value)


class RoPE(nn.Module):
    """Rotate the first ``dims`` features of every head by angles proportional to the position.

    Args:
        dims: an even number; the features after it are left unchanged.
        config: base and scaling. Types: default, dynamic (with alpha), linear, llama3,
            mrope (for text), proportional, yarn.
        interleaved: rotate pairs of neighbours (2i, 2i+1) instead of halves (i, i + dims/2).

    Shape:
        x: (B, heads, L, D) -> the same; offset: position of the first query, an int or one per row
        (B,)

    Raises:
        ConfigError: an unknown type, or a parameter that is missing or out of range.
    """

    def __init__(self, dims: int, config: RoPEConfig, *, interleaved: bool = False) -> None:
        super().__init__()
        if dims < 2 or dims % 2 or dims > 2**20:
            raise ConfigError(
                "config.json: RoPE turns pairs of features, an even number up to 2^20; found "
                f"{dims}"
            )
        if config.type not in _SCALINGS:
            raise ConfigError(
                f"config.json: rope_type {config.type!r} is unknown; known: "
                f"{', '.join(sorted(_SCALINGS))}. "
                "Ignoring it would give wrong answers, so the model is not run"
            )
        self.dims = dims
        self.interleaved = interleaved
        self.config = config
        # in float64, as the angles of late positions are sensitive to the rounding of the base
        unscaled = config.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
        frequencies = np.zeros(1)
        self.factor = 1.0  # of queries and keys
        with contextlib.suppress(ArithmeticError, ValueError), np.errstate(all="ignore"):
            frequencies, self.factor = _SCALINGS[config.type](unscaled, config, dims)
        if not (np.isfinite(frequencies) & (frequencies >= 0)).all() or not frequencies[0]:
            raise ConfigError(
                f"config.json: RoPE of type {config.type!r} has no frequencies with "
                f"{dict(config.scaling)}; take the numbers of the original model's"
            )
        # mx.fast.rope calls periods freqs: it divides positions by them. The underscore keeps the
        # array out of the parameters
        with np.errstate(divide="ignore"):  # features that do not turn have infinite periods
            self._freqs = mx.array((1 / frequencies).astype(np.float32))

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return self.rotate(x, offset, self._freqs)

    def head_transform(self, offset: int) -> native.HeadTransform:
        """Rotation from position ``offset`` on, without ``factor``, as an argument of CPU kernels."""
        return native.HeadTransform(offset, self.dims, self.interleaved, self._freqs)

    def rotate_every(self, x: mx.array, offset: int | mx.array, stride: int) -> mx.array:
        """Rotate vectors of every ``stride``-th position, the first at ``offset`` · ``stride``."""
        return self.rotate(x, offset, self._freqs / stride)

    def rotate_back(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Undo the rotation of a call with the same offset."""
        return self.rotate(x, offset, -self._freqs)

    def rotate(self, x: mx.array, offset: int | mx.array, freqs: mx.array) -> mx.array:
        """Rotate with the periods ``freqs`` (dims / 2,); shapes as in the call."""
        if self.factor != 1.0:
            scaled = x[..., : self.dims] * self.factor
            partial = self.dims < x.shape[-1]
            x = mx.concatenate([scaled, x[..., self.dims :]], axis=-1) if partial else scaled
        y = native.rope(x, self.dims, self.interleaved, offset, freqs)
        if y is not None:
            return y
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.interleaved,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )


class NoRoPE(nn.Module):
    """NoPE: a layer without positions (arXiv:2305.19466)."""

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return x


def _default(frequencies: np.ndarray, config: RoPEConfig, dims: int) -> tuple[np.ndarray, float]:
    """Frequencies without scaling."""
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, config: RoPEConfig, dims: int) -> tuple[np.ndarray, float]:
    """Position interpolation: positions divided by a factor (arXiv:2306.15595)."""
    return frequencies / config.number("factor"), 1.0


def _proportional(
    frequencies: np.ndarray, config: RoPEConfig, dims: int
) -> tuple[np.ndarray, float]:
    """Frequencies of the whole head, of which only the first share is used.

    Source: transformers' _compute_proportional_rope_parameters (Gemma 4).
    """
    turning = int(config.number("partial_rotary_factor", 1.0) * dims // 2)
    kept = np.where(np.arange(dims // 2) < turning, frequencies, 0.0)
    return kept / config.number("factor", 1.0), 1.0


def _dynamic(frequencies: np.ndarray, config: RoPEConfig, dims: int) -> tuple[np.ndarray, float]:
    """Base times a fixed power of ``alpha``, whatever the length (Hunyuan)."""
    base = config.theta * config.number("alpha") ** (dims / (dims - 2))
    return base ** -(np.arange(0, dims, 2, dtype=np.float64) / dims), 1.0


def _llama3(frequencies: np.ndarray, config: RoPEConfig, dims: int) -> tuple[np.ndarray, float]:
    """Low frequencies divided by a factor, high ones kept, interpolated in between.

    Source: Llama 3.1, meta-llama/llama-models.
    """
    low = config.number("low_freq_factor")
    high = config.number("high_freq_factor")
    context = config.number("original_max_position_embeddings")
    turns = context * frequencies / (2 * math.pi)  # full rotations within the original context
    kept = (turns > low).astype(np.float64)  # a step for equal bounds (Llama 4 Scout)
    if high != low:
        kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / config.number("factor")), 1.0


def _yarn(frequencies: np.ndarray, config: RoPEConfig, dims: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): a ramp over pair indices; queries and keys grow by a factor."""
    factor = config.number("factor")
    context = config.number("original_max_position_embeddings")

    def pair_index(rotations: float) -> float:
        """Index, as a real number, of the pair that rotates so often within the context."""
        ratio = math.log(context / (rotations * 2 * math.pi))
        return dims * ratio / (2 * math.log(config.theta))

    low = pair_index(config.number("beta_fast", 32))
    high = pair_index(config.number("beta_slow", 1))
    if config.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    scaled = frequencies * (1 - interpolated) + frequencies / factor * interpolated
    return scaled, _yarn_attention_factor(config, factor)


def _yarn_attention_factor(config: RoPEConfig, factor: float) -> float:
    """Factor of queries and keys: ``attention_factor``, or computed from mscale and attn_factor.

    ``attn_factor`` multiplies what YaRN computes, as in its authors' code (jquesnelle/yarn) and in
    vLLM; transformers does not read it.
    """
    if config.scaling.get("attention_factor") is not None:
        return config.number("attention_factor")
    multiple = config.number("attn_factor", 1)
    mscale = config.number("mscale", 0)
    all_dim = config.number("mscale_all_dim", 0)
    if mscale and all_dim:
        return multiple * yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return multiple * yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor of queries and keys: 0.1 mscale ln(factor) + 1, or 1 for factors up to 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


_SCALINGS = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "mrope": _default,  # the positions of a text token are the same on all three axes
    "proportional": _proportional,
    "yarn": _yarn,
}
