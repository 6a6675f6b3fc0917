"""Sections of a tokenizer.json that do not fit its vocabulary: repaired if the right ones are known.

Some conversions were published so, Devstral's and Mistral Small 3's among them; other programs read
them without a word, and produce tokens that the model never saw, or texts with "Ġ" for blanks.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import REMEDY
from mlxarch.tokenizer import byte_level

logger = logging.getLogger(__name__)

_BYTE_BLANK, _MARKED_BLANK = "Ġ", "▁"  # a blank in a byte-level and in a SentencePiece vocabulary
Sections = Mapping[str, dict[str, Any] | None]


def repaired_sections(
    vocabulary: Mapping[str, int], sections: Sections, name: str
) -> dict[str, dict[str, Any]]:
    """Return the sections to replace.

    Args:
        vocabulary: token -> id.
        sections: ``normalizer``, ``pre_tokenizer`` and ``decoder``.
        name: file name for messages.

    Raises:
        TokenizerError: vocabulary and sections contradict each other, and the right ones are not
            known.
    """
    repaired: dict[str, dict[str, Any]] = {}
    if _has_wrong_tekken_pattern(vocabulary, sections["pre_tokenizer"]):
        pattern = byte_level.TEKKEN_PATTERN
        repaired["pre_tokenizer"] = byte_level.pre_tokenizer_section(pattern)
        logger.info(
            "%s: its regular expression is not the one that the vocabulary was trained with; "
            "Mistral's own is used",
            name,
        )
    decoder = _fitting_decoder(vocabulary, {**sections, **repaired}, name)
    if decoder is not None:
        repaired["decoder"] = decoder
        logger.info("%s: its decoder does not fit its vocabulary; another is used", name)
    return repaired


def walk(value: Any) -> Iterator[Any]:
    """Yield a JSON value and everything inside it."""
    yield value
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    else:
        children = []
    for child in children:
        yield from walk(child)


def _has_wrong_tekken_pattern(
    vocabulary: Mapping[str, int], pre_tokenizer: dict[str, Any] | None
) -> bool:
    """Return whether this is Mistral's Tekken with GPT-4's regular expression, or none.

    The vocabulary is recognized by its 1000 special tokens, followed by the 256 bytes in their
    order. Source: transformers' ``fix_mistral_regex``; tekken.json of mistral-common.
    """
    bytes_in_order = all(
        vocabulary.get(byte_level.bytes_to_unicode(bytes([byte]))) == 1000 + byte
        for byte in range(256)
    )
    patterns = [
        node["Regex"] for node in walk(pre_tokenizer) if isinstance(node, dict) and "Regex" in node
    ]
    return bytes_in_order and "[INST]" in vocabulary and patterns in ([], [byte_level.GPT4_PATTERN])


def _fitting_decoder(
    vocabulary: Mapping[str, int], sections: Sections, name: str
) -> dict[str, Any] | None:
    """Return a decoder that fits the vocabulary; None if the file's own does, or nothing is known.

    A SentencePiece vocabulary may hold characters of the byte alphabet as text, so what counts is
    how blanks in front of words are spelled.
    """
    bytes_in = _has_step("ByteLevel", sections["normalizer"], sections["pre_tokenizer"])
    bytes_out = _has_step("ByteLevel", sections["decoder"])
    byte_words = sum(token.startswith(_BYTE_BLANK) and len(token) > 1 for token in vocabulary)
    marked_words = sum(token.startswith(_MARKED_BLANK) and len(token) > 1 for token in vocabulary)
    if byte_words > marked_words:
        if not bytes_in:
            raise TokenizerError(
                f"{name}: the vocabulary is byte-level and the pre_tokenizer is not, so texts would "
                f"become tokens that the model never saw. {REMEDY}"
            )
        return None if bytes_out else byte_level.DECODER
    if marked_words > byte_words:
        if bytes_in:
            raise TokenizerError(
                f"{name}: the pre_tokenizer is byte-level and the vocabulary is not, so texts would "
                f"become tokens that the model never saw. {REMEDY}"
            )
        if bytes_out or sections["decoder"] is None:
            return sentencepiece_decoder(prefix=_adds_a_blank(sections))
    return None


def sentencepiece_decoder(prefix: bool) -> dict[str, Any]:
    """Build SentencePiece's ``decoder`` section.

    Args:
        prefix: whether a blank is put in front of a text that is encoded; it is removed again.
    """
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _MARKED_BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _adds_a_blank(sections: Sections) -> bool:
    """Return whether a blank is put in front of a text that is encoded."""
    splits = [
        node
        for node in walk(sections["pre_tokenizer"])
        if isinstance(node, dict) and node.get("type") == "Metaspace"
    ]
    return _has_step("Prepend", sections["normalizer"]) or any(
        node.get("prepend_scheme", "always") != "never" for node in splits
    )


def _has_step(kind: str, *sections: dict[str, Any] | None) -> bool:
    nodes = (node for section in sections for node in walk(section))
    return any(isinstance(node, dict) and node.get("type") == kind for node in nodes)
