"""Attention to a window of tokens and to compressed entries of all others (DeepSeek V4)."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.attention import attend
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import DecoderConfig, Size
from mlxarch.blocks.linear import ExactLinear, Linear, Matrix
from mlxarch.blocks.norms import RMSNorm
from mlxarch.blocks.rope import RoPE
from mlxarch.blocks.sparse.compressor import Compressed, Compressor, rotate_last
from mlxarch.blocks.sparse.selection import index_scores, top_keys
from mlxarch.errors import InvalidInput
from mlxarch.kv_cache import Cache, CompressedCache, CompressedSizes, EntrySizes, RowCaches
from mlxarch.quantization.scheme import Quantization


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig(DecoderConfig):
    """Config keys of compressed attention."""

    q_lora_rank: Size
    qk_rope_head_dim: Size
    o_groups: Size
    o_lora_rank: Size
    sliding_window: Size
    index_head_dim: Size
    index_n_heads: Size
    index_topk: Size


class GroupedLinear(Matrix):
    """One matrix for each group of features: (B, L, G, in) -> (B, L, G · out)."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__(groups * outputs, inputs)
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        parts = {name: mx.unflatten(array, 0, (self.groups, -1)) for name, array in self.items()}
        return self.matmul(x.swapaxes(1, 2), parts).swapaxes(1, 2).flatten(-2)


class EntryIndexer(nn.Module):
    """Score of an entry: sum over heads of weight * relu(query · key), with keys of its own."""

    def __init__(self, c: CompressedAttentionConfig, compressor: Compressor) -> None:
        super().__init__()
        self.wq_b = ExactLinear(c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.weights_proj = ExactLinear(c.hidden_size, c.index_n_heads)
        self.compressor = compressor

    def queries(self, q_latents: mx.array, offset: int | mx.array) -> mx.array:
        """Queries (B, H, L, D) with RoPE."""
        q = mx.unflatten(self.wq_b(q_latents), -1, (-1, self.compressor.size)).swapaxes(1, 2)
        return rotate_last(self.compressor.rope, q, offset)


class CompressedAttention(nn.Module):
    """Attention of all heads to one vector per token, which is key and value at once.

    A query sees the newest ``sliding_window`` tokens, and entries that a compressor makes of the
    others: all of them, or those that an indexer chooses. The last features of queries and vectors
    have RoPE; the outputs are rotated back by the position of the query. Every row of a batch runs
    on its own, as rows complete their entries at different times.

    Args:
        rope: position embedding of the last features.
        rate: tokens of an entry; None for a window alone.
        chooses: whether an indexer chooses entries; they overlap then.

    Shape:
        x: (B, L, hidden_size) -> the same; state of a row: vectors of the window (1, 1, S, D),
        entries and inputs of the compressor, and of the indexer's compressor
    """

    def __init__(
        self, c: CompressedAttentionConfig, rope: RoPE, rate: int | None, chooses: bool
    ) -> None:
        super().__init__()
        size = c.head_size
        eps = c.rms_norm_eps
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank)
        self.q_norm = RMSNorm(c.q_lora_rank, eps)
        self.wq_b = Linear(c.q_lora_rank, c.num_attention_heads * size)
        self.wkv = Linear(c.hidden_size, size)
        self.kv_norm = RMSNorm(size, eps)
        group = c.num_attention_heads // c.o_groups * size
        self.wo_a = GroupedLinear(c.o_groups, group, c.o_lora_rank)
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size)
        self.attn_sink = mx.zeros((c.num_attention_heads,))
        if rate is not None:

            def compressor(features: int) -> Compressor:
                return Compressor(
                    c.hidden_size, features, rate=rate, overlap=chooses, rope=rope, eps=eps
                )

            self.compressor = compressor(size)
            if chooses:
                self.indexer = EntryIndexer(c, compressor(c.index_head_dim))
                self.index_topk = c.index_topk
        self.rope = rope
        self.head_size = size
        self.window = c.sliding_window
        self.groups = c.o_groups
        self.eps = eps

    @property
    def compressors(self) -> list[Compressor]:
        """The compressor, and that of the indexer, where there are any."""
        found = [self.compressor] if "compressor" in self else []
        return [*found, self.indexer.compressor] if "indexer" in self else found

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """Create an empty cache, which grows as needed.

        Raises:
            InvalidInput: its vectors are to be quantized.
        """
        if kv is not None:
            raise InvalidInput(
                "the cache of compressed attention is not quantized: leave out --kv-bits (kv_bits)"
            )
        entries = tuple(
            EntrySizes(c.size, c.rate, 2 * c.size * (1 + c.overlap), c.overlap)
            for c in self.compressors
        )
        return CompressedCache(CompressedSizes(self.head_size, self.window, entries))

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        batch, length, _ = x.shape
        q_latents = self.q_norm(self.wq_a(x))
        q = mx.unflatten(self.wq_b(q_latents), -1, (-1, self.head_size)).swapaxes(1, 2)
        q = rotate_last(self.rope, mx.fast.rms_norm(q, None, self.eps), context.offset)
        kv = rotate_last(self.rope, self.kv_norm(self.wkv(x))[:, None], context.offset)
        inputs = [compressor.project(x) for compressor in self.compressors]
        index: list[mx.array] = []
        if "indexer" in self:
            index = [
                self.indexer.queries(q_latents, context.offset),
                self.indexer.weights_proj(x),
            ]
        starts, states = self.load(batch, context, cache)
        rows: list[tuple[mx.array, list[Compressed]]] = []
        for row, (start, state) in enumerate(zip(starts, states, strict=True)):
            skipped = min(max(-start, 0), length)  # tokens of padding
            new = slice(skipped, None)
            own = [array[row : row + 1, new] for array in inputs]
            rows.append(self.extend(state, kv[row : row + 1, :, new], own))
        self.save(cache, length, rows)
        outs: list[mx.array] = []
        for row, (keys, compressed) in enumerate(rows):
            skipped = min(max(-starts[row], 0), length)
            if skipped == length:
                outs.append(mx.zeros_like(q[row : row + 1]))
                continue
            part = [array[row : row + 1] for array in index]
            if part:
                part = [part[0][:, :, skipped:], part[1][:, skipped:]]
            out = self.attend(
                q[row : row + 1, :, skipped:], keys, compressed, max(starts[row], 0), part
            )
            outs.append(mx.pad(out, [(0, 0), (0, 0), (skipped, 0), (0, 0)]) if skipped else out)
        outs += outs[-1:] * (batch - len(outs))
        out = mx.concatenate(outs) if len(outs) > 1 else outs[0]
        out = rotate_last(self.rope, out, context.offset, back=True).swapaxes(1, 2)
        out = mx.unflatten(out.flatten(-2), -1, (self.groups, -1))  # (B, L, G, heads / G · D)
        return self.wo_b(self.wo_a(out))

    def load(
        self, batch: int, context: ForwardContext, cache: Cache | None
    ) -> tuple[list[int], list[tuple[mx.array, ...]]]:
        """Position of the first new token of each row, negative for padding; and the rows' states."""
        if isinstance(cache, RowCaches):
            caches = [cast(CompressedCache, own) for own in cache.rows]
            return [own.length for own in caches], [own.state for own in caches]
        offset = context.offset
        starts = [offset] * batch if isinstance(offset, int) else cast("list[int]", offset.tolist())
        if cache is None:
            return starts, [()] * batch
        return starts, cast(CompressedCache, cache).row_states(batch)

    def save(
        self, cache: Cache | None, length: int, rows: list[tuple[mx.array, list[Compressed]]]
    ) -> None:
        """Store the states of all rows after ``length`` more tokens."""
        if cache is None:
            return
        states: list[list[mx.array]] = []
        for keys, compressed in rows:
            kept = min(keys.shape[2], self.window - 1)
            window = mx.take(keys, mx.arange(keys.shape[2] - kept, keys.shape[2]), axis=2)
            states.append([window, *(array for part in compressed for array in part)])
        if isinstance(cache, RowCaches):
            for own, state in zip(cache.rows, states, strict=True):
                cast(CompressedCache, own).update(length, *state)
            return
        cast(CompressedCache, cache).update(length, *(a for state in states for a in state))

    def extend(
        self, state: tuple[mx.array, ...], kv: mx.array, inputs: list[mx.array]
    ) -> tuple[mx.array, list[Compressed]]:
        """Vectors of the window and the new tokens of one row, and its entries."""
        window, *others = state or (kv[:, :, :0],)
        pairs = [Compressed(*others[i : i + 2]) for i in range(0, len(others), 2)]
        if not pairs:
            pairs = [c.empty(x) for c, x in zip(self.compressors, inputs, strict=True)]
        compressed = [
            compressor.extend(before, new)
            for compressor, before, new in zip(self.compressors, pairs, inputs, strict=True)
        ]
        return mx.concatenate([window, kv], axis=2), compressed

    def attend(
        self,
        q: mx.array,
        keys: mx.array,
        compressed: list[Compressed],
        start: int,
        index: list[mx.array],
    ) -> mx.array:
        """Attend from the queries (1, H, L, D) of one row, the first at position ``start``."""
        length = q.shape[2]
        positions = mx.arange(start, start + length)[:, None]
        slots = mx.arange(start + length - keys.shape[2], start + length)
        mask = (slots <= positions) & (slots > positions - self.window)
        if compressed and compressed[0].entries.shape[2]:
            entries = compressed[0].entries
            count = entries.shape[2]
            visible = mx.arange(count) < (positions + 1) // self.compressor.rate  # (L, E)
            if index and count > self.index_topk:
                scores = index_scores(index[0], index[1], compressed[1].entries)
                chosen = top_keys(scores, visible, self.index_topk)[0]
                none = mx.zeros(visible.shape, mx.bool_)
                visible &= mx.put_along_axis(none, chosen, mx.array(True), axis=-1)
            keys = mx.concatenate([keys, entries], axis=2)
            mask = mx.concatenate([mask, visible], axis=1)
        scale = self.head_size**-0.5
        return attend(q, keys, keys, mask, scale=scale, sinks=self["attn_sink"])
