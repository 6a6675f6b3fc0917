"""GLM-5.3 Flash: streams, KDA, and latent attention to pools of tokens, against transformers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks.residual_streams.sinkhorn import StreamConnection
from mlxarch.errors import ConfigError
from mlxarch.loading.load import load_model, open_resolved
from mlxarch.loading.registry import architecture
from mlxarch.quantize import convert
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like
NAME = "glm5_next"


def rolled(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


def linear(**settings: Any) -> parity.Change:
    return config(linear_attn_config=settings)


CASES = {
    NAME: Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-3),
            "index_topk": config(index_topk=12),
            "dense": config(index_topk=64),
            "index queries": weight("*.indexer.wq_b.weight", rolled),
            "index keys": weight("*.indexer.wk.weight", rolled),
            "norm of index keys": weight("*.indexer.k_norm.weight", rolled),
            "bias of index keys": weight("*.indexer.k_norm.bias", ZEROS),
            "signs of index heads": weight("*.indexer.weights_proj.weight", np.negative),
            "weights of pooled tokens": weight("*.index_kpool_compress_gate", ZEROS),
            "places in a pool": weight("*.index_kpool_compress_ape", rolled),
            "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
            "lower bound of the decay": linear(gate_lower_bound=-4.0),
            "decay": weight("*.A_log", lambda a: a + 0.5),
            "bias of the decay": weight("*.dt_bias", lambda a: a + 0.5),
            "gate of a KDA": weight("*.g_b_proj.weight", ZEROS),
            "Sinkhorn iterations": config(hc_sinkhorn_iters=1),
            "hc_eps": config(hc_eps=1e-2),
            "projection of the streams": weight("*.hc_attn_fn", rolled),
            "rows and columns of the mix": weight(
                "*.hc_*_base",
                lambda b: np.concatenate([b[:8], b[8:].reshape(4, 4).T.ravel()]),
            ),
            "scales of the streams": weight("*.hc_*_scale", lambda s: s * 2),
            "limit of SwiGLU": config(swiglu_limit=10.0),
            "experts per token": config(num_experts_per_tok=2),
            "routed_scaling_factor": config(routed_scaling_factor=1.0),
            "bias of the choice": weight("*.e_score_correction_bias", lambda b: b[::-1].copy()),
            "shared expert": weight("*.shared_experts.down_proj.weight", ZEROS),
        },
        tolerance=2e-4,
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_glm5_next_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_glm5_next_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def published() -> dict[str, Any]:
    return json.loads((parity.GOLDEN / NAME / "config.json").read_text())


def test_the_mix_of_streams_keeps_their_sum() -> None:
    c: Any = architecture(published()).config
    connection = StreamConnection(c)
    logits = mx.random.normal((3, 4, 4), key=mx.random.key(0)) * 3
    mix = connection.balance(logits)
    assert float(mx.abs(mix.sum(-2) - 1).max()) <= 1e-4  # of every stream that is read
    assert float(mx.abs(mix.sum(-1) - 1).max()) <= 0.1  # nearly, after 20 iterations
    assert float(mx.abs(mx.softmax(logits, axis=-1).sum(-2) - 1).max()) > 0.5


def test_a_layer_without_an_indexer_takes_the_scores_of_the_one_before(tmp_path: Path) -> None:
    change = without(
        "*.layers.3.self_attn.indexer.*", indexer_types=["full", "full", "full", "shared"]
    )
    model, _ = load_model(parity.copy(NAME, "config.json", tmp_path, change), dtype="float32")
    ids = mx.array(parity.reference(NAME)["input_ids"])
    whole = model(ids)
    caches = model.make_caches()
    parts = [model(ids[:, at : at + 7], caches) for at in range(0, ids.shape[1], 7)]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - whole).max()) <= 1e-4
    stored = [len(cache.arrays()) for cache in caches if cache]
    assert stored == [4, 3, 4, 1]  # state and tails; latents, index keys and gates
    reference = mx.array(parity.reference(NAME)["logits"])
    assert float(mx.abs(whole - reference).max()) > 1e-2


def test_weights_of_streams_and_indexers_are_not_quantized(tmp_path: Path) -> None:
    output = convert(
        parity.GOLDEN / NAME, tmp_path / "4bit", bits=4, group_size=32, method="round"
    ).output
    with open_resolved(output) as found:
        tensors = found.source.tensors
        names = [name for name in tensors if ".hc_" in name or ".indexer." in name]
        assert len(names) == 4 * 6 + 2 * 7
        assert all(name in found.published for name in names)
    model, _ = load_model(output, dtype="float32")
    assert model(mx.array([[9, 10, 11]])).shape == (1, 3, 96)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"index_topk": 18}, "index_kpool"),
        ({"index_kpool_always_select_tail": False}, "index_kpool_always_select_tail"),
        ({"qk_rope_head_dim": 16}, "qk_rope_head_dim"),
        ({"layer_types": ["linear_attention"]}, "layer_types"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"linear_attn_config": {"num_heads": 4}}, "linear_attn_config"),
        ({"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    found = published()
    architecture(found).build()
    found["text_config"] |= settings
    with pytest.raises(ConfigError, match=named):
        architecture(found).build()
