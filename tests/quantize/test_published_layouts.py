"""A tiny checkpoint of each architecture in its published layout, through all that conversion offers and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from house import THOROUGH

import parity
from mlxarch.checkpoint.packed_experts import MANIFEST_FILE
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model, open_resolved
from mlxarch.loading.matformer import Slice, slice_source
from mlxarch.quantize import Recipe, Target, by_recipe, convert, prepare, toward
from mlxarch.quantize.calibration import calibration, sensitivity
from mlxarch.quantize.calibration.texts import Text
from mlxarch.quantize.mixed_precision import expected_kl
from mlxarch.quantize.repack.pack_experts import pack
from mlxarch.quantize.schedule import Method
from mlxarch.ssd_streaming.attach import experts_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "of", "and", "river", "stone", "under", "quick", "house", "summer", "walk")
GROUP = 32


def in_front(prefix: str, model_type: str) -> parity.Change:
    """Make a text model part of a larger one: its tensors get a prefix, its config a section."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)
        weights["vision_tower.patch_conv.weight"] = np.ones((2, 2), np.float32)
        text = dict(found)
        found.clear()
        found.update(model_type=model_type, text_config=text, vision_config={})

    return change


def gemma3n(found: dict[str, Any], weights: parity.Weights) -> None:
    """As google/gemma-3n-E4B-it: layers that share keys and values have projections all the same."""
    first = found["num_hidden_layers"] - found["num_kv_shared_layers"]
    for layer in range(first, found["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            own = weights[f"model.layers.0.self_attn.{part}.weight"]
            weights[f"model.layers.{layer}.self_attn.{part}.weight"] = own[::-1].copy()
    in_front("", "gemma3n")(found, weights)
    for name in list(weights):
        weights[name.replace("model.", "model.language_model.", 1)] = weights.pop(name)


LAYOUTS: dict[str, parity.Change] = {
    "gemma3n_text": gemma3n,
    "llama4_scout": in_front("language_model.", "llama4"),
    "ministral3": in_front("language_model.", "mistral3"),
}
FOLDERS = [folder for folder in sorted(parity.GOLDEN.iterdir()) if (folder / "meta.json").exists()]
TYPES = {json.loads((f / "config.json").read_text())["model_type"]: f.name for f in FOLDERS[::-1]}
# an indexer or a router that chooses otherwise moves logits more than rounding itself
CHOOSING = {"deepseek_v32", "glm_moe_dsa", "qwen4_exp"}
NAMES = sorted({folder.name for folder in FOLDERS} if THOROUGH else {*TYPES.values(), *LAYOUTS})


def make(name: str, folder: Path) -> Path:
    """Copy a checkpoint in its published layout, with a tokenizer of letters."""
    source = parity.copy(name, "config.json", folder, LAYOUTS.get(name))
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, "Ġ", "Ċ"], 8)}
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


def text() -> Text:
    drawn = np.random.default_rng(0).choice(WORDS, 200)
    return Text("words", " ".join(drawn))


def logits(folder: Path, name: str) -> np.ndarray:
    model, _ = load_model(folder, dtype="float32")
    return np.array(model(mx.array(parity.reference(name)["input_ids"])))


def distance(folder: Path, name: str, wanted: np.ndarray) -> float:
    return float(np.abs(logits(folder, name) - wanted).max())


def typical_distance(folder: Path, name: str, wanted: np.ndarray | None = None) -> float:
    """Median difference from the source's logits: other experts change those of some tokens most."""
    wanted = parity.reference(name)["logits"] if wanted is None else wanted
    return float(np.median(np.abs(logits(folder, name) - wanted)))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate with few tokens: the numbers need not be good, only right."""
    monkeypatch.setattr(calibration, "MIN_TOKENS", 128)
    monkeypatch.setattr(calibration, "MAX_TOKENS", 256)
    monkeypatch.setattr(calibration, "METHOD_BUDGET", {})
    monkeypatch.setattr(expected_kl, "TOKENS", 128)
    monkeypatch.setattr(sensitivity, "SAMPLED_ROWS", 8)
    monkeypatch.setattr(sensitivity, "SAMPLED_ROWS_OUTSIDE_LAYERS", 16)


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_quantizing_ends_in_a_model_near_its_source(name: str, tmp_path: Path) -> None:
    source, texts = make(name, tmp_path), [text()]
    ends = [prepare(source, bits=bits, group_size=GROUP, method="round") for bits in (2, 8)]
    limit = sum(conversion.disk_bytes for conversion in ends) // 2
    target = Target(size=limit)
    tied = by_recipe(
        prepare(source, tmp_path / "recipe", method="round"), Recipe.read("tied"), GROUP
    )
    ways: dict[str, Callable[[], Any]] = {
        "gptq": lambda: prepare(
            source, tmp_path / "gptq", bits=8, group_size=GROUP, method="gptq", texts=texts
        ).run(evaluate=True),
        "target": lambda: toward(
            prepare(source, tmp_path / "target", group_size=GROUP, method=method, texts=texts),
            target,
        ).run(),
        "recipe": tied.run,
    }
    method: Method = "search" if name in LAYOUTS else "round"
    found = {}
    for way, run in ways.items():
        assert run().quantized > 0
        found[way] = typical_distance(tmp_path / way, name)
    limit_of_8_bits = 0.6 if name in CHOOSING else 0.3
    assert 0 < found["gptq"] < limit_of_8_bits and found["gptq"] < found["recipe"] < 2.5
    size = sum(file.stat().st_size for file in (tmp_path / "target").iterdir())
    assert size <= limit * 1.001  # the list of bits in config.json is not planned
    receipt = json.loads((tmp_path / "gptq" / "receipt.json").read_text())
    assert receipt["evaluation"], receipt["not_evaluated"]


@pytest.mark.parametrize("name", sorted({*NAMES, "nemotron_h_moe"}))  # whose experts have no gate
def test_packed_experts_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    with open_resolved(source) as resolved:
        if not experts_of(resolved.model):
            return
    convert(source, tmp_path / "stacked", bits=8, group_size=GROUP, method="round")
    wanted = logits(tmp_path / "stacked", name)
    pack(tmp_path / "stacked", tmp_path / "packed")
    assert (tmp_path / "packed" / MANIFEST_FILE).is_file()
    assert distance(tmp_path / "packed", name, wanted) == 0
    convert(tmp_path / "packed", tmp_path / "back", bits=None)
    before, after = (open_checkpoint(tmp_path / f).tensors for f in ("stacked", "back"))
    assert before.keys() == after.keys()
    assert distance(tmp_path / "back", name, wanted) == 0


def test_a_slice_of_the_published_layout_is_quantized_as_the_whole_is(tmp_path: Path) -> None:
    source = make("gemma3n_text", tmp_path)
    wanted = Slice((8,), ())
    prepare(slice_source(open_checkpoint(source), wanted), tmp_path / "slice", bits=None).run()
    exact = logits(tmp_path / "slice", "gemma3n_text")
    convert(tmp_path / "slice", tmp_path / "out", bits=8, group_size=GROUP)
    assert 0 < typical_distance(tmp_path / "out", "gemma3n_text", exact) < 0.5
