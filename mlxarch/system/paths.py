"""Folders of mlxarch's files: the XDG base directories, on macOS too.

``MLXARCH_HOME`` moves all of them into one folder.
"""

import os
from pathlib import Path

from platformdirs.unix import Unix


def _folder(name: str) -> Path:
    home = os.environ.get("MLXARCH_HOME")
    if home:
        return Path(home).expanduser() / name
    return getattr(Unix("mlxarch"), f"user_{name}_path")


def models() -> Path:
    """Return the folder of converted and imported models; the Hub has its own cache."""
    return _folder("data") / "models"


def config() -> Path:
    """Return the folder of ``config.toml`` and user aliases."""
    return _folder("config")


def cache() -> Path:
    """Return the folder of files that can be recreated."""
    return _folder("cache")


def state() -> Path:
    """Return the folder of the input history and saved chats."""
    return _folder("state")
