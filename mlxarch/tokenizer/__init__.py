"""Tokenizers: text to token ids and back, and chat templates."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxarch.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    """Import ``Tokenizer`` when it is first used."""
    if name != "Tokenizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlxarch.tokenizer.tokenizer import Tokenizer

    return Tokenizer
