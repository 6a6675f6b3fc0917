"""Recipes: bits by the names of matrices, those that come with the package, and which is meant for which model."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

import parity
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import QuantizationError
from mlxarch.hub import catalog
from mlxarch.loading import registry
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import Recipe, by_recipe, prepare
from mlxarch.quantize.mixed_precision.recipes import bundled_recipes

MEANT = {  # a golden checkpoint of each architecture, and the bits of some of its matrices, by the ends of their names
    "llama3": (
        "dense",
        {"q_proj": 4, "k_proj": 5, "v_proj": 6, "down_proj": 5, "embed_tokens": 4, "lm_head": 6},
    ),
    "llama3_tied": ("tied", {"v_proj": 6, "up_proj": 4, "embed_tokens": 6}),
    "ministral3": ("dense", {"k_proj": 5, "gate_proj": 4, "lm_head": 6}),
    "olmo2": ("dense", {"down_proj": 5, "lm_head": 6}),
    "qwen3": ("tied", {"down_proj": 5, "embed_tokens": 6}),
    "smollm3_window": ("dense", {"down_proj": 5, "lm_head": 6}),
    "gpt2": ("tied", {"c_attn": 5, "attn.c_proj": 4, "mlp.c_proj": 5, "wte": 6, "wpe": 8}),
    "gemma2": ("gemma", {"q_proj": 4, "up_proj": 5, "embed_tokens": 6}),
    "gemma3": ("gemma", {"o_proj": 4, "down_proj": 5, "embed_tokens": 6}),
    "gemma3n_text": (
        "gemma",
        {"embed_tokens": 6, "embed_tokens_per_layer": 4, "linear_left": 8, "input_gate": 8},
    ),
    "deepseek_v2": (
        "experts",
        {"switch_mlp.down_proj": 4, "shared_experts.up_proj": 8, "kv_b_proj": 8},
    ),
    "deepseek_v3": (
        "experts",
        {"switch_mlp.up_proj": 4, "embed_q": 8, "o_proj": 8, "embed_tokens": 6},
    ),
    "glm4_moe": (
        "experts",
        {"switch_mlp.gate_proj": 4, "shared_experts.gate_proj": 8, "lm_head": 8},
    ),
    "grok2": ("experts", {"switch_mlp.gate_proj": 4, "layers.0.mlp.gate_proj": 8}),
    "kimi_k2": ("experts", {"switch_mlp.down_proj": 4, "q_a_proj": 8}),
    "llama4_scout": (
        "experts",
        {"experts.down_proj": 4, "shared_expert.down_proj": 8, "v_proj": 8},
    ),
    "qwen3_moe": ("experts", {"switch_mlp.down_proj": 4, "q_proj": 8, "embed_tokens": 6}),
    "gpt_oss": ("gpt-oss", {"q_proj": 8, "embed_tokens": 8}),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_recipe_meant_for_an_architecture_gives_its_matrices_their_bits(name: str) -> None:
    (recipe, expected), resolved = MEANT[name], resolve(open_checkpoint(parity.GOLDEN / name))
    found = Recipe.for_architecture(resolved.architecture)
    assert found.name == recipe
    matrices = [path.removesuffix(".weight") for path in resolved.published_matrices]
    for end, bits in expected.items():
        ends = [path for path in matrices if path.endswith(end)]
        assert ends and {found.bits_for(path) for path in ends} == {bits}, end
    used = {next((p for p, _ in found.patterns if fnmatchcase(path, p)), None) for path in matrices}
    assert len(used) > 1, "some pattern fits, and the rest is common"


OTHERS = {
    "cohere2": "tied",
    "apertus": "dense",
    "seed_oss": "dense",
    "nemotron_h_moe": "experts",
    "lfm2_moe": "experts",
    "qwen3_5_moe": "experts",
    "minimax_m2": "experts",
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_without_a_recipe_of_its_own_takes_that_of_its_kind(name: str) -> None:
    resolved = resolve(open_checkpoint(parity.GOLDEN / name))
    recipe = Recipe.for_architecture(resolved.architecture)
    assert recipe.name == OTHERS[name]
    matrices = [path.removesuffix(".weight") for path in resolved.published_matrices]
    bits = {path: recipe.bits_for(path) for path in matrices}
    assert len(set(bits.values())) > 1
    experts = {bits[path] for path in matrices if ".switch_mlp." in path or ".experts." in path}
    assert experts == ({4} if recipe.name == "experts" else set())


def test_every_architecture_and_every_model_of_the_catalog_has_one() -> None:
    found = {
        name: Recipe.for_architecture(
            registry.architecture(json.loads(entry.config_path.read_text()))
        ).name
        for name, entry in catalog.entries().items()
    }
    assert set(found.values()) == set(bundled_recipes()), "each is meant for somebody"
    for name, entry in catalog.entries().items():
        if found[name] != "gemma":  # whose recipe is meant for its mixtures as well
            for_experts = found[name] in ("experts", "gpt-oss")
            assert for_experts is (entry.active is not None), name
    assert (found["llama3.1-8b"], found["llama3.2-1b"]) == ("dense", "tied")
    assert (found["gemma3-27b"], found["qwen3-30b-a3b"], found["gpt-oss-20b"]) == (
        "gemma",
        "experts",
        "gpt-oss",
    )


@pytest.mark.parametrize(
    "name",
    ["llama3", "llama3_tied", "gemma3", "gemma3n_text", "qwen3_moe", "deepseek_v3", "gpt_oss"],
)
def test_config_json_names_what_differs_as_every_reader_of_mlx_models_looks_it_up(
    name: str, tmp_path: Path
) -> None:
    """A reader packs a module if it finds its scales, by the settings under the module's name, else by the common."""
    conversion = prepare(parity.GOLDEN / name, tmp_path / "out", method="round")
    by_recipe(conversion, Recipe.for_architecture(conversion.resolved.architecture), 32).run()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section, bits = config["quantization"], set()
    with safe_open(tmp_path / "out" / "model.safetensors", "mlx") as file:
        names = set(file.keys())
        shapes = {key: file.get_slice(key).get_shape() for key in names}
    for module in (key.removesuffix(".scales") for key in names if key.endswith(".scales")):
        own = section.get(module, section)
        assert (
            shapes[f"{module}.weight"][-1] * 32 // own["bits"]
            == shapes[f"{module}.scales"][-1] * own["group_size"]
        )
        bits.add(own["bits"])
    assert len(bits) > 1
    assert all(
        f"{key}.weight" in names for key, value in section.items() if isinstance(value, dict | bool)
    )
    model, _ = load_model(tmp_path / "out")
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_a_recipe_gives_bits_by_name(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'bits = 4\ngroup_size = 32\n[matrices]\n"*.v_proj" = 8\n"*embed_tokens" = 6\n"*.value" = 8\n'
    )
    conversion = prepare(parity.GOLDEN / "llama3", tmp_path / "out", bits=4, group_size=32)
    mixed = by_recipe(conversion, Recipe.read(str(path)))
    assert mixed.layout.notes[0] == "bits by the recipe own; no matrix is called *.value"
    assert by_recipe(conversion, Recipe.read("gemma")).layout.notes[0] == "bits by the recipe gemma"
    bits = {
        p: entry.quantization.bits
        for p, entry in mixed.layout.entries.items()
        if entry.quantization
    }
    assert {b for p, b in bits.items() if ".v_proj." in p} == {8}
    assert (
        bits["model.embed_tokens.weight"] == 6
        and bits["model.layers.0.self_attn.q_proj.weight"] == 4
    )
    mixed.run()
    model, config = load_model(tmp_path / "out")
    assert config["quantization"]["model.layers.0.self_attn.v_proj"]["bits"] == 8
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "bits = 4\nbit = 3",
            "matrices = 5\nbits = 4",
            "bits = 7",
            "[",
            'bits=4\n[matrices]\nx = "8"',
        ),
        *(
            "bits = 4.0",
            "bits = 4\ngroup_size = 32.0",
            "bits = 4\ntied = 1",
            'bits = 4\narchitectures = "llama3"',
        ),
    ],
)
def test_a_recipe_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(QuantizationError):
        Recipe.read(str(path))
    with pytest.raises(QuantizationError, match="neither a TOML file nor one of dense, experts"):
        Recipe.read("unheard-of")
