"""Prompts that ask for the text between a beginning and an end."""

from pathlib import Path

import pytest
from live_server import LiveServer
from tiny_chat import make_chat_model

from mlxarch import Tokenizer
from mlxarch.server.api.fill_in_middle import fill_in_prompt
from mlxarch.server.http.errors import ApiError


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "{0}a<b{1}c{2}"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "{0}a<b{1}c{2}"),
        (("[PREFIX]", "[SUFFIX]"), "{1}c{0}a<b"),
    ],
)
def test_the_marks_of_a_vocabulary_are_used(tmp_path: Path, marks, expected):
    model = make_chat_model(tmp_path / "tiny", marks=dict.fromkeys(marks, True))
    tokenizer = Tokenizer.from_folder(model)
    ids = fill_in_prompt(tokenizer, "a<b", "c")
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected.format(*marks)
    spelled = fill_in_prompt(tokenizer, marks[0], "c")
    assert (
        spelled.count(ids[ids.index(tokenizer.token_id(marks[0]) or 0)]) == 1
    )  # a mark within the code is text


def test_a_model_without_marks_says_so(server: LiveServer, tiny: Path):
    with pytest.raises(ApiError, match="no marks"):
        fill_in_prompt(Tokenizer.from_folder(tiny), "a", "b")
    for path, fields in (("/v1/completions", {}), ("/api/generate", {"model": "tiny"})):
        reply = server.post(path, {"prompt": "a", "suffix": "b", **fields})
        assert reply.status == 400
        assert b"fill in a middle" in reply.body
