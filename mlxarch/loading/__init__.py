"""Model loading: from config.json and tensors to a network with its weights."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import ``load_model`` when it is asked for: tables of this package are read without MLX."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlxarch.loading.load import load_model

    return load_model
