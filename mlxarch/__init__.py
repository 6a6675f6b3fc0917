"""Open-weight language models on the machine in front of you: quantized inference on MLX.

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
    from mlxarch.generation import Session, Timings
    from mlxarch.language_model import LanguageModel, Piece, Result, load
    from mlxarch.quantize import convert
    from mlxarch.sampling import Sampling
    from mlxarch.tokenizer import Tokenizer

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program asks for messages

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
    "Piece": "language_model",
    "Result": "language_model",
    "Sampling": "sampling",
    "Session": "generation",
    "Timings": "generation",
    "Tokenizer": "tokenizer",
    "convert": "quantize",
    "load": "language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlxarch' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"mlxarch.{_HOME[name]}"), name)
    except ImportError:
        from mlxarch.backend import require_backend

        require_backend()  # says what to install, where it is MLX that is missing
        raise


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
