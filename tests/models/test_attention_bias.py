"""Biases of attention in every architecture whose reference has the key ``attention_bias``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity

NAMES = ["gemma2", "gemma3_text", "gemma3n_text", "llama4_scout", "olmo2", "olmo3"]


def biases(size: float, only: str = "qkvo") -> parity.Change:
    """Give every projection of attention a bias; those of ``only`` are drawn, others are zeros."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        found["attention_bias"] = True
        draw = np.random.default_rng(0)
        for name in [name for name in weights if ".self_attn." in name and "_proj.w" in name]:
            rows, own = weights[name].shape[0], f"{name.removesuffix('weight')}bias"
            drawn = name.split(".")[-2][0] in only
            weights[own] = size * drawn * draw.standard_normal(rows).astype(np.float32)

    return change


@pytest.mark.parametrize("name", NAMES)
def test_biases_of_zeros_change_nothing(name: str, tmp_path: Path) -> None:
    assert parity.effect(name, "config.json", biases(0), tmp_path) <= 2e-4


@pytest.mark.parametrize("projection", "qkvo")
@pytest.mark.parametrize("name", NAMES)
def test_the_bias_of_each_projection_counts(name: str, projection: str, tmp_path: Path) -> None:
    assert parity.effect(name, "config.json", biases(0.5, projection), tmp_path) >= 1e-3
