"""Gemma 3n against transformers' Gemma3nForCausalLM, and in the layout of the published wrapper."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import ForwardContext
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import convert
from parity import Case, Change, config, weight, without

SLIDING, FULL = "sliding_attention", "full_attention"
OLDER = {SLIDING: "rope_local_base_freq", FULL: "rope_theta"}
NAME = "gemma3n_text"
FIRST_SHARING = 3


def base(kind: str, theta: float) -> Change:
    """Another RoPE base for one kind of layers, in whichever dialect."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        if "rope_parameters" in found:
            found["rope_parameters"][kind]["rope_theta"] = theta
        else:
            found[OLDER[kind]] = theta

    return change


def add_keys_and_values(found: dict[str, Any], weights: parity.Weights) -> None:
    """The published files hold them for the layers that share, too; they are noise here."""
    generator = np.random.default_rng(0)
    for layer in range(FIRST_SHARING, found["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            like = weights[f"model.layers.0.self_attn.{part}.weight"]
            noise = generator.standard_normal(like.shape).astype(np.float32)
            weights[f"model.layers.{layer}.self_attn.{part}.weight"] = noise


def shares(count: int) -> Change:
    """Fewer layers share keys and values."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        add_keys_and_values(found, weights)
        found["num_kv_shared_layers"] = count

    return change


def rows(pattern: str, first: int, last: int, factor: float) -> Change:
    """Some rows of a matrix multiplied."""

    def make(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        w[first:last] *= factor
        return w

    return weight(pattern, make)


ZEROS = np.zeros_like
NORMED = ("input", "post_attention", "pre_feedforward", "post_feedforward")
NORMS = (
    *(f"layers.?.{place}_layernorm" for place in NORMED),
    *(
        "layers.?.altup.router_norm",
        "layers.?.laurel.post_laurel_norm",
        "layers.?.post_per_layer_input_norm",
    ),
    *(
        "layers.?.self_attn.q_norm",
        "layers.?.self_attn.k_norm",
        "per_layer_projection_norm",
        "norm",
    ),
)
PARTS = (
    *(
        f"layers.?.altup.{part}"
        for part in ("modality_router", "prediction_coefs", "correction_coefs")
    ),
    *(
        "layers.?.laurel.linear_right",
        "layers.?.per_layer_projection",
        "per_layer_model_projection",
    ),
    *("altup_projections.1", "altup_unembed_projections.1", "embed_tokens_per_layer"),
)
CASES = {
    NAME: Case(
        {f"weight of {norm}": weight(f"model.{norm}.weight", np.ones_like) for norm in NORMS}
        | {f"{part} ignored": weight(f"model.{part}.weight", ZEROS) for part in PARTS}
        | {
            "rms_norm_eps": config(rms_norm_eps=1e-5),
            "rope base of the sliding layers": base(SLIDING, 1e6),
            "rope base of the full layers": base(FULL, 1e4),
            "window ignored": config(sliding_window=4096),
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
            "kinds of layers": config(layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL]),
            "soft cap ignored": config(final_logit_softcapping=None),
            "soft cap": config(final_logit_softcapping=13.0),
            "no layer is sparse": config(activation_sparsity_pattern=[0.0] * 5),
            "another sparsity": config(activation_sparsity_pattern=[0.75, 0.5, 0.0, 0.7, 0.0]),
            "altup_correct_scale": config(altup_correct_scale=False),
            "scale of the corrected stream": weight("*.correct_output_scale", np.ones_like),
            "no layer shares": shares(0),
            "one layer shares": shares(1),
            "row of the tokens without one": rows("*.embed_tokens_per_layer.weight", 0, 1, -1.0),
            "keys of the last sliding source": weight(
                "*.layers.1.self_attn.k_norm.weight", np.ones_like
            ),
        }
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gemma3n_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gemma3n_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def name_as_in_the_wrapper(found: dict[str, Any], weights: parity.Weights) -> None:
    for name in list(weights):
        weights[name.replace("model.", "model.language_model.", 1)] = weights.pop(name)


WITHOUT_EFFECT = {
    "streams begin as large as the first": weight("*.altup_projections.0.weight", lambda w: 3 * w),
    "streams end as large as the first": weight(
        "*.altup_unembed_projections.0.weight", lambda w: 3 * w
    ),
    "scores are not scaled": config(query_pre_attn_scalar=16),
    "keys and values of layers that share": add_keys_and_values,
    "the wrapper's names beside the text model's config": name_as_in_the_wrapper,
}


@pytest.mark.parametrize("what", WITHOUT_EFFECT)
def test_what_must_not_show_does_not(what: str, tmp_path: Path) -> None:
    assert parity.effect(NAME, "config.json", WITHOUT_EFFECT[what], tmp_path) <= parity.TOLERANCE


def test_values_that_are_not_normalised_would_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, w, eps: x if w is None else plain(x, w, eps))
    assert parity.differences(NAME, "config.json", tmp_path).whole >= 3 * parity.TOLERANCE


def wrapped(found: dict[str, Any], weights: parity.Weights) -> None:
    """As google/gemma-3n-E4B-it is published: names of the whole, keys and values for all, towers."""
    add_keys_and_values(found, weights)
    name_as_in_the_wrapper(found, weights)
    for tower in (
        "vision_tower.timm_model.conv",
        "audio_tower.norm",
        "embed_vision.norm",
        "embed_audio.norm",
    ):
        weights[f"model.{tower}.weight"] = np.ones(3, np.float32)
    text = dict(found)
    found.clear()
    found.update(
        {"model_type": "gemma3n", "text_config": text, "vision_config": {}, "audio_config": {}}
    )


@pytest.mark.parametrize("dialect", parity.DIALECTS)
def test_the_published_wrapper_gives_the_same_logits(dialect: str, tmp_path: Path) -> None:
    assert parity.effect(NAME, dialect, wrapped, tmp_path) <= parity.TOLERANCE


def test_a_quantized_wrapper_keeps_the_published_names(tmp_path: Path) -> None:
    folder = parity.copy(NAME, "config.json", tmp_path, wrapped)
    convert(folder, tmp_path / "quantized", bits=8, group_size=32, method="round")
    names = open_checkpoint(tmp_path / "quantized").tensors
    assert all(name.startswith("model.language_model.") for name in names)
    packed = {name for name, tensor in names.items() if isinstance(tensor, QuantizedTensor)}
    assert "model.language_model.layers.0.per_layer_input_gate.weight" in packed
    assert not [name for name in packed if ".altup." in name]
    model, _ = load_model(tmp_path / "quantized", dtype="float32")
    ids = mx.array(parity.reference(NAME)["input_ids"])
    assert np.abs(np.array(model(ids)) - parity.reference(NAME)["logits"]).max() < 3


def test_what_a_checkpoint_holds_for_sharing_layers_is_left_out_and_named(tmp_path: Path) -> None:
    ignored = resolve(open_checkpoint(parity.copy(NAME, "config.json", tmp_path, wrapped))).ignored
    assert ignored["model.layers.3.self_attn.k_proj.weight"] == "keys and values of sharing layers"
    assert not [name for name in ignored if ".layers.2." in name]


def test_a_converted_checkpoint_has_them_too_packed_as_those_that_count(tmp_path: Path) -> None:
    folder = parity.copy(NAME, "config.json", tmp_path, wrapped)
    for bits in (None, 8):
        convert(folder, tmp_path / f"{bits}", bits=bits, group_size=32, method="round")
        before, after = (
            open_checkpoint(folder).tensors,
            open_checkpoint(tmp_path / f"{bits}").tensors,
        )
        unused = {
            name
            for name in before
            if ".layers.3.self_attn.k_" in name or ".layers.3.self_attn.v_" in name
        }
        assert len(unused) == 3 and unused <= after.keys()
        for name in unused:
            assert isinstance(after[name], QuantizedTensor) == (
                bits is not None and "_proj" in name
            )
            near = np.abs(np.array(after[name].load()) - np.array(before[name].load())).max()
            assert near <= (0 if bits is None else 0.05)
        model, _ = load_model(tmp_path / f"{bits}", dtype="float32")
        assert "k_proj" not in model.model["layers"][3].self_attn


def without_unused(found: dict[str, Any], weights: parity.Weights) -> None:
    for name in [name for name in weights if re.search(r"\.[34]\.self_attn\.[kv]_", name)]:
        del weights[name]


def test_what_a_checkpoint_lacks_for_sharing_layers_is_not_missed(tmp_path: Path) -> None:
    folder = parity.copy(NAME, "config.json", tmp_path, without_unused)
    assert not resolve(open_checkpoint(folder)).ignored
    convert(folder, tmp_path / "copy", bits=None)
    assert (
        open_checkpoint(tmp_path / "copy").tensors.keys() == open_checkpoint(folder).tensors.keys()
    )


def test_what_is_carried_along_must_be_numbers(tmp_path: Path) -> None:
    def damage(found: dict[str, Any], weights: parity.Weights) -> None:
        weights["model.layers.3.self_attn.k_proj.weight"] = np.ones((3, 3), np.int64)

    with pytest.raises(
        CheckpointError,
        match=r"tensor model\.layers\.3\.self_attn\.k_proj\.weight is mlx\.core\.int64",
    ):
        resolve(open_checkpoint(parity.copy(NAME, "config.json", tmp_path, damage)))


def test_layers_that_share_have_no_cache(tmp_path: Path) -> None:
    model, _ = load_model(parity.copy(NAME, "config.json", tmp_path), dtype="float32")
    assert [cache is None for cache in model.make_caches()] == [False] * FIRST_SHARING + [True] * 2


def test_an_earlier_layer_of_the_kind_would_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class FirstStays(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            if key not in self:
                super().__setitem__(key, value)

    class WrongContext(ForwardContext):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.shared = FirstStays()

    monkeypatch.setattr("mlxarch.blocks.decoder.ForwardContext", WrongContext)
    assert parity.differences(NAME, "config.json", tmp_path).whole >= 3 * parity.TOLERANCE


def walk(model: Any, ids: mx.array) -> mx.array:
    """The three steps that everything outside of a model uses."""
    context = ForwardContext(ids.shape[1])
    state = model.embed(ids, context)
    for layer in model.layers:
        state = layer(state, context, None)
    return model.head(state[:, -1:])


def test_the_three_steps_give_the_last_token_its_logits(tmp_path: Path) -> None:
    model, _ = load_model(parity.copy(NAME, "config.json", tmp_path), dtype="float32")
    wanted = parity.reference(NAME)
    found = np.array(walk(model, mx.array(wanted["input_ids"])))
    assert found.shape == (1, 1, model.vocab_size)
    assert np.abs(found[0, 0] - wanted["logits"][0, -1]).max() <= parity.TOLERANCE


def test_one_hidden_size_for_all_layers_may_be_a_number(tmp_path: Path) -> None:
    found = published()
    found["intermediate_size"] = 16
    hidden = {layer.mlp.up_proj.weight.shape[0] for layer in architecture(found).build().layers}  # pyright: ignore
    assert hidden == {16}


def published() -> dict[str, Any]:
    return json.loads((parity.GOLDEN / NAME / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"intermediate_size": [8, 8]}, "intermediate_size has 2 values"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern has 1 values"),
        ({"activation_sparsity_pattern": [1.0] * 5}, "activation_sparsity_pattern"),
        ({"layer_types": [FULL]}, "layer_types has 1 values"),
        ({"layer_types": [FULL] * 4 + [SLIDING]}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"altup_active_idx": 1}, "altup_active_idx"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    architecture(published()).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published() | settings).build()


@pytest.mark.parametrize(
    "change",
    [without("*.layers.2.self_attn.k_proj.weight"), without("*.layers.2.self_attn.k_norm.weight")],
    ids=["projection", "norm"],
)
def test_missing_keys_of_a_layer_that_does_not_share_are_named(
    change: Change, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.k_"):
        load_model(parity.copy(NAME, "config.json", tmp_path, change))
