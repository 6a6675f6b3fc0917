"""Pictures of evaluations: what they show, in both formats, and what is refused."""

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
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


def test_names_of_models_do_not_cover_each_other(found):
    alike = [*found, *found, found[0]]

    def overlaps(label: Callable[[Any], object]) -> int:
        figure = Figure(layout="constrained")
        panel = figure.subplots()
        plots._plot_kl_against_size(panel, alike)
        label(panel)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == len(alike)
        return sum(a.overlaps(b) for a, b in combinations(boxes, 2))

    def beside(panel: Any) -> None:
        for each in alike:
            panel.annotate(each.model, (each.size.bytes / 1e6, each.all.kl_mean.value))

    assert overlaps(lambda panel: plots._label_points(panel, alike)) == 0
    assert overlaps(beside) > 0  # negative control


def test_panels_of_models_share_one_scale():
    for values, scale in (([0.001, 0.5], "log"), ([0.4, 0.5], "linear"), ([0.0, 0.5], "linear")):
        panels = Figure().subplots(1, 2)
        for panel, value in zip(panels, values, strict=True):
            panel.plot([value, value])
        assert panels[0].get_ylim() != panels[1].get_ylim()
        plots._share_y_scale(panels, values)
        assert panels[0].get_ylim() == panels[1].get_ylim()
        assert panels[0].get_yscale() == scale
        low, high = panels[0].get_ylim()
        assert low <= min(values) and max(values) <= high


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
