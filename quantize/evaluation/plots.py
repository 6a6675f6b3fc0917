"""Plots of evaluations with matplotlib: KL divergence against size, and weight error by layer."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import BackendMissing, InvalidInput, OutputError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.evaluation.eval_model import EvalModel
from mlxarch.quantize.evaluation.evaluate import Evaluation
from mlxarch.quantize.methods.row_chunks import ErrorStats, row_ranges

SUFFIXES = (".svg", ".png")
CHUNK_BYTES = 8 << 20  # of weights in float32 compared at once
MAX_COLUMNS = 3  # panels side by side
LOG_SCALE_RATIO = 4  # of the largest to the smallest value, above which an axis is logarithmic
LABEL_SIZE = 8  # points
LINE_HEIGHT = 1.3  # of a label, by its size
LETTER_WIDTH = 0.62  # of a label, by its size
_LAYER = re.compile(r".*\blayers\.(\d+)\.(.+)\.weight")


def check_plot_file(file: Path) -> None:
    """Check that a plot can be written to ``file``, so that errors come before long computations.

    Raises:
        InvalidInput: the suffix is not .svg or .png, the folder does not exist, or the file cannot
            be written.
        BackendMissing: matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise InvalidInput(
            f"{file}: pictures are written as {' or '.join(SUFFIXES)}; give the file such a name"
        )
    folder = file.absolute().parent
    if not folder.is_dir():
        raise InvalidInput(f"{file}: {file.parent} is no folder; make it first")
    if not os.access(file if file.exists() else folder, os.W_OK) or file.is_dir():
        raise InvalidInput(f"{file} cannot be written; name another file")
    if find_spec("matplotlib") is None:
        raise BackendMissing("drawing needs the matplotlib package: pip install 'mlxarch[plot]'")


def relative_weight_errors(
    model: EvalModel, original: EvalModel, progress: Progress = silent
) -> dict[str, float]:
    """Compute the relative squared error of each quantized parameter of ``model``.

    Returns:
        path -> sum of squared differences from the original's values over the sum of squares of
        these values.
    """
    errors: dict[str, float] = {}
    with model.open_weights() as made, original.open_weights() as source:
        quantized = {
            path: tensor
            for path, tensor in made.parameters.items()
            if isinstance(tensor, QuantizedTensor)
        }
        done = 0
        total = sum(tensor.nbytes for tensor in quantized.values())
        for path, tensor in quantized.items():
            progress("comparing weights", done, total)
            stats = ErrorStats()
            exact = source.parameters[path]
            for start, stop in row_ranges(tensor, CHUNK_BYTES):
                stats.add_rows(exact.read_rows(start, stop), tensor.read_rows(start, stop))
            if stats.relative_error is not None:
                errors[path] = stats.relative_error
            done += tensor.nbytes
        progress("comparing weights", total, total)
    return errors


def draw_plots(
    file: Path,
    evaluations: Sequence[Evaluation],
    weight_errors: Sequence[tuple[str, Mapping[str, float]]],
) -> None:
    """Draw the KL divergence of all evaluations, and the weight errors of each model.

    Args:
        file: output file, .svg or .png.
        evaluations: evaluations of models against one original.
        weight_errors: names of models, each with its ``relative_weight_errors``.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = 1 + len(weight_errors)
    columns = min(panels, MAX_COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    _plot_kl_against_size(first, evaluations)
    styles = _line_styles([errors for _, errors in weight_errors])
    for panel, (name, errors) in zip(others, weight_errors, strict=False):
        _plot_errors_by_layer(panel, name, errors, styles)
    _share_y_scale(
        others[: len(weight_errors)],
        [error for _, errors in weight_errors for error in errors.values()],
    )
    for panel in others[len(weight_errors) :]:
        panel.set_axis_off()
    if styles:
        lines = [Line2D([], [], **style) for style in styles.values()]
        figure.legend(
            lines, list(styles), loc="outside lower center", ncols=2 * columns, fontsize=8
        )
    _label_points(first, evaluations)
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else None
    try:
        # a fixed salt and no date: the same data give the same file
        with rc_context({"svg.hashsalt": "mlxarch", "svg.fonttype": "none"}):
            figure.savefig(file, dpi=150, metadata=metadata)
    except OSError as error:
        raise OutputError(f"{file} could not be written: {error.strerror or error}") from error


def _plot_kl_against_size(panel: Any, evaluations: Sequence[Evaluation]) -> None:
    unit, divisor = _size_unit(evaluations)
    for evaluation in evaluations:
        if kl := evaluation.all.kl_mean:
            size = evaluation.size.bytes / divisor
            panel.errorbar(size, kl.value, yerr=2 * (kl.error or 0), fmt="o", capsize=3)
    means = [evaluation.all.kl_mean for evaluation in evaluations]
    _set_y_scale(panel, [mean.value if mean else 0.0 for mean in means])
    panel.margins(x=0.25, y=0.1)
    panel.set(
        title=f"against {evaluations[0].against}",
        xlabel=f"weights, {unit}",
        ylabel="KL, nats a token (± 2 s.e.)",
    )
    panel.grid(alpha=0.3)


def _size_unit(evaluations: Sequence[Evaluation]) -> tuple[str, float]:
    """Unit of the axis of sizes, and its bytes."""
    largest = max(evaluation.size.bytes for evaluation in evaluations)
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def _label_points(panel: Any, evaluations: Sequence[Evaluation]) -> None:
    """Write the names beside the points, moved down where one would cover another."""
    figure = panel.figure
    figure.draw_without_rendering()  # the layout decides where the points are
    _, divisor = _size_unit(evaluations)
    points = []
    for evaluation in evaluations:
        if kl := evaluation.all.kl_mean:
            place = (evaluation.size.bytes / divisor, kl.value)
            x, y = panel.transData.transform(place) * 72 / figure.dpi  # points
            points.append((x, y, place, evaluation.model))
    taken: list[tuple[float, float, float]] = []  # left, right, baseline
    for x, y, place, name in sorted(points, key=lambda point: (-point[1], point[0])):
        left = x + 6
        right = left + LETTER_WIDTH * LABEL_SIZE * len(name)
        baseline = y + 4
        beside = [low for start, end, low in taken if start < right and left < end]
        for low in sorted(beside, reverse=True):
            if abs(low - baseline) < LINE_HEIGHT * LABEL_SIZE:
                baseline = low - LINE_HEIGHT * LABEL_SIZE
        taken.append((left, right, baseline))
        offset = (6, baseline - y)
        panel.annotate(name, place, offset, textcoords="offset points", fontsize=LABEL_SIZE)


def _plot_errors_by_layer(
    panel: Any, name: str, errors: Mapping[str, float], styles: Mapping[str, dict[str, Any]]
) -> None:
    """A line over layers for each kind of matrix, a level for each matrix outside of layers."""
    kinds: dict[str, dict[int | None, float]] = defaultdict(dict)
    for path, error in errors.items():
        kind, layer = _kind_and_layer(path)
        kinds[kind][layer] = error
    for kind, by_layer in kinds.items():
        if None in by_layer:
            panel.axhline(by_layer[None], **styles[kind])
        else:
            panel.plot(list(by_layer), list(by_layer.values()), **styles[kind])
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(title=name, xlabel="layer", ylabel="squared error over squares of the original")
    panel.grid(alpha=0.3)


def _kind_and_layer(path: str) -> tuple[str, int | None]:
    """Split a parameter path into the name within its layer and the layer's index, if any."""
    if found := _LAYER.fullmatch(path):
        return found[2], int(found[1])
    return path.removesuffix(".weight"), None


def _line_styles(weight_errors: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Line style of each kind of matrix, the same in every panel; gray outside of layers."""
    kinds = dict(_kind_and_layer(path) for errors in weight_errors for path in errors)
    in_layers = [kind for kind, layer in kinds.items() if layer is not None]
    outside = [kind for kind, layer in kinds.items() if layer is None]
    styles: dict[str, dict[str, Any]] = {}
    for number, kind in enumerate(in_layers):
        line = ("-", "--", ":")[number // 10 % 3]
        styles[kind] = {"color": f"C{number % 10}", "linestyle": line, "marker": "."}
    for number, kind in enumerate(outside):
        styles[kind] = {"color": "gray", "linestyle": (":", "-.", "--")[number % 3]}
    return styles


def _set_y_scale(panel: Any, values: Sequence[float]) -> None:
    """Use a logarithmic scale unless the range is so small that it would have few tick labels."""
    if min(values, default=0.0) > 0 and max(values) > LOG_SCALE_RATIO * min(values):
        panel.set_yscale("log")


def _share_y_scale(panels: Sequence[Any], values: Sequence[float]) -> None:
    """Give panels of different models one scale, so that they can be compared."""
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        _set_y_scale(panel, values)
        if panel.get_yscale() == "log":
            panel.set_ylim(min(values) / 1.3, max(values) * 1.3)
        else:
            panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
