"""Quantized inference of open-weight language models on MLX.

    import mlxarch
    model = mlxarch.load("smollm2-135m")
    print(model.generate([{"role": "user", "content": "Why is the sky blue?"}], max_tokens=100).text)

Names are imported when they are first used, so that importing the package costs nothing.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxarch.errors import MlxArchError
    from mlxarch.generation.answer import Piece, Result
    from mlxarch.generation.sampling import Sampling
    from mlxarch.generation.session import Session
    from mlxarch.generation.timings import Timings
    from mlxarch.language_model import LanguageModel, load
    from mlxarch.quantize import convert
    from mlxarch.tokenizer.tokenizer import Tokenizer

logging.getLogger(__name__).addHandler(
    logging.NullHandler()
)  # silent unless the program asks for messages

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "MlxArchError",
    "Piece",
    "Result",
    "Sampling",
    "Session",
    "Timings",
    "Tokenizer",
    "convert",
    "load",
]

_HOME = {
    "LanguageModel": "language_model",
    "MlxArchError": "errors",
    "Piece": "generation.answer",
    "Result": "generation.answer",
    "Sampling": "generation.sampling",
    "Session": "generation.session",
    "Timings": "generation.timings",
    "Tokenizer": "tokenizer.tokenizer",
    "convert": "quantize",
    "load": "language_model",
}

if not TYPE_CHECKING:  # a type checker would take every name of the package for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'mlxarch' has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"mlxarch.{_HOME[name]}"), name)
        except ImportError:
            from mlxarch.system.backend import require_backend

            require_backend()  # says what to install, where it is MLX that is missing
            raise


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
