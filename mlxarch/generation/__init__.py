"""Token generation: prefill, decoding, sampling, and the answer as text.

The main names are imported when they are first used, so that importing a file of this package does
not load MLX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxarch.generation.sampling import Sampler, Sampling
    from mlxarch.generation.session import Session
    from mlxarch.generation.timings import Timings

_HOME = {"Sampler": "sampling", "Sampling": "sampling", "Session": "session", "Timings": "timings"}

__all__ = ["Sampler", "Sampling", "Session", "Timings"]

if not TYPE_CHECKING:  # a type checker would take every name of the package for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'mlxarch.generation' has no attribute {name!r}")
        return getattr(importlib.import_module(f"mlxarch.generation.{_HOME[name]}"), name)
