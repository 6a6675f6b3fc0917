"""The streaming detokenizer against the library's decoding of whole sequences."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from mlxarch.errors import InvalidInput
from mlxarch.tokenizer.detokenizer import StreamingDetokenizer, TokenByteDecoder
from mlxarch.tokenizer.load_json import load_tokenizer_json
from mlxarch.tokenizer.tokenizer import Tokenizer

FOLDERS = Path(__file__).parents[2] / "fixtures" / "tokenizers"
NAMES = ["gemma2", "llama3", "mistral", "qwen3"]

LINES = """The quick brown fox
Größe Äußerung naïve façade
Ελληνικά γράμματα
Привет, мир
שלום עולם
مرحبا بالعالم
हिन्दी में क्षत्रिय
বাংলা ভাষা
தமிழ் மொழி
ภาษาไทยน้ำ
ខ្មែរ
မြန်မာ
ქართული
አማርኛ
日本語のテキスト
今天天气很好
한국어 텍스트
👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 🙂🚀
𝕌𝕟𝕚𝕔𝕠𝕕𝕖 𓀀 𐍈
ﷺ ﬁ ① ½ ™
▁▁ low lines ▁
<0x41> <0xE2>
“quotes” — dashes…
1234567890 3.14"""
COMBINING = "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343"
BLANKS = [
    "tabs\tand\r\nlines\n\n",
    "  two  blanks  ",
    " ",
    "\u200b\u200d\ufeff\u00a0",
    "\0 \x7f \x01",
]
SCRIPTS = [*LINES.split("\n"), COMBINING, *BLANKS, "def f(x):\n    return x + 1\n"]


def texts() -> list[str]:
    draw = random.Random(0)
    mixed = [
        "".join(draw.choice(SCRIPTS)[: draw.randint(1, 12)] for _ in range(draw.randint(1, 6)))
        for _ in range(200 - len(SCRIPTS))
    ]
    return SCRIPTS + mixed


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_folder(FOLDERS / request.param)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def test_two_hundred_texts_stream_to_what_the_library_decodes(tokenizer: Tokenizer):
    assert len(texts()) == 200
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer._tokenizer.decode(ids)
        assert "".join(stream(tokenizer, ids)) == whole == tokenizer.decode(ids), text


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer):
    waited = 0
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids)
        whole, sent = tokenizer.decode(ids), ""
        assert "\ufffd" not in whole
        for piece in pieces:
            sent += piece
            assert whole.startswith(sent), (text, sent)
        waited += sum(piece == "" for piece in pieces[:-1])
    assert waited > 100  # the texts do split characters, or this test could not fail


def test_random_tokens_stream_to_what_decode_gives(tokenizer: Tokenizer):
    draw = random.Random(1)
    library_agrees = 0
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(0, 30))]
        text = "".join(stream(tokenizer, ids))
        assert text == tokenizer.decode(ids)
        whole = tokenizer._tokenizer.decode(ids)
        library_agrees += text == whole
        # Where bytes are no UTF-8, the library drops valid characters beside them too; nothing else may differ.
        assert text == whole or "\ufffd" in whole
    assert library_agrees > 40


def test_a_cut_character_ends_as_one_replacement(tokenizer: Tokenizer):
    ids = tokenizer.encode("x🙂", add_special_tokens=False)
    pieces = stream(tokenizer, ids[:-1])
    assert pieces[-1] == "\ufffd" and "".join(pieces).strip() == "x\ufffd"


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer):
    assert tokenizer.eos_token is not None
    ids = [
        *tokenizer.encode("x", add_special_tokens=False),
        *tokenizer.encode(tokenizer.eos_token, add_special_tokens=False),
    ]
    assert tokenizer.decode(ids).strip() == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False).strip() == "x" + tokenizer.eos_token


@pytest.mark.parametrize("token", [-1, 10**6, 2**70, True, 1.0, None, "1", [1]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: object):
    tokenizer.decode([1])
    with pytest.raises(InvalidInput, match="no token id"):
        tokenizer.decode([1, token])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="no token id"):
        tokenizer.detokenizer().add(token)  # type: ignore[arg-type]


def test_a_long_answer_costs_the_same_per_token():
    asked = []
    detokenizer = StreamingDetokenizer(
        lambda token: asked.append(token) or "a",
        TokenByteDecoder({"type": "ByteLevel"}),
        lambda tokens: pytest.fail("decoded all"),
    )
    text = "".join(detokenizer.add(1) for _ in range(20_000)) + detokenizer.finish()
    assert len(text) == len(asked) == 20_000
    assert detokenizer._pending_tokens == []


DECODERS = [
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Fuse"},
        ],
    },
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "▁", "start": 2, "stop": 0}],
    },
    {
        "type": "Sequence",
        "decoders": [{"type": "Strip", "content": "▁", "start": 1, "stop": 0}, {"type": "Fuse"}],
    },
    {"type": "ByteFallback"},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True},
    None,
]


@pytest.mark.parametrize(
    "decoder", DECODERS, ids=lambda decoder: "none" if decoder is None else decoder["type"]
)
def test_every_kind_of_decoder_gives_what_the_library_gives(decoder: dict | None):
    vocabulary = ["▁a", "▁▁b", "c", "##d", "<0x41>", "▁", "e▁f", "x", "|", "g</w>"]
    model = tokenizers.models.WordLevel(
        {token: index for index, token in enumerate(vocabulary)}, unk_token="x"
    )
    library = tokenizers.Tokenizer(model)
    if decoder is not None:
        library = tokenizers.Tokenizer.from_str(
            json.dumps({**json.loads(library.to_str()), "decoder": decoder})
        )
    draw = random.Random(2)
    for _ in range(100):
        ids = [draw.randrange(len(vocabulary)) for _ in range(draw.randint(1, 8))]
        detokenizer = StreamingDetokenizer(
            library.id_to_token, TokenByteDecoder(decoder), library.decode
        )
        assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == library.decode(ids), (
            ids
        )


@pytest.mark.parametrize("word", ["café", "São Paulo", "đem", "čaj", "日本"])
def test_an_added_token_of_latin_letters_is_text(word: str):
    document = json.loads((FOLDERS / "llama3" / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"].append(document["added_tokens"][-1] | {"id": 466, "content": word})
    document["added_tokens"][-1]["special"] = False
    tokenizer = Tokenizer(load_tokenizer_json(json.dumps(document).encode(), "tokenizer.json"))
    text = f"the {word} x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.token_id(word) in ids
    assert "".join(stream(tokenizer, ids)) == text


def test_a_continuation_keeps_its_blank(tokenizer: Tokenizer):
    for before in ("the time", "", " ", "x\n"):
        for words in (" and", "and", "  two"):
            prompt = tokenizer.encode(before)
            new = tokenizer.encode("x" + words, add_special_tokens=False)[1:]
            detokenizer = tokenizer.detokenizer(after=prompt)
            text = "".join([*map(detokenizer.add, new), detokenizer.finish()])
            assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *new])


def test_a_blank_is_lost_without_what_comes_before():
    tokenizer = Tokenizer.from_folder(FOLDERS / "mistral")
    prompt = tokenizer.encode("the")
    assert "".join(stream(tokenizer, prompt)) == "the"
    detokenizer = tokenizer.detokenizer(after=prompt)
    again = tokenizer.encode("the", add_special_tokens=False)
    assert "".join([*map(detokenizer.add, again), detokenizer.finish()]) == " the"


@pytest.mark.parametrize("name", ["mistral", "llama3"])
def test_a_decoder_that_cannot_stream_continues_as_well(name: str):
    document = json.loads((FOLDERS / name / "tokenizer.json").read_text(encoding="utf-8"))
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    decoders = {"type": "Sequence", "decoders": [document["decoder"], wordpiece]}
    data = json.dumps(document | {"decoder": decoders}).encode()
    tokenizer = Tokenizer(load_tokenizer_json(data, "tokenizer.json"))
    prompt = tokenizer.encode("the time")
    new = tokenizer.encode("and more", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(after=prompt)
    text = "".join([*map(detokenizer.add, new), detokenizer.finish()])
    assert text and tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *new])
