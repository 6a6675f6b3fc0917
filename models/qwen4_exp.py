"""Qwen3.8 Flash Next (Alibaba, 2026), an experiment for Qwen4.

    x ─┬─ mix ─ gated DeltaNet ─ gates ─ + ─┬─ mix ─┬─ router ─ 10 of 512 experts ─ + ─ gates ─ + ─
       │                                 │  │       └─ shared expert ─ gate ────────┘           │
       └─────────────────────────────────┘  └───────────────────────────────────────────────────┘

Stands out: four residual streams, mixed for each block by low-rank gates; gated DeltaNet with every
fourth layer attending to blocks of 4 tokens that an indexer chooses; hashed 2- and 3-grams look up a
table of 51 billion numbers, more than a third of the model, which may stay on the disk; 512 experts.
Source: Qwen/Qwen3.8-Flash-Next/config.json; transformers' Qwen4ExpModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    Count,
    Experts,
    ForwardContext,
    GatedDeltaNet,
    GatedMLP,
    RoPE,
    Size,
    SoftmaxTopK,
    ZeroCenteredRMSNorm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.moe.shared_experts import GatedSharedMoE
from mlxarch.blocks.recurrent.gated_delta_net import GatedDeltaNetConfig
from mlxarch.blocks.recurrent.ngram_embedding import TOKENS, NGramConfig, NGramEmbedding
from mlxarch.blocks.residual_streams.low_rank import (
    HyperConnection,
    LowRankStreamsConfig,
    StreamMixer,
    StreamNorm,
)
from mlxarch.blocks.sparse.block_sparse_attention import BlockIndexer, BlockSparseAttention
from mlxarch.blocks.weight_mapping import (
    Ignore,
    Join,
    Rename,
    SplitRows,
    Stack,
    SubtractOne,
    TransposeTo,
)
from mlxarch.errors import ConfigError

LayerType = Literal[
    "linear_attention", "full_attention", "indexed_attention", "qwen_sparse_attention"
]


@dataclass(frozen=True, kw_only=True)
class Config(NGramConfig, LowRankStreamsConfig, GatedDeltaNetConfig, PartialRoPEConfig):
    """Config; every layer has experts, and ``intermediate_size`` no meaning."""

    hidden_act: Literal["silu"] = "silu"
    intermediate_size: Count = 0
    attn_output_gate: Literal[True] = True
    output_gate_type: Literal["silu", "sigmoid"] = "silu"
    partial_rotary_factor: float = 0.25
    layer_types: tuple[LayerType, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size
    norm_topk_prob: Literal[True] = True
    indexer_budget: Size
    indexer_compress_ratio: Size
    indexer_head_dim: Size
    indexer_kv_heads: Literal[1] = 1
    indexer_n_heads: Size

    def check(self) -> None:
        super().check()
        if not all(self.is_linear(number - 1) for number in self.ple_layer_ids):
            raise ConfigError(
                "config.json: ple_layer_ids names a layer with attention; n-grams are implemented "
                "in layers of type 'linear_attention' only"
            )
        if self.indexer_budget % self.indexer_compress_ratio:
            raise ConfigError(
                f"config.json: indexer_budget = {self.indexer_budget} must be a multiple of "
                f"indexer_compress_ratio = {self.indexer_compress_ratio}"
            )


class DecoderLayer(nn.Module):
    """Decoder layer between streams: n-grams, token mixer, experts."""

    residual_outputs = ()

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=c.rms_norm_eps)
        rope = RoPE(c.rope_dims, c.rope)
        if c.has_ngrams(index):
            stream_norm = partial(StreamNorm, streams=c.hc_count, eps=c.rms_norm_eps)
            self.ple = NGramEmbedding(c, index, c.hc_count, stream_norm)
        if c.is_linear(index):
            gate = nn.silu if c.output_gate_type == "silu" else mx.sigmoid
            self.linear_attn = GatedDeltaNet(c, gate)
        else:
            indexer = BlockIndexer(
                c.hidden_size,
                c.indexer_n_heads,
                c.indexer_head_dim,
                block=c.indexer_compress_ratio,
                rope=rope,
                norm=norm,
            )
            self.self_attn = BlockSparseAttention(
                c, indexer, c.indexer_budget, rope=rope, norm=norm
            )
        gate = SoftmaxTopK(c.hidden_size, c.num_experts, c.num_experts_per_tok, renormalise=True)
        experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, swiglu)
        shared = GatedMLP(c.hidden_size, c.shared_expert_intermediate_size, swiglu)
        self.mlp = GatedSharedMoE(gate, experts, shared)
        self.attn_hyper_connection = HyperConnection(c)
        self.mlp_hyper_connection = HyperConnection(c)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        others: tuple[mx.array, ...] = ()
        if "ple" in self:
            x, others = self.ple(x, context, self.linear_attn.load_state(cache)[2:])
        n = self.attn_hyper_connection.hc_norm(x)
        mixed = self.attn_hyper_connection.mix(n)
        if "linear_attn" in self:
            out = self.linear_attn(mixed, context, cache, others)
        else:
            out = self.self_attn(mixed, context, cache)
        x = self.attn_hyper_connection.inject(x, n, out)
        n = self.mlp_hyper_connection.hc_norm(x)
        out = self.mlp(self.mlp_hyper_connection.mix(n))
        return self.mlp_hyper_connection.inject(x, n, out)


class StreamsLM(CausalLM):
    """Language model whose state is several residual streams, one after the other."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        super().__init__(c, layers, StreamMixer(c))
        self.streams = c.hc_count

    @property
    def ngram_tables(self) -> tuple[str, ...]:
        """Tables whose rows are looked up by hashes, so that they may stay on the SSD."""
        paths = (
            path for path, module in self.named_modules() if isinstance(module, NGramEmbedding)
        )
        return tuple(f"{path}.table" for path in sorted(paths))

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        context.shared[TOKENS] = tokens
        return mx.tile(super().embed(tokens, context), (1, 1, self.streams))


build = StreamsLM

PREFIX = "model.language_model."
NORMS = r"(layernorm|[qk]_norm|hc_norm|norm_(key|query|conv))\.weight$"
WEIGHTS = (
    Ignore(r"^mtp\.", "multi-token prediction head"),
    Ignore(
        r"\.ple_embedding\.(layer_multipliers|ngram_heads_(offsets|vocab_sizes))$",
        "hash functions, which are computed",
    ),
    SubtractOne(NORMS, r"\.conv1d\.weight$"),
    TransposeTo(r"\.linear_attn\.conv1d\.weight$", "linear_conv_kernel_dim"),
    TransposeTo(r"\.ple\.conv1d\.weight$", "ple_conv_kernel_size"),
    Join(r"\.ple_embedding\.ngram_embedding\.(shard_)?(?P<rank>\d+)\.weight$", ".table.weight", -2),
    Rename(r"\.ple_embedding\.ngram_embedding\.", ".table."),
    Rename(r"^model\.hyper_connection_mixer\.", "model.norm."),
    Rename(r"(?<=\.experts\.)(gate_up_proj|down_proj)$", r"\1.weight"),
    SplitRows(
        r"\.experts\.gate_up_proj\.weight$",
        (".experts.gate_proj.weight", ".experts.up_proj.weight"),
    ),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.experts.\2."),
    Rename(r"\.mlp\.experts\.", ".mlp.switch_mlp."),
)
SAVED = (
    Rename(r"\.ple\.table\.", ".ple.ple_embedding.ngram_embedding."),
    Rename(r"^model\.norm\.", "model.hyper_connection_mixer."),
)
