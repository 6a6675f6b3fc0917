"""Ids, decoded texts, special and end tokens against references that transformers wrote (tokenizer_reference.json)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import InvalidInput, MlxArchError, TokenizerError
from mlxarch.tokenizer import tokenizer as module
from mlxarch.tokenizer.load_json import translate_panics
from mlxarch.tokenizer.tokenizer import Tokenizer

FOLDERS = Path(__file__).parents[2] / "fixtures" / "tokenizers"
NAMES = ["gemma2", "llama3", "mistral", "qwen3"]


def reference(name: str) -> dict[str, Any]:
    return json.loads((FOLDERS / name / "tokenizer_reference.json").read_text(encoding="utf-8"))


def copied(tmp_path: Path, name: str, *without: str, **changes: Any) -> Path:
    """A copy of a fixture; ``tokenizer_config={...}`` updates tokenizer_config.json, a value of None drops a key."""
    folder = tmp_path / name
    shutil.copytree(FOLDERS / name, folder)
    for file in without:
        (folder / file).unlink(missing_ok=True)
    for stem, update in changes.items():
        path = folder / f"{stem}.json"
        content = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | update
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )
    return folder


def check_against(tokenizer: Tokenizer, expected: dict[str, Any]) -> None:
    for sample in expected["samples"]:
        assert tokenizer.encode(sample["text"]) == sample["ids"], sample["text"]
        plain = tokenizer.encode(sample["text"], add_special_tokens=False)
        assert plain == sample["ids_no_special"], sample["text"]
        assert tokenizer.decode(plain, skip_special_tokens=False) == sample["decoded"], sample[
            "text"
        ]
    messages = expected["chat"]["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected["chat"]["text"]
    assert tokenizer.apply_chat_template(messages) == expected["chat"]["ids"]
    assert tokenizer.vocab_size == expected["len"]
    assert tokenizer.bos_id == expected["bos_id"]
    assert expected["eos_id"] in tokenizer.eos_ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_texts_and_chats_equal_the_reference(name: str):
    check_against(Tokenizer.from_folder(FOLDERS / name), reference(name))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_sentencepiece_model_alone_gives_the_same(tmp_path: Path, name: str):
    check_against(Tokenizer.from_folder(copied(tmp_path, name, "tokenizer.json")), reference(name))


def test_the_reference_of_one_model_does_not_fit_another():
    with pytest.raises(AssertionError):
        check_against(Tokenizer.from_folder(FOLDERS / "qwen3"), reference("llama3"))


def test_a_sentencepiece_model_names_its_special_tokens_itself(tmp_path: Path):
    folder = copied(
        tmp_path, "gemma2", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token, tokenizer.bos_id, tokenizer.eos_token) == ("<bos>", 2, "<eos>")
    assert tokenizer.encode("Hello world") == reference("gemma2")["samples"][0]["ids"]


def test_end_tokens_are_collected_from_every_file_and_the_template(tmp_path: Path):
    # ids 461, 463 and 464 are <|end_of_text|>, <|im_end|> and <|eot_id|>; the template is ChatML
    folder = copied(
        tmp_path,
        "llama3",
        config={"eos_token_id": 5, "text_config": {"eos_token_id": [6]}},
        generation_config={"eos_token_id": [7, 464]},
    )
    assert Tokenizer.from_folder(folder).eos_ids == {5, 6, 7, 461, 463, 464}


def test_known_ends_of_turn_serve_where_no_template_shows_one(tmp_path: Path):
    folder = copied(
        tmp_path,
        "llama3",
        "generation_config.json",
        "config.json",
        tokenizer_config={"chat_template": None},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {461, 463, 464} and not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_template_decides_which_end_of_turn_counts(tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}{{ '<|eot_id|>' if m.role == 'assistant' }}{% endfor %}"
    settings = {"chat_template": template}
    folder = copied(
        tmp_path, "llama3", "generation_config.json", "config.json", tokenizer_config=settings
    )
    assert Tokenizer.from_folder(folder).eos_ids == {461, 464}  # and not 463, <|im_end|>


def test_a_tool_call_ends_an_answer_where_a_harmony_template_shows_its_end(tmp_path: Path):
    added = {
        str(465 + i): {"content": text, "special": True}
        for i, text in enumerate(["<|return|>", "<|call|>", "<|end|>"])
    }
    template = "{% for m in messages %}{{ m.content }}<|return|>{% endfor %}"
    folder = copied(tmp_path, "llama3", "generation_config.json", "config.json")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "chat_template": template,
        "added_tokens_decoder": settings["added_tokens_decoder"] | added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(folder).eos_ids == {461, 465, 466}


def test_end_tokens_that_do_not_exist_are_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = copied(
        tmp_path, "qwen3", generation_config={"eos_token_id": [-1, 10**9, True, "x", 462]}
    )
    assert Tokenizer.from_folder(folder).eos_ids == {462}
    assert "[-1, 1000000000]" in caplog.text


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_config_decides_whether_a_text_starts_with_bos(tmp_path: Path, add_bos: bool):
    tokenizer = Tokenizer.from_folder(
        copied(tmp_path, "llama3", tokenizer_config={"add_bos_token": add_bos})
    )
    assert tokenizer.encode("x") == ([460] if add_bos else []) + tokenizer.encode(
        "x", add_special_tokens=False
    )


def test_without_a_word_in_the_config_tokenizer_json_decides(tmp_path: Path):
    llama3 = Tokenizer.from_folder(
        copied(tmp_path, "llama3", tokenizer_config={"add_bos_token": None})
    )
    assert llama3.encode("x")[0] == llama3.bos_id == 460
    qwen3 = Tokenizer.from_folder(
        copied(tmp_path, "qwen3", tokenizer_config={"add_bos_token": None})
    )
    assert qwen3.encode("x") == qwen3.encode("x", add_special_tokens=False) and qwen3.bos_id is None


def test_eos_is_added_where_the_config_wants_it(tmp_path: Path):
    settings = {"add_bos_token": True, "add_eos_token": True}
    tokenizer = Tokenizer.from_folder(copied(tmp_path, "mistral", tokenizer_config=settings))
    ids = tokenizer.encode("x")
    assert (ids[0], ids[-1]) == (1, 2)


def test_a_chat_prompt_starts_with_one_bos():
    tokenizer = Tokenizer.from_folder(FOLDERS / "mistral")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids.count(1) == 1 and ids[0] == 1
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer.encode(text).count(1) == 2  # what encoding the text as any other would do


def test_tokens_that_only_the_config_knows_are_added(tmp_path: Path):
    folder = copied(tmp_path, "qwen3")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["463"] = {
        "content": "<tool>",
        "special": False,
        "normalized": False,
    }
    settings["added_tokens_decoder"]["464"] = {"content": "<hidden>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<tool><hidden>") == [463, 464]
    assert tokenizer.decode([463, 464]) == "<tool>" and tokenizer.vocab_size == 465


def test_rows_of_the_embedding_beyond_the_tokenizer_stand_for_no_text(tmp_path: Path):
    tokenizer = Tokenizer.from_folder(copied(tmp_path, "qwen3", config={"vocab_size": 500}))
    assert tokenizer.vocab_size == 463
    assert tokenizer.decode([*tokenizer.encode("x"), 499]) == "x"
    with pytest.raises(InvalidInput, match="from 0 to 499"):
        tokenizer.decode([500])


def test_text_with_half_a_surrogate_pair_is_refused():
    tokenizer = Tokenizer.from_folder(FOLDERS / "qwen3")
    with pytest.raises(TokenizerError, match=r"U\+D800\) at character 3"):
        tokenizer.encode("abc\ud800")


def test_text_that_is_no_text_is_refused():
    tokenizer = Tokenizer.from_folder(FOLDERS / "qwen3")
    for text in (None, b"x", 5, ["x"]):
        with pytest.raises(InvalidInput, match="cannot be encoded"):
            tokenizer.encode(text)  # type: ignore[arg-type]


def test_a_text_is_measured_in_bytes_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.from_folder(FOLDERS / "qwen3")
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 12)
    assert len(tokenizer.encode("é" * 6)) > 0
    with pytest.raises(TokenizerError, match="14 bytes in UTF-8; at most 12"):
        tokenizer.encode("é" * 7)


def test_special_tokens_in_a_text_become_tokens():
    tokenizer = Tokenizer.from_folder(FOLDERS / "qwen3")
    assert tokenizer.encode("<|im_end|>") == [462] and tokenizer.token_id("<|im_end|>") == 462
    assert tokenizer.token_id("<|nothing|>") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "there is no tokenizer"),
        ("tokenizer.json", b"", "not a tokenizer.json"),
        ("tokenizer.json", b"[]", "not a tokenizer.json"),
        ("tokenizer.json", b"[" * 100_000, "not a tokenizer.json"),
        ("tokenizer.json", b'{"model": "\xff"}', "not a tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 1}}}', "not a tokenizer.json"),
        ("tokenizer_config.json", b"[1]", "must be an object"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', "twice"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', None),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "added_tokens_decoder",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"1": {"content": 5}}}',
            "added_tokens_decoder",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "a"}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 7}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"bos_token": ["x"], "eos_token": {"content": 5}}', None),
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', None),
        ("config.json", b'{"eos_token_id": 1.5, "vocab_size": "x", "text_config": 3}', None),
    ],
)
def test_broken_files_are_refused_or_harmless(
    tmp_path: Path, name: str, content: bytes | None, message: str | None
):
    folder = copied(tmp_path, "qwen3")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    if message is None:
        assert Tokenizer.from_folder(folder).eos_ids is not None
    else:
        with pytest.raises(TokenizerError, match=message) as caught:
            Tokenizer.from_folder(folder)
        assert str(folder) in str(caught.value) or name == "tokenizer_config.json"


def test_files_that_lead_out_of_the_folder_are_refused(tmp_path: Path):
    folder = copied(tmp_path, "qwen3", "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(FOLDERS / "qwen3" / "tokenizer.json")
    with pytest.raises(MlxArchError, match="symbolic link"):
        Tokenizer.from_folder(folder)


def test_an_interrupt_passes_through_and_a_panic_does_not():
    panic = type("PanicException", (BaseException,), {})
    for through in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(through), translate_panics("testing"):
            raise through
    for caught in (panic("boom"), ValueError("boom"), MemoryError("boom")):
        with (
            pytest.raises(TokenizerError, match="testing failed: 'boom'"),
            translate_panics("testing"),
        ):
            raise caught


def test_importing_it_loads_no_array_library_and_no_framework():
    heavy = ("mlx", "numpy", "sentencepiece", "torch", "transformers", "huggingface_hub")
    code = f"import sys, mlxarch.tokenizer.tokenizer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
