"""Latent attention: two forms of the same mathematics."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import ForwardContext, LatentAttention
from mlxarch.blocks.attention import latent_attention
from tiny_latent import attention, draw


def run(
    block: LatentAttention, x: mx.array, lengths: list[int], padding: list[int] | None = None
) -> mx.array:
    """All of x through one cache, so many tokens at a time."""
    cache, outs, start = block.make_cache(None), [], 0
    assert cache is not None
    cache.padding = None if padding is None else mx.array(padding)
    for length in lengths:
        outs.append(block(x[:, start : start + length], ForwardContext(length, [cache]), cache))
        start += length
    return mx.concatenate(outs, axis=1)


def distance(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a - b)).max())


@pytest.fixture(params=[None, 4, 8])
def block(request: pytest.FixtureRequest) -> LatentAttention:
    return attention(request.param)


@pytest.mark.parametrize("padding", [None, [0, 7, 3]])
def test_the_two_forms_are_the_same_mathematics(
    padding: list[int] | None, block: LatentAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, lengths = draw(40, batch=3), [17, 1, 5, 1, 16]
    as_it_is = run(block, x, lengths, padding)
    for form in (LatentAttention.absorbed, LatentAttention.expanded):
        monkeypatch.setattr(LatentAttention, "absorbed", form)
        monkeypatch.setattr(LatentAttention, "expanded", form)
        assert distance(run(block, x, lengths, padding), as_it_is) <= 2e-5
        monkeypatch.undo()
    if padding is not None:  # negative control: without it the padded rows see what they must not
        assert distance(run(block, x, lengths)[1, 7:], as_it_is[1, 7:]) > 1e-2
    else:
        assert distance(run(block, x, [40]), as_it_is) <= 2e-5
        assert distance(block(x, ForwardContext(40), None), as_it_is) <= 2e-5


def test_few_queries_are_absorbed_and_many_expand_the_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []

    def spied(name: str) -> Callable[..., mx.array]:
        real = getattr(LatentAttention, name)
        return lambda *arguments: taken.append(name) or real(*arguments)

    for name in ("absorbed", "expanded"):
        monkeypatch.setattr(LatentAttention, name, spied(name))
    run(attention(), draw(600), [300, 1, 1, 16, 282])
    assert taken == ["expanded", "absorbed", "absorbed", "absorbed", "expanded"]


@pytest.mark.parametrize("scores", [1, 500, 40 * 40 * 3])
def test_heads_one_after_the_other_give_what_they_give_together(
    scores: int, block: LatentAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, lengths = draw(40), [20, 1, 2, 17]
    together = run(block, x, lengths)
    monkeypatch.setattr(latent_attention, "MAX_SCORES", scores)
    assert distance(run(block, x, lengths), together) <= 2e-6
    block.o_proj.weight = block.o_proj.weight[
        :, ::-1
    ]  # negative control: the order of the heads counts
    assert distance(run(block, x, lengths), together) > 1e-2


def test_queries_without_a_latent_have_one_matrix() -> None:
    block = attention(q_lora_rank=None)
    assert "q_proj" in block and "q_a_proj" not in block
    x = draw(9)
    assert distance(run(block, x, [9]), run(block, x, [4, 1, 4])) <= 2e-5
