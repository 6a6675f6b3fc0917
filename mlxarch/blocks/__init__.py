"""Building blocks of decoders: attention, experts, norms, linear layers; no architecture by name.

Letters in shapes:

    B batch · L length of this pass · S keys, cached and new · V vocabulary
    H query heads · K key/value heads · D size of one head · E experts
"""

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.blockwise import Mask
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.gated_attention import GatedAttention, HeadGatedAttention
from mlxarch.blocks.attention.latent_attention import LatentAttention
from mlxarch.blocks.attention.latent_config import LatentConfig
from mlxarch.blocks.attention.layer_types import (
    LayerTypesConfig,
    LocalRoPEConfig,
    SlidingPatternConfig,
)
from mlxarch.blocks.attention.span import Chunked, Full, Sliding, Span
from mlxarch.blocks.config import Count, DecoderConfig, Layers, Positive, Size
from mlxarch.blocks.decoder import CausalLM, causal_lm
from mlxarch.blocks.feed_forward import MLP, GatedMLP, geglu, gelu, relu2, swiglu
from mlxarch.blocks.layer import POST_NORM, Layer, ResidualOutput
from mlxarch.blocks.linear import Embedding, ExpertLinear, Linear, fuse
from mlxarch.blocks.moe.moe import Experts, MoE
from mlxarch.blocks.moe.routers import GroupLimitedSigmoid, GroupLimitedSoftmax, Router, SoftmaxTopK
from mlxarch.blocks.norms import LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from mlxarch.blocks.recurrent.gated_delta_net import GatedDeltaNet
from mlxarch.blocks.recurrent.mamba2 import Mamba2, Mamba2Config, Mamba2Sizes
from mlxarch.blocks.recurrent.short_convolution import ShortConvolution
from mlxarch.blocks.rope import NoRoPE, RoPE, RoPEConfig
from mlxarch.kv_cache import Cache, KVArray, by_row
from mlxarch.quantization.scheme import Quantization

__all__ = [
    "Attention",
    "Cache",
    "CausalLM",
    "Chunked",
    "Count",
    "DecoderConfig",
    "Embedding",
    "ExpertLinear",
    "Experts",
    "ForwardContext",
    "Full",
    "GatedAttention",
    "GatedDeltaNet",
    "GatedMLP",
    "GroupLimitedSigmoid",
    "HeadGatedAttention",
    "GroupLimitedSoftmax",
    "KVArray",
    "LatentAttention",
    "LatentConfig",
    "Layer",
    "LayerNorm",
    "LayerTypesConfig",
    "Layers",
    "Linear",
    "LocalRoPEConfig",
    "MLP",
    "Mamba2",
    "Mamba2Config",
    "Mamba2Sizes",
    "Mask",
    "MoE",
    "NoRoPE",
    "POST_NORM",
    "Positive",
    "Quantization",
    "RMSNorm",
    "ResidualOutput",
    "RoPE",
    "RoPEConfig",
    "Router",
    "ShortConvolution",
    "Size",
    "Sliding",
    "SlidingPatternConfig",
    "SoftmaxTopK",
    "Span",
    "ZeroCenteredRMSNorm",
    "by_row",
    "causal_lm",
    "fuse",
    "geglu",
    "gelu",
    "relu2",
    "swiglu",
]
