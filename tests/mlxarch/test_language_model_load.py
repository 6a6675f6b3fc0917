"""mlxarch.load: names, paths, dtype, context, and the makers' advice on sampling."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from talker import CONTEXT, VOCABULARY

import mlxarch
import parity
from mlxarch import LanguageModel, Sampling
from mlxarch.errors import CheckpointError, ConfigError, InvalidInput, ModelNotFound, TokenizerError
from mlxarch.loading.load import load_model, load_weights


@pytest.fixture(scope="module")
def model(talker: Path) -> LanguageModel:
    return mlxarch.load(talker)


def test_a_path_loads_as_text_and_as_path(talker: Path, model: LanguageModel) -> None:
    again = mlxarch.load(str(talker))
    assert again.path == model.path == talker
    assert again.config == json.loads((talker / "config.json").read_text())
    assert again.context_length == CONTEXT
    assert (
        again.generate("hello", max_tokens=5).tokens == model.generate("hello", max_tokens=5).tokens
    )
    logits = model.model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, VOCABULARY)
    caches = model.make_caches()
    model.model(mx.array([[1, 2]]), caches)
    assert mx.allclose(model.model(mx.array([[3]]), caches)[0, 0], logits[0, 2], atol=1e-5)


def test_a_name_is_obtained_at_the_bits_asked_for(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "mlxarch.language_model.obtain",
        lambda name, *, bits, **_: asked.append((name, bits)) or talker,
    )
    mlxarch.load("smollm2-135m")
    mlxarch.load("smollm2:135m", bits=4)
    assert asked == [("smollm2-135m", None), ("smollm2:135m", 4)]


def test_of_an_empty_folder_the_config_is_missed(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json: the file is missing"):
        mlxarch.load(tmp_path)


def test_what_does_not_exist_is_not_found(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "./nothing"):
        with pytest.raises(ModelNotFound, match="nothing"):
            mlxarch.load(name)


def test_progress_ends_with_all_bytes_and_its_absence_is_silent(
    talker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reports: list[tuple[str, int, int]] = []
    mlxarch.load(talker, progress=lambda label, done, total: reports.append((label, done, total)))
    assert reports[-1][1] == reports[-1][2] > 0
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    mlxarch.load(talker)
    assert capfd.readouterr() == ("", "")


def test_float32_is_the_default_on_a_cpu_and_a_dtype_can_be_asked_for(talker_copy: Path) -> None:
    file = talker_copy / "model.safetensors"
    save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)

    def dtype(asked: Any) -> mx.Dtype:
        loaded = mlxarch.load(talker_copy, dtype=asked).model
        types = {array.dtype for array in dict(tree_flatten(loaded.parameters())).values()}
        assert len(types) == 1
        return types.pop()

    if mx.default_device() == mx.cpu:
        assert dtype(None) == mx.float32
    for name in ("float32", "float16", "bfloat16"):
        assert dtype(name) == dtype(getattr(mx, name)) == getattr(mx, name)
    for wrong in ("int8", "fp16", "", mx.int32, np.float32, 16, ["float32"]):
        with pytest.raises(InvalidInput, match="float32, float16, bfloat16"):
            mlxarch.load(talker_copy, dtype=wrong)  # type: ignore[arg-type]


def test_a_context_is_planned_within_what_the_model_allows(talker: Path) -> None:
    small = mlxarch.load(talker, context=20)
    assert small.context_length == 20
    assert len(small.generate([1, 2, 3]).tokens) == 17
    cache = small.make_caches()[0]
    small.model(mx.array([[1]]), small_caches := small.make_caches())
    assert cache is not None and small_caches[0] is not None
    assert (
        small_caches[0].nbytes == 2 * 2 * 20 * 16 * 4
    )  # keys and values, heads, tokens, features, float32
    assert mlxarch.load(talker, context=CONTEXT).context_length == CONTEXT
    for wrong in (0, -1, CONTEXT + 1, 2.5, True, float("nan")):
        with pytest.raises(InvalidInput, match=f"context must lie in 1 … {CONTEXT}"):
            mlxarch.load(talker, context=wrong)  # type: ignore[arg-type]


def test_both_dialects_of_a_config_give_the_same_model(tmp_path: Path) -> None:
    answers = []
    for dialect in parity.DIALECTS:
        folder = tmp_path / dialect
        folder.mkdir()
        model, _ = load_model(parity.copy("llama3", dialect, folder))
        answers.append(model(mx.array([[1, 2, 3]])))
    assert mx.array_equal(*answers)


@pytest.mark.parametrize(
    ("advice", "wanted"),
    [
        (None, Sampling()),
        ({"temperature": 0.7}, Sampling()),
        ({"do_sample": False, "temperature": 0.7}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "top_k": None, "top_p": 0.9}, Sampling(temperature=1.0, top_p=0.9)),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "min_p": 0.1,
                "typical_p": 1.0,
            },
            Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
        ),
        (
            {"do_sample": True, "top_k": -1},
            Sampling(temperature=1.0, top_k=0),
        ),
        (
            {"do_sample": True, "repetition_penalty": 1.05},
            Sampling(temperature=1.0, repetition_penalty=1.05),
        ),
    ],
)
def test_the_makers_advice_on_sampling_is_read(
    advice: Any, wanted: Sampling, talker_copy: Path
) -> None:
    model, path = mlxarch.load(talker_copy), talker_copy / "generation_config.json"
    path.unlink()
    if advice is not None:
        path.write_text(json.dumps(advice))
    assert model.recommended_sampling == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "[" * 200_000,
        '{"do_sample": true, "top_p": 7}',
        '{"do_sample": true, "temperature": "hot"}',
        '{"do_sample": true, "temperature": NaN}',
        '{"do_sample": true, "top_k": 2.5}',
        '{"do_sample": true, "min_p": [0.1]}',
        "\udcff",
    ],
)
def test_malformed_advice_on_sampling_is_an_error_that_names_the_file(
    text: str, talker_copy: Path
) -> None:
    model = mlxarch.load(talker_copy)
    (talker_copy / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        _ = model.recommended_sampling


def test_a_broken_tokenizer_fails_before_the_weights_are_read(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        "mlxarch.language_model.load_weights",
        lambda *a, **k: read.append(a) or load_weights(*a, **k),
    )
    mlxarch.load(talker)
    assert len(read) == 1
    broken = tmp_path / "broken"
    shutil.copytree(talker, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        mlxarch.load(broken)
    assert len(read) == 1
