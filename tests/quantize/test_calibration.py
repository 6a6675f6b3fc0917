"""The tokens by which a method learns what matters: whose they are, and that no evaluation is by the same."""

from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_chat import make_chat_model

from mlxarch.errors import TokenizerError
from mlxarch.quantize import calibration
from mlxarch.quantize.calibration import BUNDLED, MOST, Calibration, token_count, tokenizer_of
from mlxarch.quantize.continuation import PASSAGE
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


def test_gptq_reads_a_text_beside_what_the_model_writes_and_a_search_that_alone(tmp_path: Path) -> None:
    source = make_chat_model(tmp_path / "source")
    found = {method: prepare(source, tmp_path / method, method=method) for method in ("gptq", "search")}  # type: ignore[arg-type]
    assert "tokens of the text that comes with mlxarch" in found["gptq"].method
    assert "text" not in found["search"].method
    known = found["gptq"].calibration
    for conversion in found.values():
        assert "tokens that the model wrote itself" in conversion.method
    assert known and known.written == 1
    ids = [token for batch in known.batches[:-1] for token in np.array(batch).ravel().tolist()]
    assert 1024 < len(ids) <= MOST
    text = BUNDLED.read_text(encoding="utf-8")
    assert Tokenizer.from_folder(source).encode(text)[: len(ids)] == ids


def test_without_a_tokenizer_gptq_takes_what_the_model_writes(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    method = prepare(tmp_path / "source", tmp_path / "out", method="gptq").method
    assert "(inputs of 2,560 tokens that the model wrote itself" in method


def test_text_stays_as_it_is_and_the_rest_is_written_by_the_model(tmp_path: Path) -> None:
    source = make_chat_model(tmp_path / "source")
    conversion = prepare(source, tmp_path / "out", method="gptq")
    assert (known := conversion.calibration)
    inputs, trail = known.tokens(conversion.resolved)
    *text, own = zip(inputs, known.batches, strict=True)
    assert all(mx.array_equal(found, wanted) for found, wanted in text)
    for found, firsts in (own, *zip(trail, known.trail, strict=True)):
        same = np.array(found).ravel() == np.array(firsts).ravel()
        assert same[::PASSAGE].all() and same.mean() < 0.5
    assert not set(map(tuple, np.array(own[0]).tolist())) & {
        tuple(row) for part in trail for row in np.array(part).tolist()
    }


def test_a_larger_model_is_given_fewer_tokens_and_never_too_few(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_llama(tmp_path / "source")
    resolved = resolve(open_source(tmp_path / "source"))
    widest = max(resolved.parameters[path].shape[-1] for path in resolved.matrices)
    for name in ("LEAST", "WORK", "ACTIVATIONS"):
        monkeypatch.setattr(calibration, name, {"LEAST": 1}.get(name, 1 << 50))
    assert token_count(resolved, "search") == calibration.PER_CHANNEL * widest
    monkeypatch.setattr(calibration, "ACTIVATIONS", 4 * widest * 50)
    assert token_count(resolved, "search") == 50 and token_count(resolved, "gptq") == 200
    elements = sum(prod(resolved.parameters[path].shape) for path in resolved.matrices)
    monkeypatch.setattr(calibration, "WORK", 20 * elements)
    assert token_count(resolved, "search") == 20
    monkeypatch.setattr(calibration, "LEAST", 30)
    assert token_count(resolved, "search") == 30


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
