"""Models judged by texts: against themselves, against coarser ones, in any portions, from the store and without it."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_chat import make_chat_model

from mlxarch.errors import InvalidInput, NonFiniteLogits, TokenizerError
from mlxarch.loading.load import load_model
from mlxarch.quantize import convert
from mlxarch.quantize.calibration import texts as texts_module
from mlxarch.quantize.calibration.texts import (
    DOMAINS,
    Text,
    bundled_texts,
    read_texts,
    tokenize_passages,
)
from mlxarch.quantize.evaluation import evaluate as evaluation_module
from mlxarch.quantize.evaluation import logits, reference_cache
from mlxarch.quantize.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from mlxarch.tokenizer.tokenizer import Tokenizer

TEXTS = [
    Text("one", "The river was no great river. " * 8),
    Text("two", "def f(x): return x + 1\n" * 8),
]
SMALL = EvaluationSettings(tokens=100, context=40)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_model(tmp_path_factory.mktemp("models") / "tiny")
    weights = load_file(
        folder / "model.safetensors"
    )  # logits that differ, as those of a trained model do
    weights["lm_head.weight"] *= 8
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def variants(original: Path) -> dict[int, Path]:
    folders = {bits: original.with_name(f"tiny-{bits}") for bits in (8, 6, 5, 4, 3, 2)}
    for bits, folder in folders.items():
        convert(original, folder, bits=bits, method="round")
    return folders


def judged(
    model: Path, original: Path | None = None, settings: EvaluationSettings = SMALL, **options
) -> Evaluation:
    return evaluate(model, original, texts=TEXTS, settings=settings, **options)


def kl(evaluation: Evaluation) -> float:
    assert evaluation.all.kl_mean is not None
    return evaluation.all.kl_mean.value


def test_the_original_against_itself_is_exactly_0(original, variants):
    same = judged(original, original)
    assert (
        same.all.kl_mean
        and same.all.kl_max
        and same.all.top1_agreement
        and same.all.perplexity_ratio
    )
    assert (kl(same), same.all.kl_max.value, same.all.top1_agreement.value) == (0.0, 0.0, 1.0)
    assert same.all.perplexity_ratio.value == 1.0 and same.all.kl_bound == 0.0
    assert kl(judged(variants[8], original)) > 0


def test_fewer_bits_are_further_away(original, variants):
    found = [kl(judged(variants[bits], original)) for bits in (8, 6, 5, 4, 3, 2)]
    assert found == sorted(found) and found[0] < found[-1] / 100


def test_portions_of_logits_change_nothing(original, variants, monkeypatch):
    whole = judged(variants[4], original)
    monkeypatch.setattr(logits, "HEAD_LOGITS", 1700)  # 17 and 5 rows of a hundred tokens
    monkeypatch.setattr(logits, "YIELDED_LOGITS", 500)
    shutil.rmtree(reference_cache.cache_folder())
    parts = judged(variants[4], original)
    assert abs(kl(parts) - kl(whole)) <= 1e-6 and parts.domains.keys() == whole.domains.keys()
    assert (
        parts.all.tokens == whole.all.tokens and parts.worst[0].position == whole.worst[0].position
    )


def test_neither_batch_nor_context_portions_change_the_figures(original, variants):
    alone, together = (judged(variants[4], original, batch=batch) for batch in (1, 5))
    for field in (
        "perplexity",
        "original_perplexity",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "kl_max",
        "top1_agreement",
    ):
        one, other = getattr(alone.all, field).value, getattr(together.all, field).value
        assert abs(one - other) <= 1e-6 * max(1, one), field
    assert alone.all.tokens == together.all.tokens
    assert abs(kl(alone) - kl(judged(variants[4], original, replace(SMALL, context=20)))) > 1e-6


def test_what_is_kept_of_the_original_grows_until_the_mean_is_precise(original, variants):
    everything = judged(variants[4], original)
    assert everything.all.kl_bound == 0.0
    part = judged(variants[4], original, replace(SMALL, kept=4))
    assert part.settings.kept > 4, (
        "four of a hundred tokens, where all are about as likely, are too few"
    )
    assert part.all.kl_bound is not None and part.all.kl_bound <= 0.01 * kl(part)
    assert abs(kl(part) - kl(everything)) <= part.all.kl_bound


def test_no_more_is_kept_where_there_is_nothing_to_tell_apart_or_no_room(
    original, variants, tmp_path, monkeypatch, caplog
):
    weights = load_file(original / "model.safetensors")
    weights["lm_head.weight"][0] *= np.float32(1.0001)
    make_chat_model(tmp_path / "near")
    save_file(weights, tmp_path / "near" / "model.safetensors")
    near = judged(tmp_path / "near", original, replace(SMALL, kept=4))
    assert 0 < kl(near) < 1e-6 and near.settings.kept == 4
    monkeypatch.setattr(evaluation_module, "MAX_REFERENCE_BYTES", 8 * 1000)
    assert judged(variants[4], original, replace(SMALL, kept=4)).settings.kept == 4
    assert "take fewer tokens" in caplog.text


def test_an_evaluation_says_what_it_rests_on(original, variants):
    found = judged(variants[4], original)
    assert (found.model, found.against) == ("tiny-4", "tiny")
    assert found.texts == {text.name: text.sha256 for text in TEXTS} and list(found.domains) == [
        "one",
        "two",
    ]
    assert found.all.tokens == sum(table.tokens for table in found.domains.values())
    assert found.size.bytes == (variants[4] / "model.safetensors").stat().st_size
    assert found.size.quantized_bits_per_weight == 4 + 2 * 32 / 64, (
        "float32 scales and biases of groups of 64"
    )
    assert found.original_size and found.original_size.quantized_bits_per_weight is None
    assert 32 < found.original_size.bits_per_weight < 34 and set(found.versions) == {
        "mlxarch",
        "mlx",
        "numpy",
    }
    json.dumps(asdict(found), allow_nan=False)


def test_the_worst_tokens_stand_where_they_say(original, variants):
    found, tokenizer = judged(variants[2], original), Tokenizer.from_folder(original)
    assert [place.kl for place in found.worst] == sorted(
        (place.kl for place in found.worst), reverse=True
    )
    assert (
        found.all.kl_max and found.worst[0].kl == found.all.kl_max.value and len(found.worst) == 10
    )
    for place in found.worst:
        body = tokenizer.encode(next(text.content for text in TEXTS if text.name == place.text))
        assert place.token == tokenizer.decode(body[place.position : place.position + 1])
        assert (place.before + place.token + place.after) in next(
            t.content for t in TEXTS if t.name == place.text
        )
        assert place.position % SMALL.context, "the first token of a window is not predicted"


def test_without_an_original_there_is_perplexity_alone(original):
    found = judged(original)
    assert found.all.kl_mean is None and found.worst == [] and found.against is None
    beside = judged(original, original).all
    assert (
        abs(found.all.perplexity.value - beside.perplexity.value) < 1e-9 * beside.perplexity.value
    )


def test_perplexity_is_that_of_the_model_as_it_runs(variants):
    tokenizer, (model, _) = (
        Tokenizer.from_folder(variants[4]),
        load_model(variants[4], dtype="float32"),
    )
    surprise = []
    for text in TEXTS:
        body = tokenizer.encode(text.content)[: SMALL.tokens]
        for at in range(0, len(body), SMALL.context):
            window = body[at : at + SMALL.context]
            logits = np.array(model(mx.array([window]))[0], np.float64)
            total = np.log(np.exp(logits).sum(-1))
            surprise += [total[i] - logits[i, window[i + 1]] for i in range(len(window) - 1)]
    found = judged(variants[4]).all
    assert found.tokens == len(surprise)
    assert found.perplexity.value == pytest.approx(np.exp(np.mean(surprise)), rel=1e-5)
    assert judged(variants[2]).all.perplexity.value != pytest.approx(
        found.perplexity.value, rel=1e-3
    )


# What is kept of the original ----------------------------------------------------------------------------------------


def test_the_original_is_read_once_for_all_variants(original, variants, monkeypatch):
    labels: list[str] = []
    watch = lambda label, done, total: labels.append(label)  # noqa: E731
    first = judged(variants[4], original, progress=watch)
    assert "reading the original" in labels
    labels.clear()
    assert judged(variants[4], original, progress=watch) == first
    judged(variants[8], original, progress=watch)
    assert labels and "reading the original" not in labels
    judged(variants[8], original, replace(SMALL, context=30), progress=watch)
    assert "reading the original" in labels, "other windows are another question"


def test_another_original_is_never_taken_for_the_first(original, variants, tmp_path):
    first = kl(judged(variants[4], original))
    weights = load_file(original / "model.safetensors")
    weights["lm_head.weight"][0] *= 2
    other = make_chat_model(tmp_path / "tiny")
    save_file(weights, other / "model.safetensors")
    assert kl(judged(variants[4], other)) != first


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_store_is_made_anew(original, variants, damage, caplog):
    first = judged(variants[4], original)
    (file,) = reference_cache.cache_folder().iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes({"cut": data[:-9], "flipped": data, "empty": b""}[damage])
    assert judged(variants[4], original) == first
    assert "damaged" in caplog.text
    assert file.read_bytes() not in (b"", bytes(data))


def test_a_store_that_cannot_be_written_is_no_obstacle(original, variants, home, caplog):
    home.mkdir()
    (home / "cache").write_text("in the way")
    assert kl(judged(variants[4], original)) > 0
    assert "could not be stored" in caplog.text


def test_the_oldest_go_when_the_store_is_full(original, variants, monkeypatch):
    judged(variants[4], original)
    (first,) = reference_cache.cache_folder().iterdir()
    monkeypatch.setattr(reference_cache, "MAX_CACHE_BYTES", first.stat().st_size * 3 // 2)
    judged(variants[4], original, replace(SMALL, context=30))
    assert len(list(reference_cache.cache_folder().iterdir())) == 1 and not first.exists()


# What is refused -----------------------------------------------------------------------------------------------------


def test_unlike_vocabularies_are_refused(original, tmp_path):
    swapped = make_chat_model(tmp_path / "swapped")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        InvalidInput,
        match="swapped and tiny have different vocabularies.* 2 tokens have another id",
    ):
        judged(swapped, original)
    larger = make_chat_model(tmp_path / "larger", marks={"<|more|>": True})
    with pytest.raises(InvalidInput, match="larger has 101 tokens and tiny 100"):
        judged(larger, original)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 1}, {"context": 1}, {"kept": 0}, {"draws": 1}, {"seed": -1}, {"tokens": 2.5}],
)
def test_settings_out_of_range_are_refused(original, wrong):
    with pytest.raises(
        InvalidInput, match=f"{next(iter(wrong))} must be a whole number of at least"
    ):
        judged(original, settings=replace(SMALL, **wrong))


def test_what_cannot_be_read_is_refused(original, tmp_path):
    with pytest.raises(InvalidInput, match="at least two"):
        evaluate(original, texts=[Text("short", "a")], settings=SMALL)
    with pytest.raises(InvalidInput, match="context has 4096"):
        evaluate(
            original,
            texts=[Text("long", "a" * 5000)],
            settings=EvaluationSettings(tokens=5000, context=5000),
        )
    weights = load_file(original / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    broken = make_chat_model(tmp_path / "broken")
    save_file(weights, broken / "model.safetensors")
    for pair in ((broken, original), (original, broken)):
        with pytest.raises(NonFiniteLogits, match="^broken: the model's output is not finite"):
            judged(*pair)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError):
        judged(broken)


def test_files_of_the_users_must_be_text(tmp_path):
    (tmp_path / "good.txt").write_text("Grüße", encoding="utf-8")
    assert read_texts([tmp_path / "good.txt"]) == [Text("good", "Grüße")]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "good.txt").write_text("other")
    for files, message in [
        (["bad.txt"], "UTF-8"),
        (["empty.txt"], "empty.txt is empty; name a file"),
        (["none.txt"], "No such file"),
        (["good.txt", "more/good.txt"], "two texts have one name"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            read_texts([tmp_path / file for file in files])


# The texts -----------------------------------------------------------------------------------------------------------


def test_the_texts_here_are_long_enough_and_each_of_its_kind():
    texts = bundled_texts()
    assert [text.name for text in texts] == list(DOMAINS)
    for text in texts:
        assert 5000 < len(text.content.encode()) < 10_000, text.name
    page = (Path(texts_module.__file__).with_name("texts") / "README.md").read_text()
    assert all(f"`{name}.txt`" in page for name in DOMAINS) and "Licence: MIT" in page


def begin_with(file: Path, token: str) -> None:
    """Let a tokenizer.json put a special token in front of every text."""
    content = json.loads(file.read_text())
    [number] = [each["id"] for each in content["added_tokens"] if each["content"] == token]
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("begins", [False, True])
def test_windows_hold_every_token_once_and_begin_as_texts_do(original, begins, tmp_path):
    folder = make_chat_model(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|system|>"}))
    if begins:
        begin_with(folder / "tokenizer.json", "<|system|>")
    tokenizer = Tokenizer.from_folder(folder)
    (passage,) = tokenize_passages([Text("t", "abcdefghij")], tokenizer, 9, 4)
    body, bos = tokenizer.encode("abcdefghi", add_special_tokens=False), [tokenizer.bos_id]
    if begins:
        assert passage.windows == [bos + body[:3], bos + body[3:6], bos + body[6:]]
        assert passage.positions == list(range(9))
    else:
        assert passage.windows == [body[:4], body[4:8]], "a window of one token predicts nothing"
        assert passage.positions == [1, 2, 3, 5, 6, 7]
    assert len(passage.positions) == sum(len(window) - 1 for window in passage.windows)
