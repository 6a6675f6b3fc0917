"""Result of a conversion."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A converted tokenizer.

    Attributes:
        tokenizer_json: the bytes of a tokenizer.json.
        tokenizer_config: keys of tokenizer_config.json that follow from the original file.
    """

    tokenizer_json: bytes
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
