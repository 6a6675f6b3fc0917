"""Qwen4-Exp: streams, hashed n-grams and blocks chosen by an indexer, against transformers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import parity
from mlxarch.blocks.recurrent.ngram_embedding import NGramHash, split_mix
from mlxarch.errors import ConfigError
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.planner.blueprint import blueprint_from_config
from mlxarch.quantize import convert
from parity import Case, config, weight

ZEROS = np.zeros_like
NAME = "qwen4_exp"


def rolled(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


CASES = {
    NAME: Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-3),
            "indexer_budget": config(indexer_budget=12),
            "dense": config(indexer_budget=64),
            "tokens of a block": config(indexer_compress_ratio=8),
            "index heads": weight("*.index_qk_proj.weight", rolled),
            "norm of index queries": weight("*.indexer.q_layernorm.weight", rolled),
            "norm of index keys": weight("*.indexer.k_layernorm.weight", rolled),
            "gate of the DeltaNet": config(output_gate_type="silu"),
            "decay": weight("*.A_log", lambda a: a + 1),
            "RoPE": config(rope_theta=100.0),
            "end of a text": config(eos_token_id=461),
            "seed of the hashes": config(seed=1235),
            "rows of the n-grams": weight("*.ngram_embedding.shard_1.weight", rolled),
            "keys of the n-grams": weight("*.norm_key.weight", rolled),
            "queries of the n-grams": weight("*.norm_query.weight", rolled),
            "norm of the convolution": weight("*.norm_conv.weight", rolled),
            "convolution backwards": weight("*.ple.conv1d.weight", lambda w: w[..., ::-1].copy()),
            "norm of the streams": weight("*.hc_norm.weight", rolled),
            "gates of the mixer": weight("*.input_mix_weight_up.weight", ZEROS),
            "gates of the streams": weight("*.block_inject_weight.weight", ZEROS),
            "last mixer": weight("*.hyper_connection_mixer.input_mix_weight_down.weight", ZEROS),
            "experts per token": config(num_experts_per_tok=2),
            "shared expert": weight("*.shared_expert_gate.weight", np.negative),
        },
        tolerance=2e-4,
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_qwen4_exp_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_qwen4_exp_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def published() -> dict[str, Any]:
    return json.loads((parity.GOLDEN / NAME / "config.json").read_text())


def test_hash_functions_are_those_that_the_checkpoint_stores() -> None:
    c: Any = architecture(published()).config
    tensors = load_file(parity.GOLDEN / NAME / "model.safetensors")
    for index in (0, 2):
        found = NGramHash.for_layer(c, index)
        names = f"model.language_model.layers.{index}.ple.ple_embedding."
        assert list(found.multipliers) == tensors[f"{names}layer_multipliers"].tolist()
        assert list(found.sizes) == tensors[f"{names}ngram_heads_vocab_sizes"].tolist()
    assert split_mix(0) == 0xE220A8397B1DCDAF  # first output of the published generator for seed 0


def test_an_n_gram_does_not_reach_across_the_end_of_a_text() -> None:
    c: Any = architecture(published()).config
    hashes = NGramHash.for_layer(c, 0)
    eos = 460
    rows: list[Any] = [
        hashes.row_indices(mx.array([[eos, eos, *text]]), eos)[0].tolist()
        for text in ([5, 6, eos, 9, 11], [40, 41, eos, 9, 11], [40, 41, 7, 9, 11])
    ]
    assert rows[0][3:] == rows[1][3:] != rows[2][3:]
    assert rows[0][2] != rows[1][2]  # the token that ends a text still sees it
    assert all(row < hashes.rows for row in sum(rows[0], []))


@pytest.mark.parametrize("bits", [None, 8])
def test_the_table_of_n_grams_may_stay_on_the_disk(bits: int | None, tmp_path: Path) -> None:
    folder = parity.GOLDEN / NAME  # whose table is in four shards
    if bits:
        folder = convert(folder, tmp_path / "8bit", bits=8, group_size=32, method="round").output
    prompt = parity.reference(NAME)["input_ids"][0].tolist()
    found: list[list[int]] = []
    logits: list[mx.array] = []
    for execution in (Execution(), Execution(ple="ssd")):
        model, _ = load_model(folder, dtype="float32", execution=execution)
        session = Session(model.make_caches(), prefill_chunk=13)
        found.append([t for t, _ in decode(model, session, prompt, Sampling(), 12)])
        logits.append(model(mx.array([prompt])))
    assert found[0] == found[1]
    assert bool((logits[0] == logits[1]).all())
    assert found[0] == parity.reference(NAME)["generated"][0, :12].tolist() or bits


def test_a_plan_counts_the_rows_that_a_token_reads() -> None:
    footprint = blueprint_from_config(NAME, published()).footprint()
    assert footprint.row_bytes(float_bytes=2) == 2 * 4 * 16 * 2  # layers, heads, numbers, bytes
    assert footprint.weight_bytes(2)["per-layer embeddings"] == (448 + 512) * 16 * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ple_embed_dim": 66}, "ple_embed_dim"),
        ({"ple_layer_ids": [4]}, "ple_layer_ids"),
        ({"ple_layer_ids": [5]}, "ple_layer_ids"),
        ({"ple_layer_ids": [1, 1]}, "ple_layer_ids"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads"),
        ({"indexer_budget": 18}, "indexer_budget"),
        ({"output_gate_type": "tanh"}, "output_gate_type"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
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
