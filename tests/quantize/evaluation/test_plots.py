"""Pictures of evaluations: what they show, in both formats, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_chat import make_chat_model

from mlxarch.errors import BackendMissing, InvalidInput, OutputError
from mlxarch.quantize import convert
from mlxarch.quantize.evaluation import plots
from mlxarch.quantize.evaluation.eval_model import EvalModel
from mlxarch.quantize.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_model(tmp_path_factory.mktemp("models") / "tiny")
    for bits in (4, 2):
        convert(folder, folder.with_name(f"tiny-{bits}"), bits=bits, method="round")
    return folder


@pytest.fixture
def found(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "home"))
    few = EvaluationSettings(tokens=30, context=30)
    return [evaluate(original.with_name(f"tiny-{bits}"), original, settings=few) for bits in (4, 2)]


def lost(original: Path, bits: int) -> dict[str, float]:
    return plots.relative_weight_errors(
        EvalModel.from_folder(original.with_name(f"tiny-{bits}")), EvalModel.from_folder(original)
    )


def test_losses_are_those_of_the_weights(original, monkeypatch):
    monkeypatch.setattr(plots, "CHUNK_BYTES", 3000)
    four, two = lost(original, 4), lost(original, 2)
    exact = load_file(original / "model.safetensors")
    assert four.keys() == two.keys() == {name for name, weight in exact.items() if weight.ndim == 2}
    assert all(10 * four[name] < two[name] < 1 for name in four)
    from mlxarch.checkpoint.source import open_checkpoint

    tensor = open_checkpoint(original.with_name("tiny-4")).tensors["lm_head.weight"]
    error = np.array(tensor.load()) - exact["lm_head.weight"]
    expected = np.square(error).sum() / np.square(exact["lm_head.weight"]).sum()
    assert four["lm_head.weight"] == pytest.approx(expected, rel=1e-4)
    assert (
        plots.relative_weight_errors(
            EvalModel.from_folder(original), EvalModel.from_folder(original)
        )
        == {}
    ), "nothing is quantized"
    told: list[tuple[int, int]] = []
    made = EvalModel.from_folder(original.with_name("tiny-4"))
    plots.relative_weight_errors(
        made, EvalModel.from_folder(original), lambda label, done, total: told.append((done, total))
    )
    size = (original.with_name("tiny-4") / "model.safetensors").stat().st_size
    assert (
        told == sorted(told) and told[0][0] == 0 and 0.8 * size < told[-1][0] == told[-1][1] < size
    )


def test_a_picture_shows_every_model_and_every_kind_of_tensor(original, found, tmp_path):
    errors = [("tiny-4", lost(original, 4)), ("tiny-2", lost(original, 2))]
    plots.draw_plots(tmp_path / "all.svg", found, errors)
    text = re.sub(r"\s+", " ", (tmp_path / "all.svg").read_text())
    for word in (
        "tiny-4",
        "tiny-2",
        "against tiny",
        "self_attn.q_proj",
        "mlp.down_proj",
        "lm_head",
        "weights, MB",
    ):
        assert f">{word}<" in text, word
    plots.draw_plots(tmp_path / "again.svg", found, errors)
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "all.svg").read_bytes()
    plots.draw_plots(tmp_path / "one.svg", found[:1], [])
    assert "tiny-2" not in (tmp_path / "one.svg").read_text()
    plots.draw_plots(tmp_path / "all.png", found, errors)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_panels_stand_in_rows_and_share_a_legend(original, found, tmp_path):
    widths = {}
    for count in (1, 2, 6):
        file = tmp_path / f"{count}.svg"
        plots.draw_plots(file, found, [("tiny", lost(original, 4))] * count)
        text = file.read_text()
        assert text.count("tiny</text>") == count + 1, (
            "each has a panel, though they are called alike"
        )
        assert text.count(">self_attn.q_proj<") == 1
        widths[count] = float(re.findall(r'width="([\d.]+)pt"', text)[0])
    assert widths[1] < widths[2] == widths[6]


def test_the_original_itself_can_be_drawn(original, found, tmp_path, monkeypatch):
    same = evaluate(original, original, settings=EvaluationSettings(tokens=30, context=30))
    plots.draw_plots(tmp_path / "same.svg", [same], [])
    assert (tmp_path / "same.svg").stat().st_size > 1000


def test_what_cannot_be_drawn_is_refused_beforehand(found, tmp_path, monkeypatch):
    plots.check_plot_file(tmp_path / "good.SVG")
    with pytest.raises(InvalidInput, match=r"\.svg or \.png"):
        plots.check_plot_file(tmp_path / "figure.pdf")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InvalidInput, match="cannot be written"):
        plots.check_plot_file(tmp_path / "folder.svg")
    with pytest.raises(OutputError, match="No such file"):
        plots.draw_plots(tmp_path / "nowhere" / "x.svg", found, [])
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match=r"mlxarch\[plot\]"):
        plots.check_plot_file(tmp_path / "good.svg")
