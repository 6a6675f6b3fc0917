"""Ids, decoded texts, special and end tokens against references that transformers wrote (tokenizer_reference.json)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import InvalidInput, MlxArchError, TokenizerError
from mlxarch.tokenizer import encoder as module
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
    folder = copied(tmp_path, name, "tokenizer.json", tokenizer_config={"legacy": True})
    check_against(Tokenizer.from_folder(folder), reference(name))


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
    # 5 and 6 are ordinary words: ends of before the finetune that made generation_config.json
    assert Tokenizer.from_folder(folder).eos_ids == {7, 461, 463, 464}
    (folder / "generation_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_ids == {5, 6, 461, 463}


def test_an_end_of_config_json_that_is_an_added_token_counts_beside_others(tmp_path: Path):
    folder = copied(
        tmp_path,
        "llama3",
        config={"eos_token_id": [462, 5]},
        generation_config={"eos_token_id": 464},
    )
    assert 462 in Tokenizer.from_folder(folder).eos_ids


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def older_folder(tmp_path: Path, kind: str, **files: Any) -> tuple[Path, int]:
    """A folder without tokenizer.json, and the number of its tokens; ``files`` are JSON files."""
    folder = tmp_path / kind
    folder.mkdir(parents=True)
    if kind == "gpt2":
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(FOLDERS / "gpt2" / name, folder)
        count = max(json.loads((folder / "vocab.json").read_text()).values()) + 1
    else:
        shutil.copy(FOLDERS / "mistral" / "tokenizer.model", folder)
        count = Tokenizer.from_folder(folder).vocab_size
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder, count


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
@pytest.mark.parametrize("gap", [0, 5])
def test_added_tokens_json_gives_ids_in_folders_without_tokenizer_json(
    tmp_path: Path, kind: str, gap: int
):
    _, count = older_folder(tmp_path / "plain", kind)
    start, end, tool = (count + gap + i for i in range(3))
    folder, _ = older_folder(
        tmp_path,
        kind,
        added_tokens={"<|im_end|>": end, "<|im_start|>": start, "<tool>": tool},
        config={"model_type": kind, "vocab_size": count + 64},
        tokenizer_config={"eos_token": "<|im_end|>", "chat_template": CHATML, "legacy": False},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
    )
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the time"}])
    assert (ids[0], end in ids, end in tokenizer.eos_ids) == (start, True, True)
    middle = tokenizer.encode("a<tool>b", add_special_tokens=False)
    assert tool in middle
    shown = tokenizer.decode([start, *middle, end])
    assert shown.strip() == "a<tool>b"  # not named as special, so it is shown


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_a_named_token_without_an_id_gets_the_next_one_if_the_model_has_a_row_for_it(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    names = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    for rows, expected in ((64, 0), (1, 1), (0, 2)):
        _, count = older_folder(tmp_path / f"plain{rows}", kind)
        config = {"model_type": kind, "vocab_size": count + rows}
        place = tmp_path / str(rows)
        folder, _ = older_folder(place, kind, config=config, tokenizer_config=names)
        tokenizer = Tokenizer.from_folder(folder)
        found = [tokenizer.token_id(text) for text in ("<|im_end|>", "<|im_start|>")]
        assert found == [count, count + 1][: 2 - expected] + [None] * expected
        assert caplog.text.count("no id left") == expected
        caplog.clear()
        assert (count in tokenizer.eos_ids) == (expected < 2)


def test_special_tokens_with_names_of_their_own_reach_the_template(tmp_path: Path):
    settings = {
        "chat_template": "{{ image_token }}{{ audio_token }}{{ messages[0].content }}",
        "image_token": "<image>",
        "extra_special_tokens": {"audio_token": {"content": "<audio>"}},
    }
    tokenizer = Tokenizer.from_folder(copied(tmp_path, "qwen3", tokenizer_config=settings))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<image><audio>x"


def test_the_older_files_count_in_full_without_added_tokens_decoder(tmp_path: Path):
    special_tokens_map = {"eos_token": "<|eot_id|>"}
    for index, (listed, expected) in enumerate(((None, "<|eot_id|>"), ({}, "<|end_of_text|>"))):
        settings = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": listed}
        folder = copied(
            tmp_path / str(index),
            "llama3",
            special_tokens_map=special_tokens_map,
            tokenizer_config=settings,
        )
        assert Tokenizer.from_folder(folder).eos_token == expected


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "vocabulary"])
def test_the_end_of_a_turn_ends_an_answer_and_is_hidden_though_not_special(
    tmp_path: Path, where: str
):
    # 463 and 464 are <|im_end|> and <|eot_id|>, the template is ChatML
    folder = copied(tmp_path, "llama3", "generation_config.json", "config.json")
    document = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = settings["added_tokens_decoder"]
    if where == "tokenizer.json":
        next(t for t in document["added_tokens"] if t["id"] == 463)["special"] = False
        listed = {}
    elif where == "tokenizer_config.json":
        listed["463"]["special"] = False
    else:
        document["model"]["vocab"] |= {t["content"]: t["id"] for t in document["added_tokens"]}
        document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] != 463]
        listed = {}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"added_tokens_decoder": listed})
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {461, 463}  # and not 464, which is special
    shown = "<|im_end|>" if where == "vocabulary" else ""
    assert tokenizer.decode([87, 463]) == "x" + shown


def test_an_ordinary_word_behind_an_answer_does_not_end_it(tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}d{% endfor %}"
    settings = {"chat_template": template}
    tokenizer = Tokenizer.from_folder(copied(tmp_path, "llama3", tokenizer_config=settings))
    assert tokenizer.token_id("d") is not None
    assert tokenizer.token_id("d") not in tokenizer.eos_ids


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


def test_ids_of_added_tokens_that_the_library_replaces_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = copied(tmp_path, "qwen3")
    Tokenizer.from_folder(folder)
    assert "differs from the one" not in caplog.text
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    token = {**document["added_tokens"][-1], "content": "<|far|>", "id": 9000}
    document["added_tokens"].append(token)
    path.write_text(json.dumps(document))
    found = Tokenizer.from_folder(folder).token_id("<|far|>")
    assert found != 9000
    assert f"in the file: 1; '<|far|>' has {found}, not 9000" in caplog.text


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_tokenizer_json_decides_about_bos_and_eos(
    tmp_path: Path, name: str, wanted: bool | None, tokenizer_class: str
):
    settings = {name: wanted, "tokenizer_class": tokenizer_class}
    llama3 = Tokenizer.from_folder(copied(tmp_path, "llama3", tokenizer_config=settings))
    assert llama3.encode("x") == [460, *llama3.encode("x", add_special_tokens=False)]
    qwen3 = Tokenizer.from_folder(copied(tmp_path, "qwen3", tokenizer_config=settings))
    assert qwen3.encode("x") == qwen3.encode("x", add_special_tokens=False)


def test_without_tokenizer_json_the_config_decides(tmp_path: Path):
    ends = {
        (None, None): (True, False),
        (None, False): (True, False),  # a missing key is not false
        (None, True): (True, True),
        (False, None): (False, False),
        (True, True): (True, True),
    }
    for index, ((add_bos, add_eos), expected) in enumerate(ends.items()):
        settings = {"add_bos_token": add_bos, "add_eos_token": add_eos}
        folder = copied(
            tmp_path / str(index), "mistral", "tokenizer.json", tokenizer_config=settings
        )
        ids = Tokenizer.from_folder(folder).encode("x")
        assert (ids[0] == 1, ids[-1] == 2) == expected, settings


def test_the_blank_in_front_of_a_text_is_where_the_config_wants_it(tmp_path: Path):
    texts = []
    for index, settings in enumerate(
        ({"legacy": True}, {"legacy": False}, {"add_prefix_space": False})
    ):
        folder = copied(
            tmp_path / str(index), "mistral", "tokenizer.json", tokenizer_config=settings
        )
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("the[INST]the", add_special_tokens=False)
        spelled = {index: token for token, index in tokenizer.vocabulary.items()}
        texts.append("".join(spelled[index] for index in ids))
        assert tokenizer.decode(ids, skip_special_tokens=False).startswith("the[INST]")
    assert texts == ["▁the[INST]▁the", "▁the[INST]the", "the[INST]the"]


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
    (folder / "tokenizer.json").symlink_to(FOLDERS / "qwen3" / "tokenizer_config.json")
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
