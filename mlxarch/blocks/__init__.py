"""The parts that decoders are made of; no architecture is known here by name.

Shapes are written with these letters throughout:

    B batch · L length of this pass · S keys held, this pass included · V vocabulary
    H query heads · K key/value heads · D size of one head · E experts
"""

from mlxarch.blocks.attention import Attention
from mlxarch.blocks.config import Count, DecoderConfig, Layers, Positive, Size
from mlxarch.blocks.decoder import CausalLM, causal_lm
from mlxarch.blocks.feedforward import GatedMLP, geglu, gelu, swiglu
from mlxarch.blocks.latent_attention import LatentAttention
from mlxarch.blocks.latent_config import LatentConfig
from mlxarch.blocks.layer import Layer
from mlxarch.blocks.layer_types import AlternatingConfig, LayerTypesConfig, TwoBasesConfig
from mlxarch.blocks.linear import Embedding, ExpertLinear, Linear, fuse
from mlxarch.blocks.moe import Experts, MoE
from mlxarch.blocks.norms import LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from mlxarch.blocks.rope import NoRoPE, RoPE, Rotation
from mlxarch.blocks.routers import GroupLimitedSigmoid, GroupLimitedSoftmax, Router, SoftmaxTopK
from mlxarch.blocks.scores import Mask
from mlxarch.blocks.span import Chunked, Full, Sliding, Span
from mlxarch.blocks.step import Step
from mlxarch.cache import Cache, Held
from mlxarch.packing import Quantization

__all__ = [
    "causal_lm",
    "SoftmaxTopK",
    "Router",
    "MoE",
    "Experts",
    "ExpertLinear",
    "Attention",
    "Cache",
    "CausalLM",
    "Chunked",
    "Count",
    "DecoderConfig",
    "Embedding",
    "Full",
    "Held",
    "GatedMLP",
    "GroupLimitedSigmoid",
    "GroupLimitedSoftmax",
    "LatentAttention",
    "LatentConfig",
    "Layer",
    "LayerNorm",
    "LayerTypesConfig",
    "Layers",
    "Linear",
    "Mask",
    "NoRoPE",
    "Positive",
    "Quantization",
    "RMSNorm",
    "RoPE",
    "Rotation",
    "Size",
    "Sliding",
    "Span",
    "Step",
    "AlternatingConfig",
    "TwoBasesConfig",
    "ZeroCenteredRMSNorm",
    "fuse",
    "geglu",
    "gelu",
    "swiglu",
]
