"""Conversion of the tokenizer in GGUF metadata to the tokenizer files of a Hugging Face checkpoint.

``tokenizer.ggml.model`` "gpt2" is byte-level BPE and becomes tokenizer.json; "llama" is
SentencePiece's BPE and becomes the tokenizer.model that SentencePiece itself reads.
Source: tokenizer.json of the models named below; sentencepiece_model.proto; llama.cpp's
llama-vocab.cpp for defaults.
"""

import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import short_repr
from mlxarch.tokenizer.added_tokens import is_tag

_logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class PreTokenizer:
    """Pre-tokenization, the split of a text before BPE merges: ``tokenizer.ggml.pre``.

    Attributes:
        split: regular expression whose matches are the pieces; None uses ByteLevel's own, GPT-2's.
        digits: every digit is a piece of its own.
        ignore_merges: a piece that is a token itself is used without merging.
        normalizer: Unicode normal form.
        add_bos: a text starts with the bos token, unless ``tokenizer.ggml.add_bos_token`` says
            otherwise.
    """

    split: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    normalizer: str | None = None
    add_bos: bool = False


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = PreTokenizer(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(rf"{_WORDS}|\p{{N}}|{_REST}", normalizer="NFC"),
}


def tokenizer_files(vocabulary: "Vocabulary") -> dict[str, bytes]:
    """Build tokenizer.json or tokenizer.model, and tokenizer_config.json with the chat template.

    Raises:
        TokenizerError: an unsupported kind of tokenizer, or a key is missing or malformed.
    """
    metadata = vocabulary.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            vocabulary.refuse(
                f"the pre-tokenizer {short_repr(pre)} is unknown; known are "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
        add_bos = vocabulary.flag("add_bos_token", PRE_TOKENIZERS[pre].add_bos)
        model = {
            "tokenizer.json": json.dumps(
                _bpe(vocabulary, PRE_TOKENIZERS[pre], add_bos), ensure_ascii=False
            ).encode()
        }
    elif kind == "llama":
        add_bos = vocabulary.flag("add_bos_token", True)
        model = {"tokenizer.model": _sentencepiece(vocabulary)}
    else:
        vocabulary.refuse(
            f"the tokenizer model {short_repr(kind)} is unknown; known are 'gpt2' and 'llama'"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "add_bos_token": add_bos,
        "add_eos_token": vocabulary.flag("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token["id"]): _without_id(token) for token in vocabulary.added_tokens()
        },
    }
    if kind == "llama":
        settings |= {"legacy": True, "add_prefix_space": vocabulary.flag("add_space_prefix", True)}
    for name in ("bos", "eos", "unknown", "padding"):
        if (token := vocabulary.special(name)) is not None:
            key = {"unknown": "unk_token", "padding": "pad_token"}.get(name, f"{name}_token")
            settings[key] = vocabulary.tokens[token]
    if templates := vocabulary.chat_templates:
        settings["chat_template"] = [
            {"name": name, "template": source} for name, source in templates.items()
        ]
    if templates.keys() == {"default"}:
        settings["chat_template"] = templates["default"]
    return model | {
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()
    }


class Vocabulary:
    """Tokens and token types of ``tokenizer.ggml``, checked for consistency.

    ``where`` is the file, for messages.

    Raises:
        TokenizerError: a list is missing or malformed, the lists differ in length, or a token
            occurs twice.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata = metadata
        self.where = where
        self.tokens: list[str] = self.values("tokens", str)
        self.types: list[int] = self.values("token_type", int)
        if not self.tokens or len(self.types) != len(self.tokens):
            self.refuse(
                f"it has {len(self.tokens)} tokens and {len(self.types)} token types; they must be "
                "as many"
            )
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(
                token for number, token in enumerate(self.tokens) if self.ids[token] != number
            )
            self.refuse(f"the token {short_repr(twice)} occurs twice")
        self._mark_written_tags()

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Name -> Jinja source of ``tokenizer.chat_template`` and ``tokenizer.chat_template.NAME``.

        The one without a name is called "default".
        """
        key = "tokenizer.chat_template"
        names = self.metadata.get("tokenizer.chat_templates")
        keys = {"default": key}
        if isinstance(names, list):
            keys |= {name: f"{key}.{name}" for name in names if isinstance(name, str)}
        sources = {name: self.metadata.get(key) for name, key in keys.items()}
        return {name: source for name, source in sources.items() if isinstance(source, str)}

    def _mark_written_tags(self) -> None:
        """Give tags that a chat template writes the type USER_DEFINED, if theirs is NORMAL.

        Some finetuned models were converted so. A text is not split into such a tag otherwise.
        """
        written = "".join(self.chat_templates.values())
        for token, number in self.ids.items():
            if self.types[number] == NORMAL and is_tag(token) and token in written:
                self.types[number] = USER_DEFINED

    def refuse(self, what: str) -> NoReturn:
        """Raise TokenizerError."""
        raise TokenizerError(
            f"{self.where}: {what}. Convert the original again with a current llama.cpp, "
            "or take the model's safetensors repository"
        )

    def values(self, key: str, kind: type) -> list[Any]:
        """Return the list ``tokenizer.ggml.<key>``, whose values all have one type."""
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            self.refuse(
                f"tokenizer.ggml.{key} must be a list of {kind.__name__}, found "
                f"{type(values).__name__}"
            )
        return values

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean ``tokenizer.ggml.<key>``."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            self.refuse(f"tokenizer.ggml.{key} must be a boolean, found {short_repr(value)}")
        return value

    def special(self, name: str) -> int | None:
        """Return the token id ``tokenizer.ggml.<name>_token_id``, if any.

        An id that is none of the tokens, such as 2^32 - 1 for "none", counts for nothing.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        token = self.metadata.get(key)
        if token is not None and type(token) is not int:
            self.refuse(f"{key} must be a whole number, found {short_repr(token)}")
        if token is None or 0 <= token < len(self.tokens):
            return token
        _logger.warning("%s is %d, which is none of %d tokens", key, token, len(self.tokens))
        return None

    def special_ids(self) -> dict[str, int | list[int]]:
        """Return bos, eos and pad ids under config.json's keys.

        eos lists the tokens that end a sequence, a turn or a message.
        """
        ends = [end for name in ("eos", "eot", "eom") if (end := self.special(name)) is not None]
        ends = list(dict.fromkeys(ends))
        ids = {
            "bos_token_id": self.special("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.special("padding"),
        }
        return {key: value for key, value in ids.items() if value is not None}

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the added tokens, which are matched before pre-tokenization."""
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]


def _without_id(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _bpe(vocabulary: Vocabulary, pre: PreTokenizer, add_bos: bool) -> dict[str, Any]:
    """Build tokenizer.json as the tokenizers library writes it."""
    # unused entries only pad the embedding matrix: no text encodes to them
    ids = {
        token: number
        for token, number in vocabulary.ids.items()
        if vocabulary.types[number] != UNUSED
    }
    merges = []
    for merge in vocabulary.values("merges", str):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            vocabulary.refuse(f"the merge {short_repr(merge)} does not join two tokens to a third")
        merges.append([left, right])
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not pre.split,
    }
    splits: list[dict[str, Any]] = []
    if pre.digits:
        splits.append({"type": "Digits", "individual_digits": True})
    if pre.split:
        splits.append(
            {
                "type": "Split",
                "pattern": {"Regex": pre.split},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _post_processor(
            vocabulary, add_bos, vocabulary.flag("add_eos_token", False)
        ),
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": ids,
            "merges": merges,
        },
    }


def _post_processor(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """Build the post-processor that adds bos and eos; None if neither is added."""
    special_tokens = {}
    for name, enabled in (("bos", add_bos), ("eos", add_eos)):
        if enabled:
            if (token := vocabulary.special(name)) is None:
                vocabulary.refuse(
                    f"tokenizer.ggml.add_{name}_token is set, and there is no {name}_token_id"
                )
            special_tokens[name] = {
                "id": vocabulary.tokens[token],
                "ids": [token],
                "tokens": [vocabulary.tokens[token]],
            }
    if not special_tokens:
        return None

    def template(sequence: str, kind: int) -> list[dict[str, Any]]:
        text = [{"Sequence": {"id": sequence, "type_id": kind}}]
        special = {
            name: [{"SpecialToken": {"id": token["id"], "type_id": kind}}]
            for name, token in special_tokens.items()
        }
        return [*special.get("bos", []), *text, *special.get("eos", [])]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {token["id"]: token for token in special_tokens.values()},
    }


def _sentencepiece(vocabulary: Vocabulary) -> bytes:
    """Build SentencePiece's model file: pieces, trainer and normalizer settings as protobuf."""
    scores = vocabulary.values("scores", float)
    if len(scores) != len(vocabulary.tokens):
        vocabulary.refuse(
            f"it has {len(vocabulary.tokens)} tokens and {len(scores)} scores; they must be as many"
        )
    if any(not NORMAL <= kind <= BYTE for kind in vocabulary.types):
        vocabulary.refuse("tokenizer.ggml.token_type must hold numbers from 1 to 6")
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _field(2, score) + _field(3, kind))
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
    )
    trainer = _field(3, 2)  # model_type BPE
    trainer += _field(35, int(BYTE in vocabulary.types))  # byte_fallback
    for number, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        token = vocabulary.special(name)
        trainer += _field(number, -1 if token is None else token)
        if token is not None:
            trainer += _field(number + 5, vocabulary.tokens[token].encode())
    normalizer = (
        _field(1, b"identity")
        + _field(3, int(vocabulary.flag("add_space_prefix", True)))
        + _field(4, int(vocabulary.flag("remove_extra_whitespaces", False)))
        + _field(5, 1)  # escape_whitespaces
    )
    if "tokenizer.ggml.precompiled_charsmap" in vocabulary.metadata:
        vocabulary.refuse("tokenizer.ggml.precompiled_charsmap: normalization tables are not read")
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: bytes | int | float) -> bytes:
    """Encode a protobuf field: bytes with their length, a float of four bytes, or a varint."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 127:
        octets.append(value & 127 | 128)
        value >>= 7
    octets.append(value)
    return bytes(octets)
