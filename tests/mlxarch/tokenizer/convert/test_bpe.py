"""Vocabularies in their publishers' own files against tiktoken, mistral-common and transformers (golden.json)."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from mlxarch.errors import TokenizerError
from mlxarch.tokenizer import byte_level
from mlxarch.tokenizer.convert import bpe as convert_bpe
from mlxarch.tokenizer.tokenizer import Tokenizer

FOLDERS = Path(__file__).parents[3] / "fixtures" / "tokenizers"
NAMES = ["kimi", "grok2", "tekken", "gpt2"]
TEXTS = json.loads((FOLDERS / "texts.json").read_text(encoding="utf-8"))
# mistral-common keeps what a person writes apart from special tokens; here, as in transformers, a text may hold them
AS_TEXT = {"[INST] hi [/INST]", "</s>"}


def golden(name: str) -> list[list[int]]:
    return json.loads((FOLDERS / name / "golden.json").read_text())


def differing(tokenizer: Tokenizer, name: str) -> set[str]:
    return {
        text for text, ids in zip(TEXTS, golden(name), strict=True) if tokenizer.encode(text) != ids
    }


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(FOLDERS / name, tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_references(name: str) -> None:
    tokenizer = Tokenizer.from_folder(FOLDERS / name)
    assert differing(tokenizer, name) == (AS_TEXT if name == "tekken" else set())
    for text in TEXTS:
        assert (
            tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False
            )
            == text
        )


@pytest.mark.parametrize(
    ("name", "constant", "other"),
    [
        ("kimi", "KIMI_PATTERN", byte_level.KIMI_PATTERN.replace(r"&&[^\p{Han}]", "")),
        ("kimi", "KIMI_PATTERN", byte_level.QWEN_PATTERN),
        ("grok2", "QWEN_PATTERN", byte_level.GPT4_PATTERN),
    ],
)
def test_another_regular_expression_gives_other_ids(
    name: str, constant: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level, constant, other)
    assert len(differing(Tokenizer.from_folder(FOLDERS / name), name)) >= 2


def test_kimi_knows_its_special_tokens_by_the_ids_of_its_config() -> None:
    tokenizer = Tokenizer.from_folder(FOLDERS / "kimi")
    assert tokenizer.encode("[BOS]a<|im_middle|>") == [420, 97, 437]
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (420, 438)
    assert tokenizer.eos_ids == {421, 422}  # [EOS] and <|im_end|>
    assert tokenizer.decode([97, 437, 98]) == "ab"


def test_grok_has_the_conversation_of_its_makers_server() -> None:
    tokenizer = Tokenizer.from_folder(FOLDERS / "grok2")
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": " Hello"},
        {"role": "user", "content": "Bye"},
    ]
    expected = "System: Be brief.<|separator|>\n\nHuman: Hi<|separator|>\n\nAssistant:  Hello<|separator|>\n\n"
    expected += "Human: Bye<|separator|>\n\nAssistant:"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.eos_ids == {1, 2}  # <|separator|>, which ends a turn, and <|eos|>


def test_tekken_has_the_conversation_of_mistral_common() -> None:
    tokenizer = Tokenizer.from_folder(FOLDERS / "tekken")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    expected = (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST] Hi [/INST]Hello</s>[INST]Bye[/INST]"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.token_id("[INST]")) == (1, {2}, 3)
    assert tokenizer.encode("<SPECIAL_999>")[1:] == [999] and tokenizer.decode([999]) == ""
    with pytest.raises(TokenizerError, match="no tools"):
        tokenizer.apply_chat_template(messages, tools=[{"type": "function"}])


def test_a_template_of_the_model_comes_before_the_one_that_is_built_in(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("tekken")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = Tokenizer.from_folder(folder)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    )


def test_a_list_of_special_tokens_counts_where_the_file_has_one(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("tekken")
    file = json.loads((folder / "tekken.json").read_text())
    file["special_tokens"] = [
        {"rank": 1, "token_str": "<begin>"},
        {"rank": 7, "token_str": "<seven>"},
    ]
    (folder / "tekken.json").write_text(json.dumps(file))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<seven><SPECIAL_2>") == [1, 7, 2] and tokenizer.bos_token == "<begin>"


def test_qwens_vocabulary_and_merges_alone_give_what_its_tokenizer_json_gives(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("qwen3")
    whole = Tokenizer.from_folder(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_bytes("\r\n".join(["#version: 0.2", *merges, ""]).encode())
    alone = Tokenizer.from_folder(folder)
    assert [alone.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]
    assert (alone.vocab_size, alone.eos_ids, alone.bos_id) == (
        whole.vocab_size,
        whole.eos_ids,
        whole.bos_id,
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "GPT2Tokenizer"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    as_gpt2 = Tokenizer.from_folder(folder)  # negative control
    assert [as_gpt2.encode(text) for text in TEXTS] != [whole.encode(text) for text in TEXTS]


# Mistral's regular expression ---------------------------------------------------------------------------------------


def tekken_as_tokenizer_json(
    folder: Path, pre_tokenizer: dict[str, Any] | None, **changes: Any
) -> Path:
    """A conversion of tekken.json; ``changes`` are of the vocabulary."""
    converted = convert_bpe.convert_tekken((FOLDERS / "tekken" / "tekken.json").read_bytes())
    document = json.loads(converted.tokenizer_json) | {"pre_tokenizer": pre_tokenizer}
    document["model"]["vocab"] |= changes
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(converted.tokenizer_config))
    return folder


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        byte_level.pre_tokenizer_section(byte_level.GPT4_PATTERN),
        byte_level.pre_tokenizer_section(None),
        byte_level.pre_tokenizer_section(byte_level.TEKKEN_PATTERN),
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        None,
    ],
)
def test_a_conversion_with_another_models_words_is_corrected(
    pre_tokenizer: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = tekken_as_tokenizer_json(tmp_path, pre_tokenizer)
    assert differing(Tokenizer.from_folder(folder), "tekken") == AS_TEXT
    library = tokenizers.Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )  # negative control: it is needed
    wrong = [
        text
        for text, ids in zip(TEXTS, golden("tekken"), strict=True)
        if library.encode(text).ids != ids
    ]
    assert (len(wrong) > 5) == (
        pre_tokenizer != byte_level.pre_tokenizer_section(byte_level.TEKKEN_PATTERN)
    )


def test_a_vocabulary_that_is_not_mistrals_keeps_its_words(tmp_path: Path) -> None:
    folder = tekken_as_tokenizer_json(
        tmp_path,
        byte_level.pre_tokenizer_section(byte_level.GPT4_PATTERN),
        **{"Ā": 1001, "ā": 1000},
    )
    assert Tokenizer.from_folder(folder).encode("HTTPServer 123") != Tokenizer.from_folder(
        FOLDERS / "tekken"
    ).encode("HTTPServer 123")


# Broken files -------------------------------------------------------------------------------------------------------


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + f" {rank}\n".encode()


BYTES = b"".join(line(bytes([byte]), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the byte 0 is no token"),
        (BYTES[:-7], "line 256|the byte 255"),
        (BYTES + b"*** 256\n", "line 257 is not base64"),
        (BYTES + b"YWI=\n", "line 257"),
        (BYTES + line(b"ab", -1), "line 257"),
        (BYTES + line(b"ab", "9" * 5000), "line 257"),
        (BYTES + line(b"ab", "1 2"), "line 257"),
        (BYTES + line(b"ab", 255), "twice"),
        (BYTES + line(b"a", 256), "twice"),
        (BYTES + line(b"[BOS]", 256), "twice"),
        (BYTES + line(b"ab", 422), "twice"),
        (BYTES + line(b"ab", 2**24), "outside"),
        (BYTES + line(b"", 256), "1 to 512 bytes"),
        (BYTES + line(b"x" * 513, 256), "1 to 512 bytes"),
    ],
)
def test_a_broken_tiktoken_file_is_refused(
    content: bytes, message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("kimi")
    (folder / "tiktoken.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_tokens_that_would_take_hours_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("kimi")
    many = b"".join(
        line(index.to_bytes(4, "big") + bytes(508), 1000 + index) for index in range(33_000)
    )
    (folder / "tiktoken.model").write_bytes(BYTES + many)
    with pytest.raises(TokenizerError, match="together at most"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("whose", [None, "QWenTokenizer", 5, ["TikTokenTokenizer"]])
def test_a_tiktoken_file_of_another_model_is_refused(
    whose: Any, copied: Callable[[str], Path]
) -> None:
    folder = copied("kimi")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": whose}))
    with pytest.raises(TokenizerError, match="Kimi"):
        Tokenizer.from_folder(folder)


def changed(
    name: str, file: str, change: Callable[[dict[str, Any]], object]
) -> tuple[str, str, Any]:
    return name, file, change


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (*changed("tekken", "tekken.json", lambda f: f.pop("config")), "not of its form"),
        (
            *changed("tekken", "tekken.json", lambda f: f["config"].update(pattern="(a+)+")),
            "repeats",
        ),
        (*changed("tekken", "tekken.json", lambda f: f["config"].update(pattern="(")), "lacks a"),
        (
            *changed("tekken", "tekken.json", lambda f: f["config"].update(default_vocab_size=999)),
            "cannot be",
        ),
        (
            *changed(
                "tekken", "tekken.json", lambda f: f["config"].update(default_vocab_size=10**6)
            ),
            "cannot be",
        ),
        (
            *changed(
                "tekken", "tekken.json", lambda f: f["config"].update(default_num_special_tokens=-5)
            ),
            "cannot be",
        ),
        (
            *changed("tekken", "tekken.json", lambda f: f["vocab"][0].update(token_bytes="*")),
            "base64",
        ),
        (*changed("tekken", "tekken.json", lambda f: f["vocab"][300].update(rank=301)), "twice"),
        (
            *changed("grok2", "tokenizer.tok.json", lambda f: f.update(word_split="V2")),
            "word_split is 'V2'",
        ),
        (
            *changed(
                "grok2", "tokenizer.tok.json", lambda f: f["regular_tokens"][0].update(bytes=[256])
            ),
            "form",
        ),
        (
            *changed(
                "grok2", "tokenizer.tok.json", lambda f: f["special_tokens"][0].update(bytes=[255])
            ),
            "UTF-8",
        ),
        (
            *changed(
                "grok2", "tokenizer.tok.json", lambda f: f["special_tokens"][0].update(token=7)
            ),
            "twice",
        ),
        (*changed("gpt2", "config.json", lambda f: f.update(model_type="roberta")), "'roberta'"),
        (*changed("gpt2", "vocab.json", lambda f: f.update(a="1")), "not of its form"),
        (*changed("gpt2", "vocab.json", lambda f: f.update(a=-1)), "outside"),
    ],
)
def test_a_broken_json_file_is_refused(
    name: str,
    file: str,
    change: Callable[[dict[str, Any]], object],
    message: str,
    copied: Callable[[str], Path],
) -> None:
    folder = copied(name)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a b c\n", "no pair"), (b"abc\n", "no pair"), (b"\xff\n", "UTF-8"), (b"zz qq\n", "failed")],
)
def test_broken_merges_are_refused(
    content: bytes, message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("gpt2")
    (folder / "merges.txt").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_a_vocabulary_without_merges_is_no_tokenizer(copied: Callable[[str], Path]) -> None:
    folder = copied("gpt2")
    (folder / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        Tokenizer.from_folder(folder)
