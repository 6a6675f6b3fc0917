"""Slices of Gemma 3n: the same numbers as a model built small, whichever way a slice is made."""

import hashlib
import json
import re
import tomllib
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import mlxarch
import parity
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.source import CheckpointSource, open_checkpoint
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.loading.load import load_model
from mlxarch.loading.matformer import Slice, format_ranges, names, parse_layers, slice_source
from mlxarch.loading.registry import architecture
from mlxarch.quantize import convert

CONFIGS = Path(mlxarch.__file__).parent / "hub" / "configs"
SLICES_FILE = Path(mlxarch.__file__).parent / "loading" / "slices.toml"
BILLIONS = {entry["billions"] for entry in tomllib.loads(SLICES_FILE.read_text()).values()} | {3.98}
NAME = "gemma3n_text"
REFERENCE = load_file(parity.GOLDEN.parent / "gemma3n_slices.safetensors")
TOLERANCE = 3e-4
SLICES = {  # as tests/fixtures/make_slice_golden.py lists them
    "narrow": Slice((4,)),
    "mixed": Slice((3, 16, 1, 8, 5)),
    "without a sharing layer": Slice(skip=(3,)),
    "without a layer of its own": Slice((8,), (0,)),
    "both": Slice((16, 8, 2), (0, 3)),
    "no layer shares": Slice(skip=(3, 4)),
}
IDS = mx.array(parity.reference(NAME)["input_ids"])


def logits(folder: Path, cut: Slice | None = None) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32", slice=cut)[0](IDS))


def digest(model: Any) -> str:
    """Hash of all weights and their names."""
    sums = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(model.parameters())).items()):
        sums.update(
            f"{name} {value.shape} {value.dtype}".encode()
            + np.array(value.view(mx.uint8)).tobytes()
        )
    return sums.hexdigest()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return parity.copy(NAME, "config.json", tmp_path)


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_what_transformers_computes_with_the_sliced_weights(
    name: str, golden: Path
) -> None:
    found = logits(golden, SLICES[name])
    assert np.abs(found - REFERENCE[name]).max() <= TOLERANCE
    others = [REFERENCE[other] for other in SLICES if other != name]
    assert (
        min(np.abs(found - other).max() for other in others) >= 30 * TOLERANCE
    )  # no other slice would pass


@pytest.mark.parametrize("dialect", parity.DIALECTS)
def test_both_dialects_and_the_wrapper_slice_alike(dialect: str, tmp_path: Path) -> None:
    def wrapped(found: dict[str, Any], weights: parity.Weights) -> None:
        for name in list(weights):
            weights[name.replace("model.", "model.language_model.", 1)] = weights.pop(name)
        weights["model.vision_tower.layers.0.mlp.down_proj.weight"] = np.ones((3, 3), np.float32)
        text = dict(found)
        found.clear()
        found.update({"model_type": "gemma3n", "text_config": text})

    folder = parity.copy(NAME, dialect, tmp_path, wrapped)
    assert np.abs(logits(folder, SLICES["both"]) - REFERENCE["both"]).max() <= TOLERANCE


# Quantized ---------------------------------------------------------------------------------------------------------

LAYERS, WIDE, FEATURES = (
    8,
    256,
    128,
)  # features of a feed-forward, and of a layer in the per-layer embeddings
CUT = Slice((256, 128, 128, 256, 128, 128), (2, 6))
MODES = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", 4),
    ("mxfp8", 8),
    ("nvfp4", 4),
    ("float", None),
]


def rows_and_columns(name: str, w: np.ndarray, kept: list[int]) -> np.ndarray:
    """One array of the small model, cut by hand; one of a packed matrix has fewer columns in the same proportion."""
    part = name.split(".")[-2]
    if part == "embed_tokens_per_layer":
        return np.concatenate([np.split(w, LAYERS, axis=1)[i] for i in kept], axis=1)
    if part == "per_layer_model_projection":
        return np.concatenate([np.split(w, LAYERS)[i] for i in kept])
    if ".mlp." in name:
        width = CUT.ffn[kept.index(int(name.split(".")[2]))]
        return w[:, : w.shape[1] * width // WIDE] if part == "down_proj" else w[:width]
    return w


def cut_by_hand(whole: Path, small: Path) -> Path:
    """The small model, made of the arrays of the whole one."""
    kept = [i for i in range(LAYERS) if i not in CUT.skip]

    def renumbered(name: str) -> str | None:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        if not found:
            return name
        layer = int(found[1])
        return (
            None if layer in CUT.skip else f"model.layers.{kept.index(layer)}.{name[found.end() :]}"
        )

    arrays = {}
    for name, w in load_file(whole / "model.safetensors").items():
        if new := renumbered(name):
            arrays[new] = np.ascontiguousarray(rows_and_columns(name, w, kept))
    config = json.loads((whole / "config.json").read_text()) | {
        **{
            "num_hidden_layers": len(kept),
            "num_kv_shared_layers": 1,
            "intermediate_size": list(CUT.ffn),
        },
    }
    for key in ("layer_types", "activation_sparsity_pattern"):
        config[key] = [config[key][i] for i in kept]
    for key in ("quantization", "quantization_config"):
        if key in config:
            config[key] = {
                new: value for path, value in config[key].items() if (new := renumbered(f"{path}."))
            }
            config[key] = {path.rstrip("."): value for path, value in config[key].items()}
    return write(small, config, arrays)


def random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = dict(tree_flatten(architecture(config).build().parameters()))
    return {
        name: rng.normal(0, 0.2, value.shape).astype(np.float32) for name, value in shapes.items()
    }


def write(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def golden_config() -> dict[str, Any]:
    return json.loads((parity.GOLDEN / NAME / "config.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with random weights."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = golden_config() | {
        **{
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": 2,
            "layer_types": [*kinds, *kinds[1:3]],
        },
        **{"intermediate_size": WIDE, "hidden_size_per_layer_input": FEATURES, "hidden_size": 64},
        **{
            "activation_sparsity_pattern": [0.5, 0.75, 0.9, 0.0, 0.0, 0.5, 0.0, 0.0],
            "laurel_rank": 32,
        },
    }
    return write(tmp_path_factory.mktemp("gemma3n") / "whole", config, random_weights(config))


@pytest.mark.parametrize(("mode", "bits"), MODES, ids=[f"{mode}-{bits}" for mode, bits in MODES])
def test_slice_at_load_slice_written_and_built_small_are_equal(
    mode: str, bits: int | None, folder: Path, tmp_path: Path
) -> None:
    group = 64 if mode == "affine" else None
    settings: dict[str, Any] = {"bits": bits, "method": "round"} | (
        {"mode": mode, "group_size": group} if bits else {}
    )
    whole = tmp_path / "whole"
    convert(folder, whole, **settings)
    small = cut_by_hand(whole, tmp_path / "small")
    convert(slice_source(open_checkpoint(whole), CUT), tmp_path / "written", bits=None)
    at_load, _ = load_model(whole, slice=CUT)
    written, config = load_model(tmp_path / "written")
    built, wanted = load_model(small)
    assert digest(at_load) == digest(written) == digest(built)
    first, second, third = (np.array(model(IDS)) for model in (at_load, written, built))
    assert first.tobytes() == second.tobytes() == third.tobytes()
    keys = (
        "num_hidden_layers",
        "num_kv_shared_layers",
        "intermediate_size",
        "layer_types",
        "quantization",
    )
    assert {key: config.get(key) for key in keys} == {key: wanted.get(key) for key in keys}
    other = replace(CUT, skip=(3, 6))
    assert digest(load_model(whole, slice=other)[0]) != digest(built)


def test_nothing_of_the_whole_is_held(folder: Path) -> None:
    """A view into a larger array would hold all of it."""
    model, _ = load_model(folder, slice=CUT)
    mx.clear_cache()
    held = sum(value.nbytes for value in dict(tree_flatten(model.parameters())).values())
    before = mx.get_active_memory()
    del model
    freed = before - mx.get_active_memory()
    assert held <= freed <= 1.05 * held


def test_settings_of_single_matrices_move_with_their_layers(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "whole", bits=4, group_size=32, method="round")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] |= {
            f"model.layers.{i}.mlp.up_proj": {"bits": 4, "group_size": 32, "layer": i}
            for i in (1, 2, 3)
        }
    source = replace(open_checkpoint(tmp_path / "whole"), config=config)
    section = slice_source(source, Slice(skip=(2,))).config["quantization"]
    assert {k: v["layer"] for k, v in section.items() if "up_proj" in k} == {
        "model.layers.1.mlp.up_proj": 1,
        "model.layers.2.mlp.up_proj": 3,
    }


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (
            Slice((100,)),
            "layers.0.mlp.down_proj.weight is quantized in groups of 64 columns.* at 64 or 128, not at 100",
        ),
        (
            Slice((128, 256, 32, *[256] * 5)),
            "layers.2.mlp.down_proj.weight.* at 0 or 64, not at 32",
        ),
    ],
)
def test_a_cut_through_a_group_is_refused_with_widths_that_would_do(
    cut: Slice, said: str, folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "whole", bits=4, group_size=64, method="round")
    with pytest.raises(InvalidInput, match=said):
        slice_source(open_checkpoint(tmp_path / "whole"), cut)
    slice_source(open_checkpoint(folder), cut)  # floats have no groups


def test_a_layer_whose_embeddings_share_a_group_with_the_next_stays(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = golden_config() | {
        **{
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 1,
            "layer_types": kinds,
            "intermediate_size": 8,
        },
        **{"activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16},
    }
    convert(
        write(tmp_path / "whole", config, random_weights(config)),
        tmp_path / "packed",
        bits=8,
        group_size=32,
        method="round",
    )
    source = open_checkpoint(tmp_path / "packed")
    with pytest.raises(
        InvalidInput, match=r"embed_tokens_per_layer.* groups of 32 .* at 0 or 32, not at 16"
    ):
        slice_source(source, Slice(skip=(0,)))
    with pytest.raises(InvalidInput, match="layer 1 cannot be left out"):
        slice_source(source, Slice(skip=(0, 1)))
    slice_source(open_checkpoint(tmp_path / "whole"), Slice(skip=(0,)))


# What is published --------------------------------------------------------------------------------------------------


def published(size: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"gemma3n-{size}.json").read_text())


class Unread(LazyTensor):
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, mx.bfloat16

    def read_rows(self, start: int, stop: int) -> mx.array:
        raise AssertionError("a slice is decided on without reading")


def virtual(config: dict[str, Any]) -> CheckpointSource:
    """A source of the right shapes, whose tensors cannot be read."""
    found = architecture(config)
    shapes = dict(tree_flatten(found.build().parameters()))
    return CheckpointSource(
        config, {found.published_name(name): Unread(value.shape) for name, value in shapes.items()}
    )


def effective(source: CheckpointSource) -> float:
    """Billions of parameters that stay in memory, as the publisher counts: keys and values of sharing layers too."""
    text = source.config["text_config"]
    sharing = (
        text["num_kv_shared_layers"]
        * 2
        * text["num_key_value_heads"]
        * text["head_dim"]
        * text["hidden_size"]
    )
    others = {
        name: tensor for name, tensor in source.tensors.items() if ".embed_tokens" not in name
    }
    return (sum(prod(tensor.shape) for tensor in others.values()) + sharing) / 1e9


def test_e2b_of_e4b_is_the_e2b_that_is_published_by_itself() -> None:
    found, wanted = slice_source(virtual(published("e4b")), "E2B"), virtual(published("e2b"))
    assert found.config == wanted.config
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: t.shape for n, t in wanted.tensors.items()
    }
    assert slice_source(virtual(published("e4b")), "e1.96b").config != wanted.config


@pytest.mark.parametrize("name", names())
def test_a_published_slice_has_as_many_parameters_as_its_publisher_counts(name: str) -> None:
    billions = tomllib.loads(SLICES_FILE.read_text())[name]["billions"]
    found = effective(slice_source(virtual(published("e4b")), name))
    assert abs(found - billions) <= 0.021
    assert abs(found - billions) < min(abs(found - other) for other in BILLIONS - {billions})


def test_published_slices_are_named_smallest_first() -> None:
    assert (
        names()[0] == "e2b"
        and "e2.98b" in names()
        and "e2.98b-block" in names()
        and len(names()) == 15
    )


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("e2c", "no published slice is called 'e2c'; there are e2b, e1.96b"),
        ("e2b", "is a slice of Gemma 3n E4B, whose 35 layers .* this model has 5 layers"),
        (Slice((8, 8)), "5 layers stay, and 2 widths are given"),
        (Slice((9,)), "feed-forward of layer 0 has 8 features; found a width of 9"),
        (Slice((0,)), "found a width of 0"),
        (Slice(skip=(5,)), "layers to leave out must lie in 0 … 4; found 5"),
        (
            Slice(skip=(1,)),
            "layer 1 cannot be left out: .* from 3 on of its kind, sliding_attention",
        ),
        (Slice(skip=(2,)), "layer 2 cannot be left out: .* full_attention"),
        (Slice(skip=(0, 1, 2, 3, 4)), "no layer would be left"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(cut: str | Slice, said: str, golden: Path) -> None:
    with pytest.raises(InvalidInput, match=said):
        load_model(golden, slice=cut)


def test_a_layer_that_gives_keys_to_none_that_stays_may_go(golden: Path) -> None:
    load_model(golden, slice=Slice(skip=(1, 3)))  # 3 alone took its keys from 1
    load_model(golden, slice=Slice(skip=(1, 2, 3, 4)))


def test_only_gemma3n_is_sliced_and_only_a_sound_one(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match="only Gemma 3n is made to be sliced, and this is a llama3"
    ):
        slice_source(open_checkpoint(parity.GOLDEN / "llama3_tied"), Slice((8,)))
    source = open_checkpoint(golden)
    tensors = {
        **source.tensors,
        "model.layers.0.mlp.gate_proj.weight": source.tensors["model.norm.weight"],
    }
    with pytest.raises(CheckpointError, match="gate_proj"):
        slice_source(replace(source, tensors=tensors), Slice((4,)))


def test_layers_are_written_as_numbers_and_ranges() -> None:
    assert parse_layers("3, 20-24") == (3, 20, 21, 22, 23, 24) and parse_layers("") == ()
    assert format_ranges((3, 20, 21, 22, 24, 25)) == "3,20-22,24-25"
    for text in ("3-", "a", "1--2", "-1", "1;2", "5-2"):
        with pytest.raises(InvalidInput, match="numbers and ranges"):
            parse_layers(text)


def test_what_was_made_of_it_is_said(golden: Path) -> None:
    assert slice_source(open_checkpoint(golden), SLICES["both"]).notes == (
        "a slice of 3 of 5 layers, without 0,3; features of the feed-forwards: 2 in 1 layers, 8 in 1, 16 in 1",
    )
