"""mlxarch eval, verify, show and quantize: what they measure is printed, and decides the exit status."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mlxarch.checkpoint.receipt import RECEIPT_FILE
from mlxarch.quantize import convert
from mlxarch.quantize.evaluation.evaluate import EvaluationSettings, evaluate

FEW = ["--tokens", "40", "--context", "20"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A folder with an original, and what was made of it at 8 and at 2 bits."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny, folder / "tiny")
    weights = load_file(folder / "tiny" / "model.safetensors")
    weights["lm_head.weight"] *= 8
    save_file(weights, folder / "tiny" / "model.safetensors")
    for bits in (8, 2):
        convert(folder / "tiny", folder / f"tiny-{bits}bit", bits=bits, method="round")
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


def test_it_prints_a_table_of_all_texts(invoke, here):
    result = invoke("eval", "./tiny-8bit", "--against", "./tiny", *FEW)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny-8bit against tiny"
    assert lines[1].split() == ["all", "prose", "code", "chat", "german"]
    found = evaluate(
        here / "tiny-8bit", here / "tiny", settings=EvaluationSettings(tokens=40, context=20)
    )
    assert (
        found.all.kl_mean
        and f"{found.all.kl_mean.value:.1e} ±{found.all.kl_mean.error:.0e}" in result.stdout
    )
    assert f"{found.all.perplexity.value:.2f} ±" in result.stdout
    assert f"{found.size.bits_per_weight:.2f} bits per weight" in result.stdout
    assert "its mean exact" in result.stdout
    worst = lines[
        next(n for n, line in enumerate(lines) if line.startswith("The tokens that changed most"))
        + 1 :
    ]
    assert len(worst) == 10 and worst[0].startswith(f"{found.worst[0].kl:.1e}")


def test_windows_are_as_short_as_a_context_that_is_short(invoke, here, tmp_path):
    for name in ("tiny", "tiny-8bit"):
        shutil.copytree(here / name, tmp_path / name)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["max_position_embeddings"] = 24
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    models = [str(tmp_path / "tiny-8bit"), "--against", str(tmp_path / "tiny"), "--tokens", "40"]
    result = invoke("eval", *models)
    assert result.exit_code == 0, result.stderr
    assert "tiny has a context of 24 tokens, so texts are read in windows of 24" in result.stderr
    assert "24 at a time" in result.stdout
    refused = invoke("eval", *models, "--context", "512")  # asked for
    assert refused.exit_code == 2 and "the model's context has 24" in refused.stderr
    whole = invoke("eval", "./tiny-8bit", "--tokens", "40")
    assert "has a context of" not in whole.stderr


def test_of_a_model_against_itself_no_token_is_said_to_have_changed(invoke, here):
    result = invoke("eval", "./tiny", "--against", "./tiny", *FEW)
    assert "KL mean          0.0000" in result.stdout and "changed most" not in result.stdout


def test_without_an_original_it_tells_perplexity_alone(invoke, here):
    result = invoke("eval", "./tiny", *FEW)
    assert result.exit_code == 0 and "perplexity" in result.stdout
    assert "KL" not in result.stdout and "nothing quantized" in result.stdout


def test_json_has_the_keys_that_are_documented(invoke, here):
    result = invoke("eval", "./tiny-8bit", "./tiny-2bit", "--against", "./tiny", "--json", *FEW)
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["model"], second["model"]) == ("tiny-8bit", "tiny-2bit")
    assert 0 < first["all"]["kl_mean"]["value"] < second["all"]["kl_mean"]["value"]
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text()
    table = page[page.index("## JSON") :]
    for key in {
        *first,
        *first["all"],
        *first["worst"][0],
        *first["size"],
        *first["settings"],
        *first["versions"],
    }:
        assert f"`{key}`" in table, key
    assert set(first["all"]["kl_mean"]) == {"value", "error"}


def test_the_users_texts_take_the_place_of_ours(invoke, here, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Ada, the engine works. " * 5)
    result = invoke("eval", "./tiny", "--text", str(tmp_path / "letter.txt"), "--json", *FEW)
    assert list(json.loads(result.stdout)["texts"]) == ["letter"]


def test_the_status_tells_whether_a_model_is_too_far_away(invoke, here):
    arguments = ["eval", "./tiny-8bit", "./tiny-2bit", "--against", "./tiny", *FEW]
    near, far = (
        json.loads(line)["all"]["kl_mean"]["value"]
        for line in invoke(*arguments, "--json").stdout.splitlines()
    )
    between = invoke(*arguments, "--max-kl", str((near * far) ** 0.5))
    assert between.exit_code == 1
    assert "tiny-2bit: mean KL" in between.stderr and "tiny-8bit: mean KL" not in between.stderr
    assert invoke(*arguments, "--max-kl", str(far * 1.01)).exit_code == 0
    assert invoke(*arguments, "--max-kl", str(near * 0.99)).exit_code == 1
    assert invoke("eval", "./tiny", "--against", "./tiny", *FEW, "--max-kl", "0").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "MODEL"),
        (["./tiny", "--max-kl", "1"], 2, "--max-kl needs --against"),
        (["./tiny", "--plot", "x.svg"], 2, "--plot needs --against"),
        (["./tiny", "--against", "./tiny", "--plot", "nowhere/x.svg"], 2, "nowhere is no folder"),
        (["./tiny", "--against", "./tiny", "--max-kl", "nan"], 2, "--max-kl is a number from 0 on"),
        (["./tiny", "--against", "./tiny", "--max-kl", "-1"], 2, "--max-kl is a number from 0 on"),
        (["./tiny", "--tokens", "1"], 2, "--tokens"),
        (["./tiny", "--text", "nowhere.txt"], 2, "nowhere.txt cannot be read"),
        (["./nowhere"], 3, "no such folder"),
        (["./tiny", "--against", "./nowhere"], 3, "no such folder"),
        (["./tiny", "--against", "./other"], 2, "different vocabularies"),
        (
            ["./tiny", "--tokens", "9000", "--context", "5000", "--text", "long.txt"],
            2,
            "context has 4096",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_refused_with_the_remedy(invoke, here, arguments, code, text):
    if not (here / "other").exists():
        shutil.copytree(here / "tiny", here / "other")
        tokenizer = (here / "other" / "tokenizer.json").read_text()
        (here / "other" / "tokenizer.json").write_text(tokenizer.replace('"a"', '"€"', 1))
        (here / "long.txt").write_text("a" * 9000)
    result = invoke("eval", *arguments)
    assert result.exit_code == code, result.stderr
    assert (
        text in result.stderr
        and result.stderr.startswith("mlxarch: error: ")
        and result.stdout == ""
    )


# Receipts ------------------------------------------------------------------------------------------------------------


def test_quantize_ends_with_a_measurement_unless_told_otherwise(invoke, here, tmp_path):
    result = invoke("quantize", "./tiny", "-o", str(tmp_path / "out"), "--bits", "3")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^KL: [\d.e-]+ ±[\d.e-]+ nats a token$", result.stdout, re.MULTILINE)
    receipt = json.loads((tmp_path / "out" / RECEIPT_FILE).read_text())
    assert receipt["evaluation"]["all"]["tokens"] > 2000 and receipt["source"]["name"] == "tiny"
    silent = invoke("quantize", "./tiny", "-o", str(tmp_path / "silent"), "--no-eval")
    assert "KL" not in silent.stdout
    assert json.loads((tmp_path / "silent" / RECEIPT_FILE).read_text())["evaluation"] is None
    copy = invoke("quantize", "./tiny", "-o", str(tmp_path / "copy"), "--bits", "original")
    assert "KL" not in copy.stdout, "a copy has lost nothing"


def test_show_prints_the_receipt_of_a_folder(invoke, here):
    text = invoke("show", "./tiny-8bit").stdout
    assert "quantized to 8 bits" in text and "most lost in:" in text and "not asked for" in text
    assert (
        json.loads(invoke("show", "./tiny-8bit", "--json").stdout)["receipts"]["./tiny-8bit"][
            "format"
        ]
        == 1
    )
    assert "receipt" not in invoke("show", "./tiny").stdout


@pytest.mark.parametrize(
    "text",
    ['{"files": {}}', '{"files": {}, "source": 3, "tensors": {"a": 1}, "evaluation": {"all": []}}'],
)
def test_show_bears_with_a_receipt_that_says_little(invoke, here, tmp_path, text):
    shutil.copytree("tiny-8bit", tmp_path / "model")
    (tmp_path / "model" / RECEIPT_FILE).write_text(text)
    result = invoke("show", str(tmp_path / "model"))
    assert result.exit_code == 0 and "made by:" in result.stdout


def test_verify_names_what_changed(invoke, here, tmp_path):
    shutil.copytree("tiny-8bit", tmp_path / "model")
    sound = invoke("verify", str(tmp_path / "model"))
    assert sound.exit_code == 0 and "as it was made" in sound.stdout
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    (tmp_path / "model" / "extra.py").write_text("")
    (tmp_path / "model" / "config.json").unlink()
    damaged = invoke("verify", str(tmp_path / "model"))
    assert damaged.exit_code == 1 and damaged.stdout == ""
    for problem in (
        "model.safetensors has changed",
        "extra.py was not there",
        "config.json is missing",
    ):
        assert problem in damaged.stderr
    problems = json.loads(invoke("verify", str(tmp_path / "model"), "--json").stdout)["problems"]
    assert len(problems) == 3
    assert (
        invoke("verify", "./tiny").exit_code == 1
        and "no receipt.json" in invoke("verify", "./tiny").stderr
    )
    assert invoke("verify", "no-such-model").exit_code == 3


def test_verify_finds_a_model_by_its_name(invoke, here, home):
    shutil.copytree("tiny-8bit", home / "data" / "models" / "tiny-8bit")
    assert invoke("verify", "tiny-8bit").exit_code == 0


def test_verify_takes_the_name_that_ran_the_model(invoke, here, home):
    shutil.copytree("tiny-8bit", home / "data" / "models" / "qwen3-0.6b-8bit")
    for name in ("qwen3-0.6b-8bit", "qwen3-0.6b", "Qwen3:0.6B"):
        assert "qwen3-0.6b-8bit: every file is as it was made" in invoke("verify", name).stdout
    shutil.copytree("tiny-8bit", home / "data" / "models" / "qwen3-0.6b-4bit")
    several = invoke("verify", "qwen3-0.6b")
    assert (
        several.exit_code == 2 and "qwen3-0.6b-4bit or qwen3-0.6b-8bit; name one" in several.stderr
    )
    assert invoke("verify", "qwen3-8b").exit_code == 3


def test_a_picture_is_drawn_and_a_wrong_name_is_refused_before_anything_is_read(
    invoke, here, tmp_path
):
    arguments = ["eval", "./tiny-8bit", "./tiny-2bit", "--against", "./tiny", *FEW]
    result = invoke(*arguments, "--plot", str(tmp_path / "x.svg"))
    assert result.exit_code == 0 and "drawn" in result.stderr, result.stderr
    assert ">tiny-2bit<" in (tmp_path / "x.svg").read_text()
    wrong = invoke(*arguments, "--plot", str(tmp_path / "x.pdf"))
    assert wrong.exit_code == 2 and ".svg or .png" in wrong.stderr and wrong.stdout == ""
