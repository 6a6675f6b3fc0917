"""The golden Grok 2.5 as it is published: one file for each kind of tensor, experts cut for ranks."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from parity import GOLDEN

RANKS = 4
KINDS = (
    "embed_tokens",
    "lm_head",
    "model.norm",
    ".mlp.",
    ".w1.",
    ".w2.",
    ".w3.",
    "self_attn",
    "_norm",
    "moe.gate",
)


def name_of(number: int, rank: int | None) -> str:
    return f"pytorch_model-{number:05}-TP-{'common' if rank is None else f'{rank:03}'}.safetensors"


def make(folder: Path) -> Path:
    """Writes config.json and the weights into ``folder``, which must not exist."""
    folder.mkdir()
    shutil.copy(GOLDEN / "grok2" / "config.json", folder)
    weights = load_file(GOLDEN / "grok2" / "model.safetensors")
    for number, kind in enumerate(KINDS):
        found = {name: value for name, value in weights.items() if kind in name}
        if kind not in (".w1.", ".w2.", ".w3."):
            save_file(found, folder / name_of(number, None))
            continue
        for rank in range(RANKS):
            axis = 1 if kind == ".w2." else 0
            slices = {
                name: np.split(value, RANKS, axis)[rank].copy() for name, value in found.items()
            }
            save_file(slices, folder / name_of(number, rank))
    return folder
