"""Self-generated calibration tokens, compared with the model's own samples."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantize.calibration import self_generated
from mlxarch.quantize.calibration.self_generated import PASSAGE_LENGTH, generate_continuations
from parity import GOLDEN

NAMES = ("llama3", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3n_text", "gpt2", "mistral3_text")
NAMES = tuple(name for name in NAMES if (GOLDEN / name / "config.json").is_file())


class Certain:
    """Draws the middle of what may come: no randomness."""

    def random(self) -> float:
        return 0.5


def median(logits: np.ndarray) -> int:
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    return int(np.searchsorted(np.cumsum(probabilities), probabilities.sum() / 2, "right"))


@pytest.mark.parametrize("name", NAMES)
def test_each_token_is_drawn_by_the_probabilities_that_the_model_gives_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Certain())
    monkeypatch.setattr(self_generated, "MAX_LOGITS", 3 * 100)  # a few at a time
    model, _ = load_model(GOLDEN / name)
    firsts = mx.array((np.arange(2 * 4 * PASSAGE_LENGTH) * 7 % model.vocab_size).reshape(2, -1))
    [found] = generate_continuations(resolve(open_checkpoint(GOLDEN / name)), [firsts])
    passages = np.array(found).reshape(-1, PASSAGE_LENGTH)
    assert (passages[:, 0] == np.array(firsts).reshape(-1, PASSAGE_LENGTH)[:, 0]).all()
    logits = np.array(model(mx.array(passages)).astype(mx.float32))
    wanted = [[median(place) for place in row[:-1]] for row in logits]
    assert (
        np.mean(passages[:, 1:] == np.array(wanted)) > 0.98
    )  # a probability of just a half may fall either way
    assert np.mean(passages[:, 1:] == np.roll(np.array(wanted), 1, axis=0)) < 0.9


def test_batches_keep_their_shapes_and_nothing_is_written_for_none() -> None:
    resolved = resolve(open_checkpoint(GOLDEN / "llama3"))
    batches = [mx.zeros((2, 20), mx.int32), mx.zeros((3, 11), mx.int32)]
    assert [part.shape for part in generate_continuations(resolved, batches)] == [(2, 20), (3, 11)]
    assert generate_continuations(resolved, []) == []


def test_another_seed_writes_something_else() -> None:
    resolved = resolve(open_checkpoint(GOLDEN / "llama3"))
    batches = [mx.zeros((2, 64), mx.int32)]
    one, again, other = (generate_continuations(resolved, batches, seed)[0] for seed in (0, 0, 1))
    assert mx.array_equal(one, again) and not mx.array_equal(one, other)
