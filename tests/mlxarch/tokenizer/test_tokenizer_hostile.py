"""Tokenizer files and texts that panic, hang or lie. They run in a process of their own, which must live."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxarch.errors import TokenizerError
from mlxarch.tokenizer.load_json import MAX_NORMALIZED_BYTES, load_tokenizer_json
from mlxarch.tokenizer.tokenizer import Tokenizer

TESTS = Path(__file__).parents[2]
FOLDERS = TESTS / "fixtures" / "tokenizers"
SCRIPT = TESTS / "support" / "hostile_tokenizers.py"

# These are harmless once truncation and padding are dropped, or by themselves.
HARMLESS = {
    "padding to 2^40",
    "padding to a multiple of 0",
    "padding to the length 0",
    "sequence of nothing",
    "stride as long as the cut",
    "stride longer than the cut",
    "strip beyond the end",
}


def outcomes(name: str, *mutants: str) -> list[tuple[str, str, float]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(FOLDERS / name / "tokenizer.json"), *mutants],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"RUST_BACKTRACE": "0"},
    )
    assert done.returncode == 0, f"the process died: {done.stderr[-500:]}"
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_hostile_file_is_refused_or_harmless_within_seconds():
    results = outcomes("mistral")
    assert len(results) >= 31
    for name, outcome, seconds in results:
        expected = "ok" if name in HARMLESS else "TokenizerError: "
        assert outcome.startswith(expected), (name, outcome)
        assert seconds < 5, (name, seconds)
    assert any("take hours" in outcome for _, outcome, _ in results)
    assert {name for name, outcome, _ in results if outcome == "ok"} == HARMLESS


@pytest.mark.parametrize("name", ["mistral", "llama3"])
def test_random_changes_of_a_real_file_never_escape_or_hang(name: str):
    results = outcomes(name, "400")
    assert [result for result in results if result[0] != "accepted"] == []
    assert 20 < int(results[-1][1]) < 380  # some were accepted, and some were refused


NASTY = {
    "a": "a" * 200_000,
    "punctuation": "^" * 200_000,
    "combining marks": "e" + "\u0301" * 50_000,
    "NUL": "\0" * 100_000,
    "blanks": " " * 200_000,
    "lines": "\n" * 200_000,
    "emoji": "👩\u200d👩\u200d👧" * 20_000,
    "low lines": "▁" * 100_000,
    "bytes": "<0xE2>" * 20_000,
    "special tokens": "<s></s><|im_start|><|eot_id|>" * 5_000,
    "right to left": "\u202e" * 100_000,
    "digits": "1" * 200_000,
    "not characters": "\ufffe\uffff\U0010ffff" * 20_000,
}


@pytest.mark.parametrize("name", ["gemma2", "llama3", "mistral", "qwen3"])
def test_nasty_texts_are_tokenized_within_seconds(name: str):
    tokenizer = Tokenizer.from_folder(FOLDERS / name)
    for kind, text in NASTY.items():
        start = time.process_time()
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids and time.process_time() - start < 5, kind
        if name == "llama3":  # the others change texts: to NFC, or "▁" to a blank
            assert tokenizer.decode(ids, skip_special_tokens=False) == text, kind


def test_a_text_that_normalization_makes_too_long_is_refused():
    document = json.loads((FOLDERS / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 60}
    tokenizer = Tokenizer(load_tokenizer_json(json.dumps(document).encode(), "tokenizer.json"))
    assert len(tokenizer.encode("a")) > 1
    with pytest.raises(TokenizerError, match=f"at most {MAX_NORMALIZED_BYTES // 60} are tokenized"):
        tokenizer.encode("a" * (MAX_NORMALIZED_BYTES // 60 + 1))
