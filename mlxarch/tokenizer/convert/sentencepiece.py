"""Convert a SentencePiece tokenizer.model to the contents of a tokenizer.json.

It is used for folders without a tokenizer.json. The result equals the published tokenizer.json
files of Llama 2, Mistral and Gemma: BPE or Unigram with byte fallback; merges ordered by the score
of the resulting piece; "▁" in front of each stretch of text between special tokens if the model has
``add_dummy_prefix``; control and user-defined pieces as added tokens.

The file is a protocol buffer (sentencepiece_model.proto). The ``sentencepiece`` package validates
it; the few fields that its Python interface does not offer are parsed here.
"""

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import REMEDY
from mlxarch.tokenizer.added_tokens import listed_ids
from mlxarch.tokenizer.convert.converted import ConvertedTokenizer
from mlxarch.tokenizer.sections.repair import sentencepiece_decoder

MAX_FILE_BYTES = 64 << 20
"""Largest file that is read; the largest published ones have 5 MB."""
_MAX_PIECES = 1 << 21
_MAX_PIECE_LENGTH = 512  # characters
_MAX_TOTAL_LENGTH = 1 << 22  # characters of all pieces; Gemma 3's 262,144 pieces have 1.9 million

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece.Type

_LOWEST_SCORE = -1e9  # of what is matched as an added token only

# The fields of sentencepiece_model.proto that are read: number -> name and wire type.
_VARINT, _LENGTH_DELIMITED, _FIXED_32 = 0, 2, 5
_FIXED_SIZES = {1: 8, _FIXED_32: 4}  # wire type -> bytes
_MODEL_FIELDS = {
    1: ("pieces", _LENGTH_DELIMITED),
    2: ("trainer_spec", _LENGTH_DELIMITED),
    3: ("normalizer_spec", _LENGTH_DELIMITED),
}
_PIECE_FIELDS = {1: ("piece", _LENGTH_DELIMITED), 2: ("score", _FIXED_32), 3: ("type", _VARINT)}
_TRAINER_FIELDS = {
    3: ("model_type", _VARINT),
    24: ("treat_whitespace_as_suffix", _VARINT),
    35: ("byte_fallback", _VARINT),
}
_NORMALIZER_FIELDS = {
    2: ("precompiled_charsmap", _LENGTH_DELIMITED),
    3: ("add_dummy_prefix", _VARINT),
    4: ("remove_extra_whitespaces", _VARINT),
    5: ("escape_whitespaces", _VARINT),
}


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    piece_type: int


@dataclass(frozen=True)
class _Model:
    pieces: list[_Piece]
    model_type: int
    byte_fallback: bool
    unk_id: int
    bos_id: int
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def convert_sentencepiece(
    data: bytes, tokenizer_config: Mapping[str, Any], name: str = "tokenizer.model"
) -> ConvertedTokenizer:
    """Convert a SentencePiece model.

    Args:
        data: contents of the file.
        tokenizer_config: contents of tokenizer_config.json. It lists tokens beyond the model's
            pieces, and decides by ``add_prefix_space`` and ``legacy`` where a blank goes in front.
        name: file name for error messages.

    Returns:
        A tokenizer.json that tokenizes as the model does, and the special tokens ``bos_token``,
        ``eos_token`` and ``unk_token``, as far as the model has them.

    Raises:
        TokenizerError: the file is not a SentencePiece model, or has a feature that a
            tokenizer.json cannot express.
    """
    import sentencepiece  # only folders without a tokenizer.json need it

    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{name} has {len(data)} bytes, and at most {MAX_FILE_BYTES} are read. {REMEDY}"
        )
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        model = _parse_model(data, unk_id=processor.unk_id(), bos_id=processor.bos_id())
    except (RuntimeError, ValueError, IndexError) as problem:
        raise TokenizerError(
            f"{name}: this is not a SentencePiece model ({problem}). {REMEDY}"
        ) from problem
    if model.model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(
            f"{name}: a SentencePiece model of kind {model.model_type}; "
            "1 (Unigram) and 2 (BPE) are read."
        )
    lengths = [len(piece.text) for piece in model.pieces]
    if (
        len(lengths) > _MAX_PIECES
        or max(lengths) > _MAX_PIECE_LENGTH
        or sum(lengths) > _MAX_TOTAL_LENGTH
    ):
        raise TokenizerError(
            f"{name}: {len(lengths)} pieces of up to {max(lengths)} characters, together "
            f"{sum(lengths)}; read are {_MAX_PIECES} of {_MAX_PIECE_LENGTH}, together "
            f"{_MAX_TOTAL_LENGTH}. {REMEDY}"
        )
    ids = {"bos_token": model.bos_id, "eos_token": processor.eos_id(), "unk_token": model.unk_id}
    special_tokens = {
        key: model.pieces[index].text
        for key, index in ids.items()
        if 0 <= index < len(model.pieces)
    }
    if isinstance(prefix := tokenizer_config.get("add_prefix_space"), bool):
        model = replace(model, add_dummy_prefix=prefix)
    document = _build_tokenizer_json(model, once=tokenizer_config.get("legacy") is False)
    _append_tokens(document["model"], listed_ids(tokenizer_config))
    adds_bos = {"add_bos_token": "bos_token" in special_tokens}
    return ConvertedTokenizer(msgspec.json.encode(document), special_tokens | adds_bos)


def without_normalized_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with ``added_tokens_decoder`` for this format.

    SentencePiece's own software finds added tokens in the text as it is. In the normalized text, a
    token would have the blank of ``add_dummy_prefix`` in front and be found at the start alone.
    """
    listed = tokenizer_config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return dict(tokenizer_config)
    tokens = {
        index: {**token, "normalized": False}
        if isinstance(token, dict) and _SPACE not in str(token.get("content"))
        else token
        for index, token in listed.items()
    }
    return {**tokenizer_config, "added_tokens_decoder": tokens}


def _build_tokenizer_json(model: _Model, once: bool) -> dict[str, Any]:
    """Build the contents of a tokenizer.json.

    Args:
        model: the model.
        once: put the blank of ``add_dummy_prefix`` in front of the whole text alone, and not of
            each stretch between special tokens.
    """
    first_only = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "first",
        "split": False,
    }
    once = once and model.add_dummy_prefix
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": _normalizer(replace(model, add_dummy_prefix=False) if once else model),
        "pre_tokenizer": first_only if once else None,
        "post_processor": None,
        "decoder": sentencepiece_decoder(prefix=model.add_dummy_prefix),
        "model": _bpe(model) if model.model_type == _BPE else _unigram(model),
    }


def _added_tokens(model: _Model) -> list[dict[str, Any]]:
    # SentencePiece's BPE matches user-defined symbols in the normalized text, where blanks are "▁".
    # The tokenizers library can do so only if normalization replaces blanks and nothing else;
    # otherwise symbols with blanks are left to the merges.
    only_blanks_normalized = not (
        model.precompiled_charsmap or model.remove_extra_whitespaces or model.add_dummy_prefix
    )
    symbols_with_blanks = only_blanks_normalized and model.model_type == _BPE
    tokens: list[dict[str, Any]] = []
    for index, piece in enumerate(model.pieces):
        is_symbol = piece.piece_type == _USER_DEFINED and (
            symbols_with_blanks or _SPACE not in piece.text
        )
        if piece.piece_type in (_UNKNOWN, _CONTROL) or is_symbol:
            tokens.append(
                {
                    "id": index,
                    "content": piece.text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": _SPACE in piece.text,
                    "special": piece.piece_type != _USER_DEFINED,
                }
            )
    return tokens


def _normalizer(model: _Model) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.precompiled_charsmap:
        charsmap = base64.b64encode(model.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A | \z"}, "content": ""})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _append_tokens(model: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Append tokens beyond the pieces to the ``model`` section, so that they get their ids.

    A list of pieces has no gaps: there, a token behind a gap is left out.
    """
    vocabulary = model["vocab"]
    pieces = len(vocabulary)
    for text, index in sorted(ids.items(), key=lambda item: item[1]):
        if model["type"] == "BPE" and index >= pieces:
            vocabulary.setdefault(text, index)
        elif model["type"] == "Unigram" and index == len(vocabulary):
            vocabulary.append((text, _LOWEST_SCORE))


def _unigram(model: _Model) -> dict[str, Any]:
    # pieces that a text must never be split into get a score below all others
    lowest_score = min((piece.score for piece in model.pieces), default=0.0) - 1000.0
    never_chosen = (_UNUSED, _CONTROL, _BYTE)
    vocabulary = [
        (piece.text, lowest_score if piece.piece_type in never_chosen else piece.score)
        for piece in model.pieces
    ]
    return {
        "type": "Unigram",
        "vocab": vocabulary,
        "unk_id": model.unk_id,
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: _Model) -> dict[str, Any]:
    return {
        "type": "BPE",
        "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model.pieces),
        "unk_token": model.pieces[model.unk_id].text,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "dropout": None,
    }


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best score first.

    SentencePiece merges the neighbours whose concatenation has the best score, anywhere in the
    text; a list of merges sorted by the score of the resulting piece is equivalent.
    """
    ids = {
        piece.text: index
        for index, piece in enumerate(pieces)
        if piece.piece_type in (_NORMAL, _USER_DEFINED)
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left = text[:cut]
            right = text[cut:]
            if left in ids and right in ids:
                merges.append((-pieces[index].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _parse_model(data: bytes, *, unk_id: int, bos_id: int) -> _Model:
    """Parse a ModelProto.

    Raises:
        ValueError, IndexError: it is damaged, a field has another type than the format gives it, or
            a setting is not supported.
    """
    pieces: list[_Piece] = []
    trainer: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    for name, value in _parse_fields(data, _MODEL_FIELDS):
        if name == "pieces":
            piece: dict[str, Any] = dict(_parse_fields(value, _PIECE_FIELDS))
            (score,) = struct.unpack("<f", piece.get("score", bytes(4)))
            text = piece.get("piece", b"").decode()
            pieces.append(_Piece(text, score, piece.get("type", _NORMAL)))
        elif name == "trainer_spec":
            trainer |= dict(_parse_fields(value, _TRAINER_FIELDS))
        else:
            normalizer |= dict(_parse_fields(value, _NORMALIZER_FIELDS))
    if trainer.get("treat_whitespace_as_suffix", 0):
        raise ValueError("it marks blanks at the end of a word, which is not supported")
    if not normalizer.get("escape_whitespaces", 1):
        raise ValueError("it does not mark blanks, which is not supported")
    if not 0 <= unk_id < len(pieces):
        raise ValueError("it has no piece for what is unknown")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("a piece occurs twice")
    return _Model(
        pieces=pieces,
        model_type=trainer.get("model_type", _UNIGRAM),
        byte_fallback=bool(trainer.get("byte_fallback", 0)),
        unk_id=unk_id,
        bos_id=bos_id,
        precompiled_charsmap=normalizer.get("precompiled_charsmap", b""),
        add_dummy_prefix=bool(normalizer.get("add_dummy_prefix", 1)),
        remove_extra_whitespaces=bool(normalizer.get("remove_extra_whitespaces", 1)),
    )


def _parse_fields(data: bytes, known: Mapping[int, tuple[str, int]]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each known field of a protocol-buffer message.

    A value is an int for a varint, bytes for any other wire type; other fields are skipped.

    Args:
        data: the message.
        known: field number -> name and wire type.
    """
    position = 0
    while position < len(data):
        key, position = _parse_varint(data, position)
        name, expected = known.get(key >> 3, (None, key & 7))
        if key & 7 != expected:
            raise ValueError(f"{name} has the wire type {key & 7}; it must have {expected}")
        value: int | bytes
        if expected == _VARINT:
            value, position = _parse_varint(data, position)
        elif expected in _FIXED_SIZES or expected == _LENGTH_DELIMITED:
            size = _FIXED_SIZES.get(expected)
            if size is None:
                size, position = _parse_varint(data, position)
            if position + size > len(data):
                raise ValueError(f"a field at byte {position} ends outside its message")
            value = data[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {expected} at byte {position}")
        if name is not None:
            yield name, value


def _parse_varint(data: bytes, position: int) -> tuple[int, int]:
    """Parse a varint. Return its value and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"an endless number at byte {position}")
