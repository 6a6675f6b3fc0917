"""Tokenizers rebuilt from GGUF metadata, in the engines that the product runs them in."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlxarch.checkpoint.gguf.tokenizer import PRE_TOKENIZERS, Vocabulary, tokenizer_files
from mlxarch.errors import TokenizerError
from mlxarch.tokenizer.tokenizer import Tokenizer as OurTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it's over: 12 345 times in 2024.",
    "def f(x):\n    return x ** 2  # 10 20 30\n\n\n",
    "Größe, Straße, été; Привет мир; 你好,世界; नमस्ते; مرحبا ٣٤; 🙂🙂",
] * 3
TEXTS = [
    *CORPUS[:3],
    *(
        "",
        " ",
        "  two",
        "a  b\n\n c\t",
        "it's IT'S we'll",
        "12345678",
        "x1y22z333",
        "½ ²",
        " \n 7",
        "e\u0301te\u0301",
        "🙂 👩‍👩‍👧",
    ),
    *(
        "<|im_start|>user\nhi<|im_end|>",
        "a<|im_end|>b",
        "<keep> me",
        "<0x41>",
        "\x00\x7f",
        "[PAD]",
        "สวัสดี 10",
    ),
]


@cache
def trained() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary and its merges, learned without any cutting, so that every cut shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([*CORPUS, *["it's IT'S 12345678 x22"] * 3], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [
        " ".join(pair) for pair in model["merges"]
    ]


def metadata(pre: str = "smollm", **keys) -> dict:
    tokens, merges = trained()
    extra = ["<|im_start|>", "<|im_end|>", "<keep>", "[PAD]"]
    usual = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*extra, *tokens],
        "token_type": [3, 3, 4, 5] + [1] * len(tokens),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 1,
    }
    found = {
        f"tokenizer.ggml.{key}": value for key, value in (usual | keys).items() if value is not None
    }
    return found | {"tokenizer.chat_template": "{{ messages[0].content }}"}


def files(keys: dict) -> dict[str, bytes]:
    return tokenizer_files(Vocabulary(keys, "file.gguf"))


def built(keys: dict) -> Tokenizer:
    return Tokenizer.from_str(files(keys)["tokenizer.json"].decode())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_text_comes_back_from_its_tokens(pre: str):
    tokenizer = built(metadata(pre, add_bos_token=False))
    for text in TEXTS:
        back = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        assert back == (text.replace("e\u0301", "é") if PRE_TOKENIZERS[pre].normalizer else text)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", " 12345", " IT", "'", "S", " x", "22", "\n ", " y"]),
        (
            "smollm",
            [
                "it",
                "'s",
                " ",
                "1",
                "2",
                "3",
                "4",
                "5",
                " IT",
                "'",
                "S",
                " x",
                "2",
                "2",
                "\n ",
                " y",
            ],
        ),
        ("llama-bpe", ["it", "'s", " ", "123", "45", " IT", "'S", " x", "22", "\n", " ", " y"]),
        (
            "qwen2",
            [
                "it",
                "'s",
                " ",
                "1",
                "2",
                "3",
                "4",
                "5",
                " IT",
                "'S",
                " x",
                "2",
                "2",
                "\n",
                " ",
                " y",
            ],
        ),
    ],
)
def test_a_text_is_cut_where_the_original_tokenizer_cuts_it(pre: str, pieces: list[str]):
    # llama.cpp cuts the same way: with each of the four its tokens were equal on 260 texts, but for Qwen2's NFC
    text = "it's 12345 IT'S x22\n  y"
    tokenizer = built(metadata(pre))
    assert tokenizer.pre_tokenizer is not None
    found = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_each_pre_tokenizer_gives_other_tokens_than_the_others():
    text = "IT'S 12345 e\u0301"
    names = ("gpt-2", "smollm", "llama-bpe", "qwen2")
    assert (
        len({tuple(built(metadata(pre, add_bos_token=False)).encode(text).ids) for pre in names})
        == 4
    )


def test_control_tokens_are_special_user_defined_ones_are_text_and_unused_ones_are_absent():
    tokenizer = built(metadata())
    ids = tokenizer.encode("<|im_start|>a<keep>b<|im_end|>").ids
    assert (ids[0], ids[2], ids[-1]) == (0, 2, 1)
    assert tokenizer.decode(ids) == "a<keep>b"
    assert tokenizer.id_to_token(3) is None and 3 not in tokenizer.encode("[PAD]").ids


def test_beginning_and_end_are_added_as_the_metadata_says_or_as_the_kind_has_it():
    def around(**keys) -> tuple[bool, bool]:
        ids = built(metadata(**keys)).encode("hello").ids
        return ids[0] == 0, ids[-1] == 1

    assert around(pre="smollm") == (False, False)
    assert around(pre="llama-bpe") == (True, False)
    assert around(pre="llama-bpe", add_bos_token=False) == (False, False)
    assert around(pre="smollm", add_bos_token=True, add_eos_token=True) == (True, True)


def test_a_word_that_is_a_token_is_not_merged_anew_in_llama_3():
    tokens, merges = trained()
    # "zqz" is in the vocabulary, and no merge makes it
    keys = {
        "tokens": [*tokens, "zqz", "<s>"],
        "token_type": [1] * (len(tokens) + 1) + [3],
        "merges": merges,
    }
    keys |= {
        "bos_token_id": None,
        "eos_token_id": None,
        "padding_token_id": None,
        "add_bos_token": False,
    }
    assert built(metadata("llama-bpe", **keys)).encode("zqz").ids == [len(tokens)]
    assert len(built(metadata("qwen2", **keys)).encode("zqz").ids) == 3


def test_the_settings_name_the_special_tokens_and_carry_the_template():
    settings = json.loads(files(metadata())["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<|im_start|>",
        *["<|im_end|>"] * 2,
    )
    assert settings["chat_template"] == "{{ messages[0].content }}"
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (False, False)
    assert [
        token["content"] for token in settings["added_tokens_decoder"].values() if token["special"]
    ] == [
        "<|im_start|>",
        "<|im_end|>",
    ]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def opened(keys: dict, folder: Path) -> OurTokenizer:
    for name, data in files(keys).items():
        (folder / name).write_bytes(data)
    return OurTokenizer.from_folder(folder)


@pytest.mark.parametrize("token_type", [1, 3, 4])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_tag_that_the_template_writes_is_a_token_and_its_last_one_ends_an_answer(
    model: str, token_type: int, tmp_path: Path
):
    count = 0
    if model == "gpt2":
        keys = metadata(eos_token_id=2)
        keys["tokenizer.ggml.token_type"] = [token_type, token_type, 4, 5] + [1] * len(trained()[0])
        ids = {"<|im_start|>": 0, "<|im_end|>": 1}
    else:
        processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(True))
        keys = of_sentencepiece(processor)
        count = len(keys["tokenizer.ggml.tokens"])
        keys["tokenizer.ggml.tokens"] += ["<|im_start|>", "<|im_end|>", "<b>"]
        keys["tokenizer.ggml.scores"] += [-1000.0] * 3
        keys["tokenizer.ggml.token_type"] += [token_type] * 2 + [1]
        ids = {"<|im_start|>": count, "<|im_end|>": count + 1}
    tokenizer = opened(keys | {"tokenizer.chat_template": CHATML}, tmp_path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt[0] == ids["<|im_start|>"] and ids["<|im_end|>"] in prompt
    assert ids["<|im_end|>"] in tokenizer.eos_ids
    assert "<|im_end|>" not in tokenizer.decode(prompt)
    # negative control: another tag of this type, which no template writes, is text
    assert model == "gpt2" or count + 2 not in tokenizer.encode("a<b>c")


def test_named_templates_are_kept(tmp_path: Path):
    named = {
        "tokenizer.chat_templates": ["tool_use", "rag", "missing"],
        "tokenizer.chat_template.tool_use": "TOOLS {{ tools | tojson }}",
        "tokenizer.chat_template.rag": "RAG",
    }
    tokenizer = opened(metadata() | named, tmp_path)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "x"
    prompt = tokenizer.apply_chat_template(messages, tools=[{"name": "t"}], tokenize=False)
    assert prompt == 'TOOLS [{"name": "t"}]'


@cache
def sentencepiece_model(byte_fallback: bool) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line] * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=420 if byte_fallback else 160,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<keep>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    return out.getvalue()


def of_sentencepiece(model: sentencepiece.SentencePieceProcessor, **keys) -> dict:
    """Metadata that llama.cpp's converter writes for a SentencePiece model."""
    kinds = [model.IsUnknown, model.IsControl, model.IsUnused, model.IsByte]
    numbers = [2, 3, 5, 6]
    types = []
    for piece in range(len(model)):
        hits = [number for number, test in zip(numbers, kinds, strict=True) if test(piece)]
        types.append(hits[0] if hits else 4 if model.IdToPiece(piece) == "<keep>" else 1)
    usual = {
        "model": "llama",
        "tokens": [model.IdToPiece(piece) for piece in range(len(model))],
        "scores": [model.GetScore(piece) for piece in range(len(model))],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return {
        f"tokenizer.ggml.{key}": value for key, value in (usual | keys).items() if value is not None
    }


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_sentencepiece_model_is_rebuilt_and_tokenizes_as_the_original(byte_fallback: bool):
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(byte_fallback))
    rebuilt = sentencepiece.SentencePieceProcessor(
        model_proto=files(of_sentencepiece(original))["tokenizer.model"]
    )
    texts = [*TEXTS, "aaaaaaaa", "the the  the", "<ctl>", "▁x"]
    assert [rebuilt.encode(text) for text in texts] == [original.encode(text) for text in texts]
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id()) == (1, 2, 0)
    assert len({tuple(original.encode(text)) for text in texts}) > len(texts) // 2
    keys = of_sentencepiece(original, add_space_prefix=False)
    plain = sentencepiece.SentencePieceProcessor(model_proto=files(keys)["tokenizer.model"])
    assert plain.encode("the") != original.encode("the")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "bert"}, "the tokenizer model 'bert' is unknown; known are 'gpt2' and 'llama'"),
        ({"model": None}, "the tokenizer model None is unknown"),
        (
            {"pre": "default"},
            "the pre-tokenizer 'default' is unknown; known are gpt-2, smollm, llama-bpe",
        ),
        ({"pre": None}, "the pre-tokenizer None is unknown"),
        ({"pre": ["gpt-2"]}, "is unknown; known are"),
        ({"tokens": None}, "tokens must be a list of str, found NoneType"),
        ({"tokens": [1, 2]}, "tokens must be a list of str"),
        ({"tokens": [], "token_type": []}, "it has 0 tokens"),
        ({"token_type": [1]}, "and 1 token types; they must be as many"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "the token 'a' occurs twice"),
        ({"merges": None}, "merges must be a list of str"),
        ({"merges": ["a"]}, "the merge 'a' does not join two tokens to a third"),
        ({"merges": ["a nowhere"]}, "the merge 'a nowhere' does not join"),
        ({"merges": ["z |"]}, "the merge 'z |' does not join"),
        ({"eos_token_id": [1]}, "eos_token_id must be a whole number, found [1]"),
        ({"padding_token_id": "x"}, "padding_token_id must be a whole number, found 'x'"),
        (
            {"add_bos_token": True, "bos_token_id": 10**6},
            "add_bos_token is set, and there is no bos_token_id",
        ),
        ({"add_bos_token": 1}, "add_bos_token must be a boolean"),
        (
            {"add_bos_token": True, "bos_token_id": None},
            "add_bos_token is set, and there is no bos_token_id",
        ),
        ({"model": "llama"}, "scores must be a list of float"),
        ({"model": "llama", "scores": [0.0]}, "and 1 scores; they must be as many"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_exactly_is_refused_by_name(keys: dict, message: str):
    with pytest.raises(TokenizerError) as caught:
        files(metadata(**keys))
    assert message in str(caught.value) and str(caught.value).startswith("file.gguf: ")


@pytest.mark.parametrize("token", [-1, 10**6, 2**32 - 1])
@pytest.mark.parametrize("name", ["padding", "bos", "eos"])
def test_an_id_that_is_no_token_counts_for_nothing(
    name: str, token: int, caplog: pytest.LogCaptureFixture
) -> None:
    without: dict[str, Any] = {f"{name}_token_id": None}
    wrong: dict[str, Any] = {f"{name}_token_id": token}
    assert files(metadata(**wrong)) == files(metadata(**without))
    assert f"{name}_token_id is {token}, which is none of" in caplog.text
