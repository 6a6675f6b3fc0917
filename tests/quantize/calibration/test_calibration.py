"""The tokens by which a method learns what matters: whose they are, and that no evaluation is by the same."""

from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_chat import make_chat_model

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import TokenizerError
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import prepare
from mlxarch.quantize.calibration import calibration
from mlxarch.quantize.calibration.calibration import (
    BUNDLED_TEXT,
    MAX_TOKENS,
    Calibration,
    generated_token_count,
    load_tokenizer,
)
from mlxarch.quantize.calibration.self_generated import PASSAGE_LENGTH
from mlxarch.quantize.calibration.texts import bundled_texts
from mlxarch.tokenizer.tokenizer import Tokenizer
from tiny_llama import make_llama


def pieces(text: str, words: int = 6) -> set[tuple[str, ...]]:
    """Runs of words."""
    split = text.split()
    return {tuple(split[at : at + words]) for at in range(len(split) - words + 1)}


def test_nothing_that_is_calibrated_by_is_evaluated_by() -> None:
    own = pieces(BUNDLED_TEXT.read_text(encoding="utf-8"))
    assert len(own) > 3000
    for text in bundled_texts():
        assert not own & pieces(text.content), text.name
        assert own & pieces(text.content + "\n".join(" ".join(words) for words in list(own)[:1]))


def test_gptq_reads_a_text_beside_what_the_model_writes_and_a_search_that_alone(
    tmp_path: Path,
) -> None:
    source = make_chat_model(tmp_path / "source")
    found = {
        method: prepare(source, tmp_path / method, method=method) for method in ("gptq", "search")
    }  # type: ignore[arg-type]
    assert "tokens of the text that comes with mlxarch" in found["gptq"].description
    assert "text" not in found["search"].description
    known = found["gptq"].calibration
    for conversion in found.values():
        assert "tokens that the model wrote itself" in conversion.description
    assert known and known.generated_batches == 1
    ids = [token for batch in known.batches[:-1] for token in np.array(batch).ravel().tolist()]
    assert 1024 < len(ids) <= MAX_TOKENS
    text = BUNDLED_TEXT.read_text(encoding="utf-8")
    assert Tokenizer.from_folder(source).encode(text)[: len(ids)] == ids


def test_without_a_tokenizer_gptq_takes_what_the_model_writes(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    description = prepare(tmp_path / "source", tmp_path / "out", method="gptq").description
    assert "(inputs of 2,560 tokens that the model wrote itself" in description


def test_text_stays_as_it_is_and_the_rest_is_written_by_the_model(tmp_path: Path) -> None:
    source = make_chat_model(tmp_path / "source")
    conversion = prepare(source, tmp_path / "out", method="gptq")
    assert (known := conversion.calibration)
    inputs, asymmetric = known.generate_tokens(conversion.resolved)
    *text, own = zip(inputs, known.batches, strict=True)
    assert all(mx.array_equal(found, wanted) for found, wanted in text)
    for found, firsts in (own, *zip(asymmetric, known.asymmetric_batches, strict=True)):
        same = np.array(found).ravel() == np.array(firsts).ravel()
        assert same[::PASSAGE_LENGTH].all() and same.mean() < 0.5
    assert not set(map(tuple, np.array(own[0]).tolist())) & {
        tuple(row) for part in asymmetric for row in np.array(part).tolist()
    }


def test_a_larger_model_is_given_fewer_tokens_and_never_too_few(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_llama(tmp_path / "source")
    resolved = resolve(open_checkpoint(tmp_path / "source"))
    widest = max(resolved.parameters[path].shape[-1] for path in resolved.matrices)
    for name in ("MIN_TOKENS", "MAX_PARAMETER_TOKENS", "MAX_ACTIVATION_BYTES"):
        monkeypatch.setattr(calibration, name, {"MIN_TOKENS": 1}.get(name, 1 << 50))
    assert generated_token_count(resolved, "search") == calibration.TOKENS_PER_CHANNEL * widest
    monkeypatch.setattr(calibration, "MAX_ACTIVATION_BYTES", 4 * widest * 50)
    assert (
        generated_token_count(resolved, "search") == 50
        and generated_token_count(resolved, "gptq") == 200
    )
    elements = sum(prod(resolved.parameters[path].shape) for path in resolved.matrices)
    monkeypatch.setattr(calibration, "MAX_PARAMETER_TOKENS", 20 * elements)
    assert generated_token_count(resolved, "search") == 20
    monkeypatch.setattr(calibration, "MIN_TOKENS", 30)
    assert generated_token_count(resolved, "search") == 30


def test_a_source_without_a_tokenizer_is_called_the_source(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    with pytest.raises(TokenizerError, match="^the source: there is no tokenizer"):
        load_tokenizer(replace(source, sidecars={}))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "source", vocab=32)
    chat = make_chat_model(tmp_path / "chat")
    (tmp_path / "source" / "tokenizer.json").write_bytes((chat / "tokenizer.json").read_bytes())
    source = open_checkpoint(tmp_path / "source")
    with pytest.raises(TokenizerError, match="makes token .* and the model has 32"):
        Calibration.from_text(BUNDLED_TEXT, source, resolve(source))
