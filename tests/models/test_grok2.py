"""Grok 2.5 against the arithmetic of tests/fixtures/make_grok2_golden.py, and the slices that it is published in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sliced_grok2
from safetensors.numpy import load_file, save_file
from sliced_grok2 import name_of

import parity
from mlxarch.blocks import geglu, swiglu
from mlxarch.errors import CheckpointError, ConfigError, UnsupportedArchitecture
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.models import grok2
from mlxarch.quantize import convert
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like

CASE = Case(
    {
        "rms_norm_eps": config(rms_norm_eps=1e-5),
        "rope_theta": config(rope_theta=10_000.0),
        "attn_logit_softcapping": config(attn_logit_softcapping=30.0),
        "router_logit_softcapping": config(router_logit_softcapping=30.0),
        "final_logit_softcapping": config(final_logit_softcapping=50.0),
        "attn_temperature_len": config(attn_temperature_len=15),
        "embedding_multiplier_scale": config(embedding_multiplier_scale=3.0),
        "output_multiplier_scale": config(output_multiplier_scale=0.5),
        "num_experts_per_tok": config(num_experts_per_tok=3),
        "dense branch": weight("*.mlp.down_proj.weight", ZEROS),
        "experts": weight("*.w2.weight", ZEROS),
        "router": weight("*.block_sparse_moe.gate.weight", ZEROS),
        "last norm": weight("model.norm.weight", ONES),
    }
    | {
        f"{at} norm": weight(f"*.{at}_norm.weight", ONES)
        for at in ("pre_attn", "post_attn", "pre_moe", "post_moe")
    }
)


def test_grok2_matches_its_reference(tmp_path: Path) -> None:
    found = parity.differences("grok2", "config.json", tmp_path)
    assert found.largest <= CASE.tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize("option", CASE.options)
def test_every_option_of_grok2_shows_in_the_logits(option: str, tmp_path: Path) -> None:
    assert (
        parity.effect("grok2", "config.json", CASE.options[option], tmp_path) >= 3 * CASE.tolerance
    )


def temperature_before_the_cap(
    self: Any, q: mx.array, k: mx.array, v: mx.array, mask: Any, context: Any
) -> mx.array:
    grown = mx.log(mx.maximum(context.positions, self.length)) / mx.log(mx.array(self.length))
    return grok2.Attention.attend(self, q * grown[:, None], k, v, mask, context)


def renormalised(self: Any, x: mx.array) -> tuple[mx.array, mx.array]:
    chosen, weights = grok2.SoftmaxTopK.__call__(self, x)
    return chosen, weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("geglu", geglu),  # the tanh approximation
        ("geglu", swiglu),
        ("TemperedAttention.attend", temperature_before_the_cap),
        ("CappedRouter.__call__", renormalised),
        ("DecoderLayer.feed_forward", lambda self, x: self.mlp(x) + self.block_sparse_moe(x)),
    ],
)
def test_what_others_take_grok2_for_shows_in_the_logits(
    name: str, instead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"mlxarch.models.grok2.{name}", instead)
    change: parity.Change = lambda found, weights: None  # noqa: E731
    assert parity.effect("grok2", "config.json", change, tmp_path) >= 3 * CASE.tolerance


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"residual_moe": False}, "residual_moe"),
        ({"rope_type": "yarn"}, "rope_type"),
        ({"sliding_window_size": 4096}, "sliding_window_size"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"attn_temperature_len": 1}, "attn_temperature_len"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "grok2" / "config.json").read_text())
    architecture(published).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings)


@pytest.mark.parametrize("classes", [None, [], ["GitForCausalLM"], [5], "Grok1ForCausalLM"])
def test_another_architecture_of_the_same_kind_is_not_taken_for_grok2(classes: Any) -> None:
    published = json.loads((parity.GOLDEN / "grok2" / "config.json").read_text())
    with pytest.raises(UnsupportedArchitecture, match="git"):
        architecture(published | {"architectures": classes})


# The published layout


@pytest.fixture
def sliced(tmp_path: Path) -> Path:
    return sliced_grok2.make(tmp_path / "sliced")


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder, dtype="float32")
    return np.array(model(mx.array(parity.reference("grok2")["input_ids"])))


def test_slices_give_the_model_that_they_were_cut_from(sliced: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert np.array_equal(
        logits(sliced), logits(parity.copy("grok2", "config.json", tmp_path / "merged"))
    )


@pytest.mark.parametrize("bits", [4, None])
def test_a_quantizer_reads_slices_as_it_reads_the_whole(
    bits: int | None, sliced: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    whole = parity.copy("grok2", "config.json", tmp_path / "merged")
    for source, output in ((whole, "of the whole"), (sliced, "of slices")):
        convert(source, tmp_path / output, bits=bits, group_size=32, method="round")
    files = [tmp_path / output / "model.safetensors" for output in ("of the whole", "of slices")]
    assert files[0].read_bytes() == files[1].read_bytes()


def without(number: int, rank: int | None) -> Callable[[Path], None]:
    return lambda folder: (folder / name_of(number, rank)).unlink()


def rewritten(
    number: int, rank: int | None, change: Callable[[dict[str, np.ndarray]], dict]
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name_of(number, rank)
        save_file(change(load_file(path)), path)

    return write


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(4, 2), ["1 weight files", name_of(4, 2)]),
        (without(4, 0), [name_of(4, 0)]),
        (without(6, 3), [name_of(6, 3)]),
        (without(2, None), ["pytorch_model-00002-TP-*"]),
        (without(9, None), ["missing", "block_sparse_moe.gate.weight"]),
        (lambda folder: [without(n, 3)(folder) for n in (4, 5, 6)], ["shape", "switch_mlp"]),
        (
            lambda folder: (folder / name_of(3, None)).rename(folder / name_of(3, 0)),
            [name_of(3, 1), name_of(3, 3)],
        ),
        (
            lambda folder: save_file({"a": np.ones(1)}, folder / name_of(4, None)),
            ["either", name_of(4, 0)],
        ),
        (
            rewritten(4, 3, lambda w: {k: v for k, v in w.items() if k != EXPERT}),
            [name_of(4, 3), EXPERT],
        ),
        (rewritten(4, 1, lambda w: w | {EXPERT: w[EXPERT][:2]}), ["w1", "different shapes"]),
        (
            rewritten(5, 1, lambda w: w | {EXPERT.replace("w1", "w2"): np.ones(3, np.float16)}),
            ["different shapes"],
        ),
        (
            rewritten(0, None, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]}),
            ["lm_head", "too"],
        ),
    ],
)
def test_slices_that_do_not_fit_together_are_named(
    damage: Callable[[Path], None], words: list[str], sliced: Path
) -> None:
    damage(sliced)
    with pytest.raises(CheckpointError) as refusal:
        load_model(sliced)
    for word in words:
        assert word in str(refusal.value)


def test_files_of_other_names_are_left_alone(
    sliced: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = logits(sliced)
    for name in (
        "pytorch_model-00004-TP-0000.safetensors",
        "pytorch_model-4-TP-001.safetensors",
        "x.safetensors",
    ):
        (sliced / name).write_bytes(b"not read")
    assert np.array_equal(logits(sliced), before)
    assert "x.safetensors" in caplog.text and "no slice" in caplog.text


def test_a_whole_file_beside_slices_is_the_one_that_counts(
    sliced: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": np.ones(1, np.float32)}, sliced / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: a"):
        load_model(sliced)
    assert name_of(0, None) in caplog.text
