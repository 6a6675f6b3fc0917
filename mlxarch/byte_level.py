"""Byte-level BPE, as GPT-2 began it and most tokenizers do it since: words by a regular expression, then bytes.

A tokenizer.json writes bytes as characters, one for each: printable Latin-1 stands for itself, the rest follows from
256 on.
"""

from typing import Any

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}
"""Character → byte."""
_CHARACTERS = {byte: character for character, byte in BYTES.items()}

# Each in the notation of the tokenizers library (Oniguruma), which is also the publishers' own.
_LAST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_START = r"[^\r\n\p{L}\p{N}]?"

QWEN = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}|{_LAST}"
"""Letters, single digits; also Grok's "V1"."""
GPT4 = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_LAST}"
"""Letters, up to three digits; also Llama 3's."""
KIMI = (
    rf"[\p{{Han}}]+|{_START}[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTION}?"
    rf"|{_START}[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_LAST}"
)
"""Chinese apart, capitals before small letters, up to three digits (tokenization_kimi.py of moonshotai/Kimi-K2)."""
TEKKEN = (
    rf"{_START}[{_UPPER}]*[{_LOWER}]+|{_START}[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Capitals before small letters, single digits; the ``pattern`` of Mistral's tekken.json."""


def as_text(token: bytes) -> str:
    """Bytes in the characters of a tokenizer.json."""
    return "".join(map(_CHARACTERS.__getitem__, token))


def split_by(pattern: str | None) -> dict[str, Any]:
    """The ``pre_tokenizer`` section: words by a regular expression (None: GPT-2's), then bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern is None:
        return level
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def document(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int], pattern: str | None
) -> dict[str, Any]:
    """The contents of a tokenizer.json.

    Args:
        vocabulary: token in the characters of ``as_text`` → id.
        merges: the first one first.
        special: special tokens → id; they are matched in a text before anything else.
        pattern: see ``split_by``.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # The library numbers added tokens from the vocabulary's end on; an id of their own they get from being in it.
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text} | flags for text, index in special.items()],
        "normalizer": None,
        "pre_tokenizer": split_by(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary | special, "merges": merges, "byte_fallback": False},
    }
