"""States in a plan: their bytes are those of real caches, and do not grow with the context."""

import json

import mlx.core as mx
import pytest

import parity
from mlxarch.kv_cache import StateCache
from mlxarch.loading.load import load_model
from mlxarch.planner.blueprint import blueprint_from_config

NAMES = ["qwen3_5", "qwen3_next", "lfm2", "nemotron_h", "granite_hybrid", "kimi_linear"]


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_of_states_are_those_of_real_ones(name: str) -> None:
    config = json.loads((parity.GOLDEN / name / "config.json").read_text())
    blueprint = blueprint_from_config(name, config)
    footprint = blueprint.footprint()
    planned = footprint.kv_bytes(256, float_bytes=4)["state layers"]
    model, _ = load_model(parity.GOLDEN / name, dtype="float32")
    caches = model.make_caches()
    model(mx.array([list(range(8, 28))]), caches)
    real = sum(cache.nbytes for cache in caches if isinstance(cache, StateCache))
    assert planned == real
    assert footprint.kv_bytes(512, float_bytes=4)["state layers"] == real
    assert footprint.has_states and footprint.snapshot_bytes(256, 4) == real


def test_a_state_beside_keys_and_values_is_counted_too() -> None:
    config = json.loads((parity.GOLDEN / "falcon_h1" / "config.json").read_text())
    footprint = blueprint_from_config("falcon_h1", config).footprint()
    model, _ = load_model(parity.GOLDEN / "falcon_h1", dtype="float32")
    caches = model.make_caches(256)
    model(mx.array([list(range(8, 28))]), caches)
    real = [cache for cache in caches if cache is not None]
    assert sum(footprint.kv_bytes(256, 4).values()) == sum(cache.nbytes for cache in real)
    assert footprint.has_states
    assert footprint.snapshot_bytes(256, 4) == sum(cache.snapshot_bytes for cache in real)
    assert footprint.growth_bytes(256, 4) > 0


@pytest.mark.parametrize("name", [*NAMES, "falcon_h1"])
def test_the_peak_of_a_chunk_can_be_predicted(name: str) -> None:
    config = json.loads((parity.GOLDEN / name / "config.json").read_text())
    blueprint = blueprint_from_config(name, config)
    small = blueprint.activation_peak(256, 16, 4, fused=False, kv=None)
    large = blueprint.activation_peak(256, 128, 4, fused=False, kv=None)
    assert 0 < small.allocated < large.allocated


def test_in_16_bits_only_the_inputs_of_convolutions_shrink() -> None:
    config = json.loads((parity.GOLDEN / "lfm2" / "config.json").read_text())
    footprint = blueprint_from_config("lfm2", config).footprint()
    assert (
        footprint.kv_bytes(256, 2)["state layers"] * 2 == footprint.kv_bytes(256, 4)["state layers"]
    )
    config = json.loads((parity.GOLDEN / "nemotron_h" / "config.json").read_text())
    footprint = blueprint_from_config("nemotron_h", config).footprint()
    assert (
        footprint.kv_bytes(256, 2)["state layers"]
        > 0.8 * footprint.kv_bytes(256, 4)["state layers"]
    )
