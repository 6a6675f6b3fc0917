"""Where mlxarch keeps its files: the XDG places, on macOS too; ``MLXARCH_HOME`` moves all of them under one folder."""

import os
from pathlib import Path

from platformdirs.unix import Unix


def _place(name: str) -> Path:
    home = os.environ.get("MLXARCH_HOME")
    return Path(home).expanduser() / name if home else getattr(Unix("mlxarch"), f"user_{name}_path")


def models() -> Path:
    """Models that mlxarch converted or imported. Hub downloads stay in the Hub's own cache."""
    return _place("data") / "models"


def config() -> Path:
    """``config.toml`` and user aliases."""
    return _place("config")


def cache() -> Path:
    """Things that can be made again."""
    return _place("cache")


def state() -> Path:
    """Input history and saved chats."""
    return _place("state")
