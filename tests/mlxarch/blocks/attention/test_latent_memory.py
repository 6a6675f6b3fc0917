"""Memory of latent attention."""

import mlx.core as mx
import pytest

from mlxarch.blocks import ForwardContext, LatentAttention
from mlxarch.blocks.attention import latent_attention
from tiny_latent import SIZES, attention, draw


def peak(block: LatentAttention, held: int, length: int) -> int:
    """Bytes that one pass takes over a cache of ``held`` tokens, beside what was there before."""
    cache = block.make_cache(held + length)
    assert cache is not None
    size = block.c.kv_lora_rank + block.c.qk_rope_head_dim
    latents = mx.random.normal((1, 1, held, size))
    cache.append(latents, latents)
    x = draw(length)
    mx.eval(x, cache.arrays(), block.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(block(x, ForwardContext(length, [cache]), cache))
    return mx.get_peak_memory() - before


def test_memory_is_never_that_of_all_heads_over_the_whole_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads, length, held = 32, 64, 4032
    block = attention(num_attention_heads=heads)
    monkeypatch.setattr(latent_attention, "MAX_SCORES", 1)  # one head at a time, two under way
    parts = peak(block, held, length)
    monkeypatch.setattr(latent_attention, "MAX_SCORES", 2**30)
    whole = peak(block, held, length)
    assert whole > heads * length * (held + length) * 4  # the scores, in float32
    assert (
        parts < whole / 4
    )  # measured: 1/7 to 1/9, as the back end frees a part before or after it starts the next


def test_one_token_makes_no_keys_of_the_context() -> None:
    heads, held = 32, 2048
    block = attention(num_attention_heads=heads)
    keys = heads * held * (SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"]) * 4
    assert peak(block, held, 1) < keys / 4
    assert peak(block, held, 100) > keys  # negative control: here they are made
