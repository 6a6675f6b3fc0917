"""Memory of a forward pass, derived from its operations."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import parity
from mlxarch.blocks.attention.bounded_eval import eval_two_in_flight
from mlxarch.loading.registry import architecture
from mlxarch.planner.activation_memory import fill_caches, step_peak, use_stand_ins
from mlxarch.planner.blueprint import blueprint_from_config
from mlxarch.planner.peak_memory import OperationList, execution_order, peak_bytes
from mlxarch.quantization.scheme import Quantization

SIZE = 1024 * 1024 * 4  # bytes of the arrays below


def listed(function: Callable[[mx.array], mx.array]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    mx.export_function(items.append, function, mx.zeros((1024, 1024)))
    return items


def test_the_peak_of_every_architecture_can_be_derived() -> None:
    configs = [json.loads(file.read_text()) for file in parity.GOLDEN.glob("*/config.json")]
    first_of_type = {config["model_type"]: config for config in configs}
    for name, config in first_of_type.items():
        blueprint = blueprint_from_config(name, config)
        small, large = (blueprint.activation_peak(40, n, 4, fused=False, kv=None) for n in (2, 32))
        assert 0 < small.allocated < large.allocated, name


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda x: mx.exp(x), 1),  # over the input, which nobody else needs
        (lambda x: mx.exp(mx.sin(mx.cos(x))), 1),
        (lambda x: x @ x, 2),  # never over an input
        (lambda x: mx.exp(x) + x, 2),  # x is needed twice
        (lambda x: (x @ x) @ x, 3),
        (lambda x: x.T.reshape(-1)[:7], 1),  # views
    ],
)
def test_arrays_count_while_somebody_needs_them(
    function: Callable[[mx.array], mx.array], arrays: int
) -> None:
    assert peak_bytes(OperationList.from_export(listed(function)), ahead=0) == pytest.approx(
        arrays * SIZE, rel=0.001
    )


def test_what_mlx_prepares_ahead_counts() -> None:
    def chain(x: mx.array) -> mx.array:
        y = x
        for _ in range(10):
            y = y @ x
        return y

    one_by_one, two_ahead, all_ahead = (
        peak_bytes(OperationList.from_export(listed(chain)), ahead) // SIZE for ahead in (0, 4, 100)
    )
    assert (one_by_one, two_ahead, all_ahead) == (3, 5, 11)


def test_views_of_constants_are_prepared_too_wherever_they_are_used() -> None:
    weight = mx.ones((1024, 1024))
    mx.eval(weight)

    def chain(turned: bool) -> Callable[[mx.array], mx.array]:
        def function(x: mx.array) -> mx.array:
            for _ in range(10):
                x = x @ (weight.T if turned else weight)
            return x

        return function

    assert [step["name"] for step in listed(chain(True)) if step["type"] == "primitive"].count(
        "Transpose"
    ) == 1
    plain, turned = (
        peak_bytes(OperationList.from_export(listed(chain(kind))), ahead=6) // SIZE
        for kind in (False, True)
    )
    assert (plain, turned) == (5, 4), "six parts are three products, or two and what they view"


def test_what_is_begun_together_is_waited_for_together() -> None:
    def two(x: mx.array, first: bool) -> mx.array:
        """Two chains, one begun behind the other; ``first``: what precedes both was begun before them."""
        start = eval_two_in_flight([mx.exp(x)], [mx.exp(x)])[0] if first else mx.exp(x)
        outs: list[mx.array] = []
        for n in range(2):
            outs.append(((start + n) @ x @ x @ x).sum(-1, keepdims=True))
            outs[-1:] = eval_two_in_flight(outs[-1:], [start])
        return mx.concatenate(outs, axis=-1)

    together, apart = (
        peak_bytes(OperationList.from_export(listed(lambda x: two(x, first))), ahead=1000)  # noqa: B023
        for first in (False, True)
    )
    assert together < apart - 2 * SIZE, (
        "nothing of the first chain is left when the second is begun"
    )


def test_what_is_waited_for_is_not_ahead() -> None:
    def parts(wait: bool) -> Callable[[mx.array], mx.array]:
        def function(x: mx.array) -> mx.array:
            outs: list[mx.array] = []
            for n in range(8):
                outs.append(mx.softmax((x + n) @ x @ x, axis=-1).sum(-1, keepdims=True))
                if wait:
                    outs[-1:] = eval_two_in_flight(outs[-1:], outs[-2:-1] or [x])
            return mx.concatenate(outs, axis=-1)

        return function

    paced, unpaced = (
        peak_bytes(OperationList.from_export(listed(parts(wait))), ahead=1000)
        for wait in (True, False)
    )
    assert paced < 0.5 * unpaced
    with_wait, without = (parts(wait)(mx.ones((8, 8))) for wait in (True, False))
    assert mx.array_equal(with_wait, without), "outside of a listing it only waits"


def test_shapes_that_another_back_end_does_not_make_are_left_out() -> None:
    step = OperationList.from_export(listed(lambda x: mx.softmax(x[:512] @ x, axis=-1) @ x))
    assert peak_bytes(step, 0, skip=lambda shape: shape == (512, 1024)) < peak_bytes(step, 0)


def test_only_what_is_asked_for_runs_and_inputs_run_first() -> None:
    items = listed(lambda x: mx.exp(mx.sin(x)))
    steps = [item for item in items if item["type"] == "primitive"]
    [last] = [item["outputs"][0][0] for item in items if item["type"] == "outputs"]
    assert [step["name"] for step in execution_order(steps, [last])] == [
        step["name"] for step in steps
    ]
    assert execution_order(steps, [steps[0]["outputs"][0][0]]) == steps[:1]


def test_a_step_of_a_large_model_takes_no_memory_to_look_at() -> None:
    config: dict[str, Any] = dict(
        model_type="qwen3",
        hidden_size=8192,
        intermediate_size=32_768,
        num_hidden_layers=4,
        vocab_size=200_000,
    )
    config |= dict(
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=65_536
    )
    config |= dict(
        rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, attention_bias=False
    )
    model = architecture(config).build()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    use_stand_ins(model, mx.bfloat16)
    caches = model.make_caches(65_536)
    fill_caches(model, caches, 65_024, range(len(caches)))
    found = step_peak(model, caches, 512, [0, 1, 2, 3])
    assert mx.get_peak_memory() - before < 10**6
    hidden = 512 * 8192 * 2
    assert found.allocated > 512 * 65_536 * 64 * 2 + hidden, "on a CPU: the scores of all heads"
    caches = model.make_caches(65_536)
    fill_caches(model, caches, 65_024, range(len(caches)))
    flat = step_peak(model, caches, 512, [0, 1, 2, 3], skip=lambda shape: shape[-1:] > (60_000,))
    assert 4 * hidden < flat.allocated < 0.1 * found.allocated


def test_caches_are_filled_without_computing() -> None:
    config: dict[str, Any] = dict(
        model_type="deepseek_v3",
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        vocab_size=1000,
    )
    config |= dict(
        num_attention_heads=64,
        num_key_value_heads=64,
        q_lora_rank=None,
        kv_lora_rank=512,
        v_head_dim=64,
    )
    config |= dict(
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        first_k_dense_replace=1,
        max_position_embeddings=8192,
    )
    config |= dict(
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=64,
    )
    config |= dict(
        rms_norm_eps=1e-6, rope_theta=1e4, routed_scaling_factor=1.0, norm_topk_prob=True
    )
    model = architecture(config).build()
    use_stand_ins(model, mx.float32)
    caches = model.make_caches(8192, kv=Quantization(8, 64))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fill_caches(model, caches, 8000, range(len(caches)))
    assert mx.get_peak_memory() - before < 10**6, "the matrices of the heads have 8 MB each"
    [cache] = caches
    assert cache is not None and cache.length == 8000
    assert [array.shape[2] for array in cache.arrays()] == [8192] * 3
