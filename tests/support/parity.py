"""Parity with a reference implementation, the same for every architecture.

A folder of ``tests/fixtures/golden`` holds a tiny checkpoint and what the reference computes for it (the script beside
it makes them). An architecture's test file lists its folders with their *options*: each option is a change of
config.json or of the weights that a correct implementation must notice. ``differences`` must be small for the
checkpoint as it is, ``effect`` large for every option: a parity test that no wrong option can fail proves little.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxarch.blocks import CausalLM
from mlxarch.loading.load import load_model

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
DIALECTS = ("config.json", "config.transformers5.json")
TOLERANCE = 8e-5  # largest absolute difference of a logit; the logits' standard deviation is 3
CHUNK = 13  # tokens; odd, so that no boundary is a multiple of anything

TOP_LEVEL = ("model_type", "tie_word_embeddings")  # in a wrapper of several models

Weights = dict[str, np.ndarray]
Change = Callable[[dict[str, Any], Weights], None]


@dataclass(frozen=True)
class Case:
    """A folder, the options that it exercises, and the tolerance if its mathematics needs another."""

    options: Mapping[str, Change] = field(default_factory=dict)
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Differences:
    """Largest absolute difference of a logit from the reference, for each way of computing it."""

    whole: float
    chunked: float
    cached: float
    same_tokens: bool

    @property
    def largest(self) -> float:
        """NaN if any of them is."""
        return float(np.max([self.whole, self.chunked, self.cached]))


# What to change


def config(**settings: Any) -> Change:
    """Sets keys, in whichever dialect the file is; a dict is merged into the one that stands there.

    In a wrapper of several models, keys of the text model are set.

    ``rope_theta`` and ``rope_scaling`` mean ``rope_parameters`` where the file has those.
    """

    def change(found: dict[str, Any], weights: Weights) -> None:
        for key, value in settings.items():
            if "text_config" in found and key in TOP_LEVEL:
                found[key] = value
            found = found.get("text_config", found)
            rope = found.get("rope_parameters")
            if rope is not None and key == "rope_theta":
                rope[key] = value
            elif rope is not None and key == "rope_scaling":
                kept = (
                    rope
                    if value is not None
                    else {"rope_theta": rope["rope_theta"], "rope_type": "default"}
                )
                found["rope_parameters"] = kept | (value or {})
            else:
                found[key] = (
                    found[key] | value if isinstance(value, dict) and found.get(key) else value
                )

    return change


def weight(pattern: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Replaces every tensor whose name matches the shell pattern."""

    def change(found: dict[str, Any], weights: Weights) -> None:
        names = [name for name in weights if fnmatchcase(name, pattern)]
        if not names:
            raise LookupError(f"no tensor is called {pattern}")
        weights.update({name: make(weights[name]) for name in names})

    return change


def without(pattern: str, **settings: Any) -> Change:
    """Removes tensors, and sets keys of the config with which they are not needed."""

    def change(found: dict[str, Any], weights: Weights) -> None:
        for name in [name for name in weights if fnmatchcase(name, pattern)]:
            del weights[name]
        config(**settings)(found, weights)

    return change


# What to measure


def pairs(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """Every folder in every dialect: the parameters of a parity test."""
    return [(name, dialect) for name in cases for dialect in DIALECTS]


def options(cases: Mapping[str, Case]) -> list[tuple[str, str, str]]:
    """Every option of every folder in every dialect: the parameters of a negative control."""
    return [
        (name, dialect, option) for name, dialect in pairs(cases) for option in cases[name].options
    ]


def copy(name: str, dialect: str, folder: Path, change: Change | None = None) -> Path:
    """A checkpoint folder with the golden weights and the config of one dialect, changed if asked."""
    source, target = GOLDEN / name, folder / "model"
    target.mkdir()
    found = json.loads((source / dialect).read_text())
    if change is None:
        for file in source.glob("model*"):
            shutil.copy(file, target)
    else:
        weights = {
            key: value
            for file in source.glob("model*.safetensors")
            for key, value in load_file(file).items()
        }
        change(found, weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(found))
    return target


@cache
def reference(name: str) -> Weights:
    """input_ids (1, 48), logits (1, 48, V), generated (1, 24), gen_logits (24, V)."""
    return load_file(GOLDEN / name / "reference.safetensors")


def differences(name: str, dialect: str, folder: Path) -> Differences:
    """How far the product is from the reference: the whole prompt, in chunks through caches, and greedy decoding."""
    model, _ = load_model(copy(name, dialect, folder), dtype="float32")
    wanted = reference(name)
    chunked, cached, tokens = _through_caches(
        model, wanted["input_ids"], wanted["generated"].shape[1]
    )
    return Differences(
        whole=_distance(_logits(model, wanted["input_ids"]), wanted["logits"]),
        chunked=_distance(chunked, wanted["logits"]),
        cached=_distance(cached, wanted["gen_logits"]),
        same_tokens=tokens == wanted["generated"][0].tolist(),
    )


def effect(name: str, dialect: str, change: Change, folder: Path) -> float:
    """How far a changed checkpoint's logits are from the reference's."""
    model, _ = load_model(copy(name, dialect, folder, change), dtype="float32")
    return _distance(_logits(model, reference(name)["input_ids"]), reference(name)["logits"])


def _logits(model: CausalLM, ids: np.ndarray, caches: Any = None) -> np.ndarray:
    return np.array(model(mx.array(ids), caches))


def _through_caches(
    model: CausalLM, ids: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Prefill in chunks, then ``count`` greedy tokens one by one: logits of both, and the tokens."""
    caches = model.make_caches()
    parts = [_logits(model, ids[:, i : i + CHUNK], caches) for i in range(0, ids.shape[1], CHUNK)]
    prefill = np.concatenate(parts, axis=1)
    rows, tokens = [prefill[0, -1]], [int(prefill[0, -1].argmax())]
    while len(tokens) < count:
        rows.append(_logits(model, np.array([tokens[-1:]]), caches)[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return prefill, np.stack(rows), tokens


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"logits {found.shape} instead of {wanted.shape}")
    return float(np.abs(found.astype(np.float64) - wanted).max())
