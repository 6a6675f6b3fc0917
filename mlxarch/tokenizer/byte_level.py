"""Byte-level BPE: split a text into words by a regular expression, then encode each word's bytes.

GPT-2 introduced it (Radford et al. 2019), and most tokenizers use it today. A tokenizer.json
writes each byte as one character: printable Latin-1 bytes as themselves, the others from U+0100 on.
"""

from typing import Any

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_NOT_PRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]

UNICODE_TO_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(_NOT_PRINTABLE)
}
"""Character of a tokenizer.json -> byte."""
_BYTE_TO_UNICODE = {byte: character for character, byte in UNICODE_TO_BYTE.items()}

# Regular expressions in the notation of the tokenizers library (Oniguruma), which the publishers
# use as well.
_PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD_PREFIX = r"[^\r\n\p{L}\p{N}]?"

QWEN_PATTERN = (
    rf"{_CONTRACTION}|{_WORD_PREFIX}\p{{L}}+|\p{{N}}"
    rf"|{_PUNCTUATION_AND_SPACES}"
)
"""Runs of letters, single digits. Grok's ``word_split`` "V1" is the same."""
GPT4_PATTERN = (
    rf"{_CONTRACTION}|{_WORD_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}"
    rf"|{_PUNCTUATION_AND_SPACES}"
)
"""Runs of letters, up to three digits. Llama 3 uses the same."""
KIMI_PATTERN = (
    r"[\p{Han}]+"
    rf"|{_WORD_PREFIX}[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTION}?"
    rf"|{_WORD_PREFIX}[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACES}"
)
"""Han characters apart, upper case before lower case, up to three digits.

Source: tokenization_kimi.py of moonshotai/Kimi-K2.
"""
TEKKEN_PATTERN = (
    rf"{_WORD_PREFIX}[{_UPPER}]*[{_LOWER}]+|{_WORD_PREFIX}[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Upper case before lower case, single digits: the ``pattern`` in Mistral's tekken.json."""


DECODER: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""The ``decoder`` section of a tokenizer.json."""


def bytes_to_unicode(token: bytes) -> str:
    """Return a token's bytes as the characters that a tokenizer.json uses for them."""
    return "".join(map(_BYTE_TO_UNICODE.__getitem__, token))


def pre_tokenizer_section(pattern: str | None) -> dict[str, Any]:
    """Build the ``pre_tokenizer`` section of a tokenizer.json.

    Args:
        pattern: regular expression that splits a text into words; None for GPT-2's.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pattern is None,
    }
    if pattern is None:
        return byte_level
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def build_tokenizer_json(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    special_tokens: dict[str, int],
    pattern: str | None,
) -> dict[str, Any]:
    """Build the contents of a tokenizer.json for byte-level BPE.

    Args:
        vocabulary: token -> id; tokens are spelled as by ``bytes_to_unicode``.
        merges: pairs of tokens, in order of priority.
        special_tokens: token -> id; they are matched in a text before anything else.
        pattern: see ``pre_tokenizer_section``.
    """
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    # The library numbers added tokens from the end of the vocabulary on, unless the vocabulary
    # holds them; so the special tokens are listed there as well, with their ids.
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text} | flags for text, index in special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_section(pattern),
        "post_processor": None,
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "vocab": vocabulary | special_tokens,
            "merges": merges,
            "byte_fallback": False,
        },
    }
