"""Decoders that do not fit their vocabulary: repaired whole, or the file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import TokenizerError
from mlxarch.tokenizer.load_json import load_tokenizer_json
from mlxarch.tokenizer.tokenizer import Tokenizer

FOLDERS = Path(__file__).parents[3] / "fixtures" / "tokenizers"
TEXT = "the time, é 🙂\nand more"

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
CHAIN = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def with_sections(name: str, **sections: Any) -> Tokenizer:
    document = json.loads((FOLDERS / name / "tokenizer.json").read_text(encoding="utf-8"))
    data = json.dumps(document | sections).encode()
    return Tokenizer(load_tokenizer_json(data, "tokenizer.json"))


@pytest.mark.parametrize("decoder", [CHAIN, METASPACE, None, BYTE_LEVEL], ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_byte_level_vocabulary_is_decoded_as_bytes(name: str, decoder: dict[str, Any] | None):
    tokenizer = with_sections(name, decoder=decoder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("decoder", [BYTE_LEVEL, None, CHAIN], ids=str)
def test_a_sentencepiece_vocabulary_is_decoded_as_pieces(decoder: dict[str, Any] | None):
    tokenizer = with_sections("mistral", decoder=decoder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_literal_character_of_the_byte_alphabet_changes_nothing():
    document = json.loads((FOLDERS / "mistral" / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["vocab"] |= {"Ġ": 900, "Ċ": 901}
    loaded = load_tokenizer_json(json.dumps(document).encode(), "tokenizer.json")
    assert loaded.decoder == document["decoder"]


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "kind"),
    [
        ("llama3", METASPACE, "vocabulary is byte-level"),
        ("llama3", None, "vocabulary is byte-level"),
        ("mistral", BYTE_LEVEL, "pre_tokenizer is byte-level"),
    ],
)
def test_words_that_the_vocabulary_does_not_have_are_refused(
    name: str, pre_tokenizer: dict[str, Any] | None, kind: str
):
    with pytest.raises(TokenizerError, match=kind):
        with_sections(name, pre_tokenizer=pre_tokenizer)
