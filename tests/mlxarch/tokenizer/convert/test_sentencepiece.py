"""Converted SentencePiece models against sentencepiece itself, on models trained here."""

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mlxarch.errors import TokenizerError
from mlxarch.tokenizer.convert.sentencepiece import convert_sentencepiece
from mlxarch.tokenizer.load_json import load_tokenizer_json
from mlxarch.tokenizer.tokenizer import Tokenizer

FOLDERS = Path(__file__).parents[3] / "fixtures" / "tokenizers"

CORPUS = """The quick brown fox jumps over the lazy dog, and a model reads what it wrote.
def main(argv): return [i for i in range(10)] # a comment with  two blanks
Der schnelle braune Fuchs springt. Le café est très bon à Noël. 12345 1,000
今天天气很好 日本語のテキスト Привет, мир and more text to learn from""".splitlines()
LETTERS = "the quick brown fox   \n\t é今天 🙂 123 ﬁ①ﷺxx"


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


def imported(data: bytes) -> Tokenizer:
    return Tokenizer(
        load_tokenizer_json(convert_sentencepiece(data, {}).tokenizer_json, "tokenizer.model")
    )


OPTIONS = list(
    itertools.product(["bpe", "unigram"], ["identity", "nmt_nfkc"], [True, False], [True, False])
)


@pytest.mark.parametrize(("kind", "normalization", "prefix", "trim"), OPTIONS)
def test_ids_equal_those_of_sentencepiece(kind: str, normalization: str, prefix: bool, trim: bool):
    for byte_fallback in (True, False):
        data = trained(
            model_type=kind,
            normalization_rule_name=normalization,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=trim,
            byte_fallback=byte_fallback,
            vocab_size=400 if byte_fallback else 160,
        )
        original = sentencepiece.SentencePieceProcessor(model_proto=data)
        converted = imported(data)
        draw = random.Random(0)
        for _ in range(100):
            text = "".join(draw.choice(LETTERS) for _ in range(draw.randint(0, 30)))
            ids = converted.encode(text, add_special_tokens=False)
            assert ids == original.encode(text), text
            if byte_fallback and original.unk_id() not in ids:
                assert converted.decode(ids) == original.decode(ids), text


def test_the_prefix_matters():
    ids = []
    for prefix in (True, False):
        data = trained(model_type="bpe", vocab_size=160, add_dummy_prefix=prefix)
        ids.append(imported(data).encode("the", add_special_tokens=False))
    assert ids[0] != ids[1]


def test_symbols_of_blanks_are_found_in_the_normalized_text():
    data = trained(
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["▁▁", "▁▁▁▁", "\n\n", "<table>"],
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=data)
    converted = imported(data)
    for text in ("a  b", "   x", "     \n\n\n", "x<table>  \n\ny", "       deep"):
        assert converted.encode(text, add_special_tokens=False) == original.encode(text), text


def test_merges_equal_those_of_the_published_form():
    for name in ("mistral", "gemma2"):
        published = json.loads((FOLDERS / name / "tokenizer.json").read_text(encoding="utf-8"))
        converted = json.loads(
            convert_sentencepiece(
                (FOLDERS / name / "tokenizer.model").read_bytes(), {}
            ).tokenizer_json
        )
        assert converted["model"]["merges"] == published["model"]["merges"]
        assert converted["decoder"] == published["decoder"]


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x0a\xff\xff\xff\xff\x7f", b"<s>" * 50, b"\x0a\x05\x0a\x03abc"]
)
def test_what_is_no_model_is_refused(data: bytes):
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        convert_sentencepiece(data, {})


def test_random_changes_of_a_model_are_refused_or_load():
    data = (FOLDERS / "mistral" / "tokenizer.model").read_bytes()
    draw = random.Random(0)
    loaded = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        if draw.random() < 0.3:
            del changed[draw.randrange(len(changed)) :]
        try:
            tokenizer = imported(bytes(changed))
            tokenizer.decode(tokenizer.encode("The quick 今天 🙂"))
            loaded += 1
        except TokenizerError:
            pass
    assert 0 < loaded < 300


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    """A field of a protocol buffer with a number below 16, as bytes."""
    length = bytes([len(payload)]) if wire_type == 2 else b""
    return bytes([number << 3 | wire_type]) + length + payload


WIRE_TYPES = {0: b"\x01", 1: bytes(8), 2: b"a", 5: bytes(4)}  # wire type -> some content
FIELDS = {  # name -> number of its message in the model, number of the field, wire type
    "piece": (1, 1, 2),
    "score": (1, 2, 5),
    "type": (1, 3, 0),
    "model_type": (2, 3, 0),
    "precompiled_charsmap": (3, 2, 2),
    "add_dummy_prefix": (3, 3, 0),
    "remove_extra_whitespaces": (3, 4, 0),
    "escape_whitespaces": (3, 5, 0),
}


@pytest.mark.parametrize("wire_type", WIRE_TYPES)
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_wire_type_is_refused_by_name(name: str, wire_type: int):
    data = (FOLDERS / "mistral" / "tokenizer.model").read_bytes()
    message, number, expected = FIELDS[name]
    content = _field(number, wire_type, WIRE_TYPES[wire_type])
    if message == 1:
        content = content if name == "piece" else _field(1, 2, b"zz") + content
    changed = data + _field(message, 2, content)
    if wire_type != expected:
        # an empty piece is refused by the library, which takes the field for an unknown one
        pattern = "must not be empty" if name == "piece" else f"{name} has the wire type"
        with pytest.raises(TokenizerError, match=pattern):
            imported(changed)
    elif name not in ("piece", "model_type", "precompiled_charsmap"):  # no whole change of those
        assert imported(changed).encode("the")


@pytest.mark.parametrize(("number", "name"), [(2, "trainer_spec"), (3, "normalizer_spec")])
def test_a_section_that_is_a_number_is_refused_by_name(number: int, name: str):
    data = (FOLDERS / "mistral" / "tokenizer.model").read_bytes()
    with pytest.raises(TokenizerError, match=f"{name} has the wire type 0"):
        imported(data + _field(number, 0, b"\x01"))


def test_unknown_fields_are_skipped():
    data = (FOLDERS / "mistral" / "tokenizer.model").read_bytes()
    for wire_type, content in WIRE_TYPES.items():
        more = _field(9, wire_type, content)
        tokenizer = imported(data + more + _field(3, 2, more))
        assert tokenizer.encode("the") == imported(data).encode("the")


def test_a_model_that_does_not_mark_blanks_is_refused():
    data = (FOLDERS / "mistral" / "tokenizer.model").read_bytes()
    with pytest.raises(TokenizerError, match="does not mark blanks"):
        imported(data + _field(3, 2, _field(5, 0, b"\0")))


def test_words_and_characters_are_refused_as_kinds():
    with pytest.raises(TokenizerError, match="kind 4"):
        convert_sentencepiece(trained(model_type="char", vocab_size=60), {})


def test_blanks_at_the_end_of_words_are_refused():
    with pytest.raises(TokenizerError, match="blanks at the end"):
        convert_sentencepiece(
            trained(model_type="bpe", vocab_size=160, treat_whitespace_as_suffix=True), {}
        )


def test_a_model_that_is_too_large_is_refused():
    with pytest.raises(TokenizerError, match="at most"):
        convert_sentencepiece(bytes((64 << 20) + 1), {})
