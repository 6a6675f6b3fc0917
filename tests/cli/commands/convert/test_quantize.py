"""mlxarch quantize: options, output, summary."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlxarch
from mlxarch.quantize.mixed_precision import expected_kl, targets


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
        (
            ["--q-bits", "8", "--q-group-size", "32"],
            "tiny-8bit",
            {"bits": 8, "group_size": 32, "mode": "affine"},
        ),
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
    expected = (
        mlxarch.load(here / "tiny-8bit")
        .generate([{"role": "user", "content": "Hi"}], max_tokens=8)
        .text
    )
    assert json.loads(result.stdout)["text"] == expected


def test_the_summary_as_json(invoke, here):
    report = json.loads(invoke("quantize", "./tiny", "--json").stdout)
    assert set(report) == {
        *(
            "output",
            "source_bytes",
            "output_bytes",
            "tensors",
            "quantized",
            "bits_per_weight",
            "notes",
        ),
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
        (["./tiny", "--bits", "original", "--group-size", "32"], 2),
        (["./tiny", "--bits", "original", "--mode", "mxfp4"], 2),
        (["./tiny", "--mode", "mxfp4", "--target-bits", "5"], 2),
        (["./tiny", "--mode", "mxfp4", "--recipe"], 2),
        (["./tiny", "--target-size", "16"], 2),
        (["./nowhere", "--target-bits", "99"], 2),
        (["./nowhere", "--target-kl", "50"], 2),
        (["./nowhere", "--target-kl", "1e-12"], 2),
        (["./tiny", "--calibration", os.devnull], 2),
        (["./tiny", "--text", os.devnull], 2),
        ([], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(invoke, here, arguments, code):
    result = invoke("quantize", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("mlxarch: error: ")
    assert [path.name for path in here.iterdir()] == ["tiny"]


# Mixtures ------------------------------------------------------------------------------------------------------------


def test_a_target_is_foretold_before_the_work_and_compared_after_it(invoke, here):
    result = invoke(
        "quantize", "./tiny", "--target-bits", "6", "--group-size", "32", "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.stderr
    receipt = json.loads((here / "tiny-mixed" / "receipt.json").read_text())
    expected, measured = (receipt["forecast"][key] for key in ("kl", "measured"))
    assert (
        measured == receipt["evaluation"]["all"]["kl_mean"]["value"]
        and 0.3 < expected / measured < 3
    )
    said = f"forecast: {expected:.3g}, measured {measured:.3g} ({measured / expected - 1:+.0%})"
    assert said in result.stdout.splitlines()
    assert result.stderr.splitlines()[1] == f"expected KL {expected:.3g} nats a token", (
        "before anything is written"
    )
    card = (here / "tiny-mixed" / "README.md").read_text()
    assert said.removeprefix("forecast: ") in card and "# tiny-mixed" in card
    assert said in " ".join(invoke("show", "./tiny-mixed").stdout.split())


def test_mixed_precision_is_described_by_all_its_bits_and_keeps_its_size_when_floats_are_cast(
    invoke, here
):
    """The source is in float32: scales are cast with the rest, and count as they are stored."""
    for dtype in ("bfloat16", "float32"):
        arguments = [
            "--target-bits",
            "6",
            "--group-size",
            "32",
            "--dtype",
            dtype,
            "-o",
            dtype,
            "--no-eval",
        ]
        assert invoke("quantize", "./tiny", *arguments).exit_code == 0
        receipt = json.loads((here / dtype / "receipt.json").read_text())
        used = sorted({tensor["bits"] for tensor in receipt["tensors"].values()})
        assert (
            len(used) > 1
            and f"{', '.join(map(str, used[:-1]))} or {used[-1]} bits" in receipt["method"]
        )
        assert receipt["forecast"]["kl"] > 0 and receipt["forecast"]["measured"] is None
        weights: dict[str, mx.array] = mx.load(str(here / dtype / "model.safetensors"))  # type: ignore[assignment]
        nbytes, elements = 0, 0
        for path, tensor in receipt["tensors"].items():
            own = weights[path].size * 32 // tensor["bits"]
            nbytes, elements = nbytes + tensor["bits_per_weight"] * own / 8, elements + own
        assert 5.7 < 8 * nbytes / elements <= 6, (
            "counted as the source stores scales, it would be 5 in bfloat16"
        )
        assert {w.dtype for name, w in weights.items() if name.endswith("scales")} == {
            getattr(mx, dtype)
        }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--target-bits", "9.1"],
            "with scales and biases it is {low} at 2 bits everywhere, and {high} at 8",
        ),
        (["--target-bits", "2.9"], "or take a smaller model"),
        (["--target-size", "20kB"], "or take a smaller model"),
        (["--target-size", "900GB"], "or take 8 bits for all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_target_that_leaves_nothing_to_choose_is_refused_before_it_is_measured(
    invoke, here, monkeypatch, arguments, said
):
    def costs(*_: object, **__: object) -> None:
        raise LookupError("measured")

    monkeypatch.setattr(expected_kl, "estimate_sensitivity", costs)
    low, high, how = 3, 9, ["--group-size", "32", "--dtype", "bfloat16", "--no-eval"]
    refused = invoke("quantize", "./tiny", *arguments, *how)
    assert refused.exit_code == 1 and said.format(low=low, high=high) in refused.stderr, (
        refused.stderr
    )
    assert [path.name for path in here.iterdir()] == ["tiny"]
    for near in (low, high):  # what the message names is allowed
        allowed = invoke("quantize", "./tiny", "--target-bits", str(near), *how)
        assert "LookupError: measured" in allowed.stderr


def test_a_recipe_without_a_name_is_the_one_meant_for_the_model(invoke, here):
    assert invoke("quantize", "./tiny", "--no-eval", "--recipe").exit_code == 0
    receipt = json.loads((here / "tiny-mixed" / "receipt.json").read_text())
    assert (
        receipt["notes"][0] == "bits by the recipe tied"
        or receipt["notes"][0] == "bits by the recipe dense"
    )
    named = invoke(
        "quantize",
        "./tiny",
        "--recipe",
        "experts",
        "--group-size",
        "32",
        "--no-eval",
        "-o",
        "named",
    )
    assert named.exit_code == 0, named.stderr
    settings = settings_of(here / "named")
    assert settings and (settings["bits"], settings["group_size"]) == (8, 32)


def test_texts_of_the_users_foretell_and_measure(invoke, here, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Ada, the engine works. " * 40)
    arguments = ["./tiny", "--target-kl", "0.01", "--text", str(tmp_path / "letter.txt")]
    result = invoke("quantize", *arguments)
    assert result.exit_code == 0, result.stderr
    receipt = json.loads((here / "tiny-mixed" / "receipt.json").read_text())
    assert list(receipt["evaluation"]["texts"]) == ["letter"] and receipt["forecast"]["kl"] <= 0.01
    (tmp_path / "letter.txt").write_text("a")
    short = invoke("quantize", *arguments, "--force")
    assert short.exit_code == 2 and "letter is too short" in short.stderr


def test_an_output_that_exists_is_refused_before_a_target_costs_anything(invoke, here, monkeypatch):
    (here / "out").mkdir()
    monkeypatch.setattr(targets, "allocate_for_target", lambda *_, **__: pytest.fail("computed"))
    refused = invoke("quantize", "./tiny", "--target-bits", "5", "-o", "out")
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    for place in ("tiny/config.json/out", "tiny/config.json/deep/out"):
        refused = invoke("quantize", "./tiny", "--target-bits", "5", "-o", place)
        assert (
            refused.exit_code == 1
            and "config.json is no folder; name another output" in refused.stderr
        )
