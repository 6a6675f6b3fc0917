"""GPT-2 against transformers' GPT2LMHeadModel."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError, ContextLengthError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import convert
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like
POSITIONS = 72  # that the fixture's tables hold


def own_head(found: dict[str, Any], weights: parity.Weights) -> None:
    """A head beside tied embeddings counts."""
    [table] = [value for name, value in weights.items() if name.endswith("wte.weight")]
    weights["lm_head.weight"] = np.roll(table, 1, axis=0)


def transposed(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix.T)


def rolled(axis: int, count: int) -> Any:
    return lambda found: np.roll(found, count, axis)


COMMON = (
    {f"weight of {norm}": weight(f"*{norm}.weight", ONES) for norm in ("ln_1", "ln_2", "ln_f")}
    | {f"bias of {norm}": weight(f"*{norm}.bias", ZEROS) for norm in ("ln_1", "ln_2", "ln_f")}
    | {
        f"bias of {name}": weight(f"*.{name}.bias", ZEROS)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    | {
        "layer_norm_epsilon": config(layer_norm_epsilon=1e-4),
        "n_head": config(n_head=2),
        "a square matrix not transposed": weight("*.attn.c_proj.weight", transposed),
        "queries for keys": weight("*.attn.c_attn.weight", rolled(1, 32)),
        "positions ignored": weight("*wpe.weight", ZEROS),
        "positions counted from 1": weight("*wpe.weight", rolled(0, -1)),
        "head of its own": own_head,
    }
)
CASES = {"gpt2": Case(COMMON), "gpt2_prefixed": Case(COMMON)}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gpt2_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gpt2_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize("other", [nn.gelu, nn.relu, nn.silu])
def test_another_activation_shows(
    other: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mlxarch.models.gpt2.gelu", other)
    assert parity.effect("gpt2", "config.json", config(), tmp_path) >= 3 * parity.TOLERANCE


# The end of the context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return load_model(
        parity.copy("gpt2", "config.json", tmp_path_factory.mktemp("gpt2")), dtype="float32"
    )[0]


def test_the_context_ends_with_the_positions(model: CausalLM) -> None:
    assert model.context_length == POSITIONS
    assert model(mx.zeros((1, POSITIONS), mx.int32)).shape[1] == POSITIONS
    with pytest.raises(ContextLengthError, match="73 tokens, and the model knows 72 positions"):
        model(mx.zeros((1, POSITIONS + 1), mx.int32))


def test_the_context_ends_in_the_caches_too(model: CausalLM) -> None:
    caches = model.make_caches()
    model(mx.zeros((1, POSITIONS - 1), mx.int32), caches)
    model(mx.zeros((1, 1), mx.int32), caches)
    with pytest.raises(ContextLengthError):
        model(mx.zeros((1, 1), mx.int32), caches)


def test_padding_takes_no_position(model: CausalLM) -> None:
    caches = model.make_caches(padding=[8, 9])
    model(mx.zeros((2, POSITIONS + 7), mx.int32), caches)
    model(mx.zeros((2, 1), mx.int32), caches)
    with pytest.raises(ContextLengthError):  # of the first row
        model(mx.zeros((2, 1), mx.int32), caches)


# Names and layouts


def test_the_masks_among_the_weights_are_left_out_and_biases_are_not(tmp_path: Path) -> None:
    resolved = resolve(open_checkpoint(parity.copy("gpt2", "config.json", tmp_path)))
    assert resolved.ignored == {f"h.{layer}.attn.bias": "causal mask" for layer in range(2)}
    assert "model.h.0.attn.c_attn.bias" in resolved.parameters


@pytest.mark.parametrize("name", CASES)
def test_a_copy_in_the_layout_of_mlx_computes_the_same(name: str, tmp_path: Path) -> None:
    folder, target = parity.copy(name, "config.json", tmp_path), tmp_path / "copy"
    convert(folder, target, bits=None)
    tensors = open_checkpoint(target).tensors
    assert all(path.startswith("model.") for path in tensors)
    assert tensors["model.h.0.attn.c_attn.weight"].shape == (96, 32)
    ids = mx.array(parity.reference(name)["input_ids"])
    before, after = (load_model(place, dtype="float32")[0](ids) for place in (folder, target))
    assert mx.array_equal(before, after)


def published(name: str = "gpt2", **settings: Any) -> dict[str, Any]:
    return json.loads((parity.GOLDEN / name / "config.json").read_text()) | settings


def test_an_absent_width_is_four_times_the_embedding() -> None:
    assert architecture(published()).config.intermediate_size == 128
    assert architecture(published(n_inner=None)).config.intermediate_size == 128
    assert architecture(published("gpt2_prefixed")).config.intermediate_size == 24


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "32 is no multiple"),
        ({"n_embd": None}, "hidden_size"),
        ({"n_inner": "128"}, "intermediate_size"),
        ({"layer_norm_epsilon": 0}, "rms_norm_eps"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        architecture(published(**settings)).build()


def test_missing_keys_are_called_as_gpt2_calls_them() -> None:
    found = published()
    for key in ("n_embd", "n_positions"):
        del found[key]
    with pytest.raises(ConfigError, match="lacks n_embd, n_positions$"):
        architecture(found)


@pytest.mark.parametrize("tensor", ["h.1.mlp.c_fc.weight", "wpe.weight", "ln_f.bias"])
def test_a_missing_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=tensor):
        load_model(parity.copy("gpt2", "config.json", tmp_path, without(tensor)))
