"""mlxarch quantize: options, output, summary."""

import json
import shutil
from pathlib import Path

import pytest

import mlxarch


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(tiny, folder / "tiny")
    return folder


def settings_of(folder: Path) -> dict[str, object] | None:
    config = json.loads((folder / "config.json").read_text())
    section = config.get("quantization")
    return section and {name: section[name] for name in ("bits", "group_size", "mode")}


@pytest.mark.parametrize(
    ("arguments", "name", "settings"),
    [
        ([], "tiny-4bit", {"bits": 4, "group_size": 64, "mode": "affine"}),
        (["--bits", "8"], "tiny-8bit", {"bits": 8, "group_size": 64, "mode": "affine"}),
        (["--q-bits", "8", "--q-group-size", "32"], "tiny-8bit", {"bits": 8, "group_size": 32, "mode": "affine"}),
        (["--mode", "mxfp4"], "tiny-mxfp4", {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        (["--q-mode", "mxfp8"], "tiny-mxfp8", {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
        (["--bits", "original"], "tiny-copy", None),
        (["--bits", "original", "--dtype", "bfloat16"], "tiny-bfloat16", None),
        (["-o", "out"], "out", {"bits": 4, "group_size": 64, "mode": "affine"}),
        (["--mlx-path", "out"], "out", {"bits": 4, "group_size": 64, "mode": "affine"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_decide_what_is_written_and_where(invoke, here, arguments, name, settings):
    result = invoke("quantize", "./tiny", *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{here / name}: ")
    assert "of disk" in result.stderr.splitlines()[0]
    assert settings_of(here / name) == settings


def test_what_it_wrote_answers(invoke, here):
    invoke("quantize", "./tiny", "--bits", "8")
    result = invoke("run", "./tiny-8bit", "Hi", "-n", "8", "--json")
    expected = mlxarch.load(here / "tiny-8bit").generate([{"role": "user", "content": "Hi"}], max_tokens=8).text
    assert json.loads(result.stdout)["text"] == expected


def test_the_summary_as_json(invoke, here):
    report = json.loads(invoke("quantize", "./tiny", "--json").stdout)
    assert set(report) == {
        *("output", "source_bytes", "output_bytes", "tensors", "quantized", "bits_per_weight", "notes"),
        "evaluation",
    }
    assert report["output"] == str(here / "tiny-4bit") and 4 < report["bits_per_weight"] < 6


def test_an_output_that_exists_is_refused_unless_forced(invoke, here):
    assert invoke("quantize", "./tiny").exit_code == 0
    refused = invoke("quantize", "./tiny")
    assert refused.exit_code == 1 and "tiny-4bit" in refused.stderr and refused.stdout == ""
    assert invoke("quantize", "./tiny", "--force", "--group-size", "32").exit_code == 0
    settings = settings_of(here / "tiny-4bit")
    assert settings and settings["group_size"] == 32


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing-like-it"], 3),
        (["./nowhere"], 3),
        (["./tiny", "--bits", "7"], 2),
        (["./tiny", "--mode", "q4_k"], 2),
        (["./tiny", "--group-size", "48"], 2),
        (["./tiny", "--mode", "mxfp4", "--bits", "8"], 2),
        ([], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(invoke, here, arguments, code):
    result = invoke("quantize", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("mlxarch: error: ")
    assert [path.name for path in here.iterdir()] == ["tiny"]
