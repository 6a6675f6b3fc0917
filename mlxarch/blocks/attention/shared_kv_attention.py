"""Attention whose last layers use the keys and values of earlier ones, as in the small Gemma models."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import mlx.core as mx
from msgspec import Struct

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.layer_types import LayerTypesConfig
from mlxarch.blocks.config import Count, DecoderConfig, Size
from mlxarch.blocks.linear import FusableProjections
from mlxarch.blocks.norms import RMSNorm
from mlxarch.errors import ConfigError
from mlxarch.kv_cache import Cache, by_row
from mlxarch.quantization.scheme import Quantization


class LayerKeys(Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of one layer, as transformers 5 writes them."""

    head_dim: Size | None = None
    num_key_value_heads: Size | None = None


@dataclass(frozen=True, kw_only=True)
class SharedKVConfig(LayerTypesConfig):
    """Config whose last layers use the keys and values of earlier ones.

    Full layers have ``global_head_dim``, or layers have keys of their own in ``per_layer_config``.
    """

    num_kv_shared_layers: Count = 0
    global_head_dim: Size | None = None
    num_global_key_value_heads: Size | None = None
    per_layer_config: dict[str, LayerKeys] | None = None

    @property
    def first_sharing_layer(self) -> int:
        """Index of the first layer that reuses the keys and values of an earlier layer."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def for_layer(self, index: int) -> Self:
        """The config with the head size and the KV heads of a layer."""
        if self.per_layer_config is not None:
            keys = self.per_layer_config.get(str(index), LayerKeys())
        elif self.layer_type(index) == "full_attention":
            keys = LayerKeys(self.global_head_dim, self.num_global_key_value_heads)
        else:
            keys = LayerKeys()
        heads = keys.num_key_value_heads or self.num_key_value_heads
        head_dim = keys.head_dim or self.head_dim
        return replace(self, head_dim=head_dim, num_key_value_heads=heads, per_layer_config=None)

    def check(self) -> None:
        super().check()
        types = [self.layer_type(index) for index in range(self.num_hidden_layers)]
        first = self.first_sharing_layer
        if not 0 < first <= len(types) or set(types[first:]) - set(types[:first]):
            raise ConfigError(
                f"config.json: num_kv_shared_layers = {self.num_kv_shared_layers} of {len(types)} "
                "layers leaves some without an earlier layer of their kind"
            )


class SharedKVAttention(Attention):
    """Attention with normalised values and unscaled scores; some layers have queries only.

    They use the keys, values and mask of the last layer with the same span that has its own;
    ``context.shared`` contains these by span.

    Args:
        shares_kv: whether the layer has queries only.
        values_are_keys: whether the values are the keys before their norm and RoPE.
    """

    def __init__(
        self,
        c: DecoderConfig,
        *,
        shares_kv: bool = False,
        values_are_keys: bool = False,
        **options: Any,
    ) -> None:
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        super().__init__(c, scale=1.0, norm=norm, **options)
        self.eps = c.rms_norm_eps
        self.shares_kv = shares_kv
        self.values_are_keys = values_are_keys
        if shares_kv:
            del self.k_proj, self.v_proj, self.k_norm, self.qkv
        elif values_are_keys:
            del self.v_proj
            self.qkv = FusableProjections(self.q_proj, self.k_proj)

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        return None if self.shares_kv else super().make_cache(capacity, kv)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        projected = [self.q_proj(x)] if self.shares_kv else self.qkv(x)
        q, *own = (mx.unflatten(t, -1, (-1, self.head_size)) for t in projected)  # (B, L, heads, D)
        q = self.rope(self.q_norm(q).swapaxes(1, 2), context.offset)  # (B, H, L, D)
        if own:
            k = self.rope(self.k_norm(own[0]).swapaxes(1, 2), context.offset)  # (B, K, L, D)
            v = mx.fast.rms_norm(own[-1], None, self.eps).swapaxes(1, 2)
            mask = context.mask(self.span, cache)
            if cache is not None:
                k, v = cache.append(k, v)
            context.shared[self.span] = (k, v, mask)
        k, v, mask = context.shared[self.span]
        out = by_row(self.attend, q, k, v, mask, context.by_row)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))
