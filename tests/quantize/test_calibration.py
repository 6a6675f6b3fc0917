"""The tokens by which a method learns what matters: whose they are, and that no evaluation is by the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_chat import make_chat_model

from mlxarch.errors import TokenizerError
from mlxarch.quantize.calibration import BUNDLED, MOST, Calibration, tokenizer_of
from mlxarch.quantize.conversion import prepare
from mlxarch.quantize.corpus import bundled
from mlxarch.tokenizer import Tokenizer
from mlxarch.weights import open_source, resolve
from tiny_llama import make_llama


def pieces(text: str, words: int = 6) -> set[tuple[str, ...]]:
    """Runs of words."""
    split = text.split()
    return {tuple(split[at : at + words]) for at in range(len(split) - words + 1)}


def test_nothing_that_is_calibrated_by_is_evaluated_by() -> None:
    own = pieces(BUNDLED.read_text(encoding="utf-8"))
    assert len(own) > 3000
    for text in bundled():
        assert not own & pieces(text.content), text.name
        assert own & pieces(text.content + "\n".join(" ".join(words) for words in list(own)[:1]))


def test_gptq_reads_a_text_and_a_search_random_tokens(tmp_path: Path) -> None:
    source = make_chat_model(tmp_path / "source")
    found = {method: prepare(source, tmp_path / method, method=method) for method in ("gptq", "search")}  # type: ignore[arg-type]
    assert "tokens of the text that comes with mlxarch" in found["gptq"].method
    assert "random tokens" in found["search"].method
    calibration = found["gptq"].calibration
    assert calibration and 1024 < calibration.count <= MOST
    ids = [token for batch in calibration.batches for token in np.array(batch).ravel().tolist()]
    text = BUNDLED.read_text(encoding="utf-8")
    assert Tokenizer.from_folder(source).encode(text)[: len(ids)] == ids


def test_without_a_tokenizer_gptq_takes_random_tokens(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    assert "random tokens" in prepare(tmp_path / "source", tmp_path / "out", method="gptq").method


def test_a_source_without_a_tokenizer_is_called_the_source(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    source = open_source(tmp_path / "source")
    with pytest.raises(TokenizerError, match="^the source: there is no tokenizer"):
        tokenizer_of(replace(source, sidecars={}))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "source", vocab=32)
    chat = make_chat_model(tmp_path / "chat")
    (tmp_path / "source" / "tokenizer.json").write_bytes((chat / "tokenizer.json").read_bytes())
    source = open_source(tmp_path / "source")
    with pytest.raises(TokenizerError, match="makes token .* and the model has 32"):
        Calibration.text(BUNDLED, source, resolve(source))
