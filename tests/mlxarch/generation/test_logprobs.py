"""Log-probabilities of an answer's tokens, against the model's own logits."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxarch
from mlxarch import LanguageModel
from mlxarch.errors import InvalidInput

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(talker: Path) -> LanguageModel:
    return mlxarch.load(talker)


def test_log_probabilities_are_the_models_before_sampling(model: LanguageModel) -> None:
    prompt = model.tokens_of(MESSAGES)
    result = model.generate(
        prompt,
        max_tokens=6,
        top_logprobs=3,
        temperature=1.5,
        seed=2,
        logit_bias={7: 50},
        presence_penalty=60,
    )
    assert [entry.token for entry in result.logprobs] == result.tokens
    logits = model.model(mx.array([[*prompt, *result.tokens]]))[0, len(prompt) - 1 : -1]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for row, entry in zip(expected, result.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=2e-4)
        assert [token for token, _ in entry.top] == list(np.argsort(-row)[:3])
        assert entry.top[0][1] == pytest.approx(row.max(), abs=2e-4)
    assert result.tokens[0] == 7 and result.tokens.count(7) == 1  # the penalty outweighs the bias
    assert result.logprobs[0].logprob < -1


def test_they_change_no_token_and_come_with_the_pieces(model: LanguageModel) -> None:
    settings = {"max_tokens": 8, "temperature": 1.0, "seed": 4}
    plain = model.generate(MESSAGES, **settings)  # type: ignore[arg-type]
    pieces = list(model.stream(MESSAGES, top_logprobs=0, **settings))  # type: ignore[arg-type]
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert tokens == plain.tokens and not plain.logprobs
    for piece in pieces:
        assert (piece.logprobs is None) == (piece.token is None)
        assert piece.logprobs is None or (
            piece.logprobs.token == piece.token and not piece.logprobs.top
        )


def test_a_mask_hides_nothing_of_the_models_opinion(model: LanguageModel) -> None:
    free = model.generate(MESSAGES, max_tokens=1, top_logprobs=20)
    held = model.generate(
        MESSAGES, max_tokens=1, top_logprobs=20, grammar=model.grammars.regex("[0-9]")
    )
    assert held.logprobs[0].top == free.logprobs[0].top
    assert held.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize("count", [-1, 21, True, 1.0])
def test_other_numbers_are_refused(model: LanguageModel, count: int) -> None:
    with pytest.raises(InvalidInput, match="top_logprobs"):
        model.generate(MESSAGES, max_tokens=1, top_logprobs=count)
