"""Structure of a model, checked against published counts, formulas and the files that are written."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from house import ROOT

from mlxarch.hub import catalog
from mlxarch.inspection.structure import (
    Structure,
    describe_pattern,
    format_parameters,
    structure_from_config,
)
from mlxarch.quantize import convert

CONFIGS = ROOT / "mlxarch" / "hub" / "configs"
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
# what the makers state: total and active
STATED = {
    "deepseek-v3": (671e9, 37e9),
    "deepseek-r1": (671e9, 37e9),
    "llama4-maverick": (400e9, 17e9),
    "llama4-scout": (108.6e9, 17e9),
    "qwen3-235b-a22b": (235e9, 22e9),
    "qwen3-30b-a3b": (30.5e9, 3e9),
    "kimi-k2": (1.026e12, 32e9),
    "glm4.5": (355e9, 32e9),
    "glm4.5-air": (106e9, 12e9),
    "gpt-oss-120b": (117e9, 5.1e9),
    "gpt-oss-20b": (20.9e9, 3.6e9),
    "grok2.5": (270e9, None),
    "gemma3-27b": (27e9, None),
    "mistral-small3.1-24b": (23.6e9, None),
    "smollm3-3b": (3.08e9, None),
    "olmo2-7b": (7.3e9, None),
    "qwen3-0.6b": (0.6e9, None),
}
EXPLAINED = {
    "llama4-maverick",
    "llama4-scout",
    "glm4.5-air",
}  # beside the table: see test_compare.py


def config(name: str, **changes: Any) -> dict[str, Any]:
    found = json.loads((CONFIGS / f"{name}.json").read_text())
    if "text_config" in found:
        return found | {"text_config": found["text_config"] | changes}
    return found | changes


@cache
def look(name: str, **changes: Any) -> Structure:
    return structure_from_config(config(name, **changes))


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATED)
def test_the_counts_are_those_that_the_makers_state(name):
    found, (total, active) = look(name), STATED[name]
    assert abs(found.parameters / total - 1) < 0.01
    if active:
        assert abs(found.active_parameters / active - 1) < (0.07 if name in EXPLAINED else 0.05)
    else:
        assert found.active_parameters <= found.parameters


@pytest.mark.parametrize("entry", catalog.entries().values(), ids=lambda entry: entry.name)
def test_the_catalog_says_what_the_models_are(entry):
    found = structure_from_config(json.loads(entry.config_path.read_text()))
    assert (entry.layers, entry.parameters, entry.context) == (
        found.layers,
        found.parameters,
        found.context,
    )
    assert entry.active == (found.active_parameters if found.experts != "no" else None)
    assert json.loads(entry.config_path.read_text())["model_type"] == entry.architecture
    if entry.published and not entry.outside:
        assert abs(found.parameters - entry.published) < 4000, (
            "exact, but for Kimi K2, which has 3416 numbers more"
        )
    elif entry.published:
        assert found.parameters < entry.published


def test_the_repositories_of_gemma_3_hold_the_text_model_and_the_tower_to_the_parameter():
    tower = 416_866_032  # SigLIP So400m without its head
    for name in ("gemma3-4b", "gemma3-12b", "gemma3-27b"):
        found = look(name)
        projector = 1152 * (found.hidden_size + 1)
        assert catalog.entries()[name].published == found.parameters + tower + projector


def test_the_repositories_of_glm_hold_the_text_model_and_one_more_layer_to_the_parameter():
    for name in ("glm4.5", "glm4.5-air"):
        found = look(name)
        layer = found.parameters - look(name, num_hidden_layers=found.layers - 1).parameters
        joins = (
            2 * found.hidden_size**2 + 3 * found.hidden_size
        )  # eh_proj, and the norms enorm, hnorm, shared_head
        assert catalog.entries()[name].published == (
            found.parameters + layer + joins + 2 * found.vocab_size * found.hidden_size
        )


def test_the_repository_of_deepseek_v3_holds_one_more_layer_and_scales_of_float8():
    found, published = look("deepseek-v3"), catalog.entries()["deepseek-v3"].published
    layer = found.parameters - look("deepseek-v3", num_hidden_layers=60).parameters
    joins = 2 * found.hidden_size**2 + 3 * found.hidden_size
    extra = found.parameters + layer + joins + 2 * found.vocab_size * found.hidden_size
    assert published is not None
    assert 0.95 < (published - extra) / ((found.parameters + layer) / 128**2) < 1.05


def test_active_counts_the_chosen_experts_only():
    eight, nine = look("qwen3-30b-a3b"), look("qwen3-30b-a3b", num_experts_per_tok=9)
    assert nine.parameters == eight.parameters
    assert nine.active_parameters - eight.active_parameters == 48 * 3 * 2048 * 768
    assert look("gpt-oss-20b", num_experts_per_tok=32).active_parameters == (
        look("gpt-oss-20b").parameters - 201_088 * 2880 + 2880
    ), "with all experts chosen, all is read but the table of the input embeddings"


def test_a_table_that_is_also_the_head_is_read_whole():
    tied, untied = look("qwen3-0.6b"), look("qwen3-0.6b", tie_word_embeddings=False)
    assert tied.active_parameters == tied.parameters
    table = 151_936 * 1024
    assert untied.parameters - tied.parameters == table
    assert untied.active_parameters == untied.parameters - table + 1024


def test_building_a_trillion_parameters_takes_no_memory():
    # Linux: the high-water mark of ru_maxrss is inherited from whoever starts the process
    code = (
        "import json, pathlib, resource, sys\nfrom mlxarch.inspection.structure import structure_from_config\n"
        "found = structure_from_config(json.load(open(sys.argv[1])))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20\n"
        "if sys.platform == 'linux':\n"
        "    peak = int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) >> 10\n"
        "print(found.parameters, peak)"
    )
    command = [sys.executable, "-c", code, str(CONFIGS / "kimi-k2.json")]
    parameters, megabytes = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert parameters > 10**12 and megabytes < 400


# Caches --------------------------------------------------------------------------------------------------------------


def test_caches_are_counted_with_windows_latents_and_sharing():
    plain, bits = 32_768, 2
    assert look("llama3.1-8b").kv_bytes_at_32k == 32 * 2 * 8 * 128 * bits * plain
    assert look("gpt-oss-20b").kv_bytes_at_32k == 2 * 8 * 64 * bits * (12 * plain + 12 * 128)
    assert look("gemma3-27b").kv_bytes_at_32k == 2 * 16 * 128 * bits * (10 * plain + 52 * 1024)
    assert look("llama4-scout").kv_bytes_at_32k == 2 * 8 * 128 * bits * (12 * plain + 36 * 8192)
    assert look("deepseek-v3").kv_bytes_at_32k == 61 * (512 + 64) * bits * plain
    assert look("gemma3n-e4b").kv_bytes_per_token == 20 * 2 * 2 * 256 * bits, (
        "15 of 35 layers have none of their own"
    )
    assert look("gpt2-xl").kv_bytes_at_32k == 48 * 2 * 1600 * bits * 1024, "as long as it can be"


def test_without_its_windows_gemma_would_hold_ten_times_as_much():
    full = look("gemma3-27b", sliding_window_pattern=1)
    assert full.windows == "full" and full.kv_bytes_at_32k > 5 * look("gemma3-27b").kv_bytes_at_32k
    assert full.kv_bytes_per_token == look("gemma3-27b").kv_bytes_per_token


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gemma3_text", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_as_large_as_the_quantizer_makes_them(name, bits, tmp_path):
    written = convert(GOLDEN / name, tmp_path / "out", bits=bits, dtype="bfloat16", method="round")
    found = structure_from_config(json.loads((GOLDEN / name / "config.json").read_text()))
    assert found.weight_bytes[bits] == written.output_bytes
    assert found.weight_bytes[16] == 2 * found.parameters > found.weight_bytes[bits]


# Descriptions ------------------------------------------------------------------------------------


def test_repeating_labels_are_described_once():
    assert describe_pattern(["a"] * 7) == "a"
    assert describe_pattern((["a"] * 5 + ["b"]) * 2 + ["a", "a"]) == "5 × a : 1 × b"
    assert describe_pattern(["a", "b", "b"]) == "1 × a : 2 × b"


def test_counts_have_three_digits():
    assert [
        format_parameters(n)
        for n in (134_515_008, 999_885_952, 8_030_261_248, 26_900_000_000, 670_999_999_999)
    ] == [*("135M", "1.00B", "8.03B", "26.9B", "671B")]
    assert format_parameters(1_026_408_232_448) == "1.03T"


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "llama3-8b",
            {
                "attention": "GQA",
                "kv_heads": 8,
                "norm_placement": "before",
                "qk_norm": "no",
                "windows": "full",
            },
        ),
        (
            "olmo2-7b",
            {"attention": "MHA", "norm_placement": "after", "qk_norm": "over the projection"},
        ),
        (
            "gemma3-1b",
            {
                "attention": "MQA",
                "norm_placement": "before and after",
                "windows": "5 × window 512 : 1 × full",
            },
        ),
        ("gemma3-27b", {"positions": "5 × RoPE 10k : 1 × RoPE 1M linear ×8", "tied": True}),
        ("gemma2-2b", {"windows": "1 × window 4096 : 1 × full", "score_modifiers": "soft cap 50"}),
        ("gpt2-xl", {"positions": "learned", "norm": "LayerNorm", "feed_forward": "GELU 6400"}),
        (
            "gpt-oss-20b",
            {
                "score_modifiers": "sinks",
                "experts": "4 of 32 × 2880",
                "positions": "RoPE 150k yarn ×32",
            },
        ),
        ("smollm3-3b", {"positions": "3 × RoPE 5M : 1 × NoPE", "windows": "full"}),
        ("llama4-scout", {"qk_norm": "per head, no weights", "experts": "1 of 16 × 8192 + 8192"}),
        (
            "llama4-maverick",
            {"qk_norm": "no", "experts": "1 of 128 × 8192 + 8192 in 24 of 48 layers"},
        ),
        (
            "deepseek-v3",
            {"attention": "MLA", "experts": "8 of 256 × 2048 + 2048 in 58 of 61 layers"},
        ),
        ("glm4.5", {"positions": "RoPE 1M, 64 of 128", "qk_norm": "per head"}),
        (
            "grok2.5",
            {
                "experts": "2 of 8 × 16384 + 32768",
                "score_modifiers": "soft cap 30",
                "norm_placement": "before and after",
            },
        ),
    ],
)
def test_what_stands_out_is_seen(name, facts):
    found = vars(look(name))
    assert {key: found[key] for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("llama3-8b", ["input_layernorm self_attn", "post_attention_layernorm mlp"]),
        ("olmo2-7b", ["self_attn post_attention_layernorm", "mlp post_feedforward_layernorm"]),
        ("gpt2-xl", ["ln_1 attn", "ln_2 mlp"]),
        (
            "gemma3-27b",
            [
                "input_layernorm self_attn post_attention_layernorm",
                "pre_feedforward_layernorm mlp post_feedforward_layernorm",
            ],
        ),
        (
            "grok2.5",
            [
                "pre_attn_norm self_attn post_attn_norm",
                "pre_moe_norm mlp|block_sparse_moe post_moe_norm",
            ],
        ),
    ],
)
def test_the_order_of_a_layer_is_the_one_in_which_it_computes(name, branches):
    found = look(name).blocks[0].branches
    assert [
        " ".join("|".join(part.name for part in stage) for stage in branch) for branch in found
    ] == branches


def test_layers_that_differ_are_kept_apart():
    many, first = look("deepseek-v3").blocks
    assert first.layers == (0, 1, 2) and len(many.layers) == 58
    assert (first.feed_forward.intermediate_size, first.feed_forward.num_experts) == (18_432, 0)
    assert (many.feed_forward.intermediate_size, many.feed_forward.shared_intermediate_size) == (
        2048,
        2048,
    )
    assert [block.layers[:3] for block in look("llama4-maverick").blocks] == [(1, 3, 5), (0, 2, 4)]


def test_every_config_that_is_shipped_belongs_to_an_entry():
    assert {path.stem for path in CONFIGS.iterdir()} == set(catalog.entries())
    assert all(
        isinstance(json.loads(Path(entry.config_path).read_text()), dict)
        for entry in catalog.entries().values()
    )
