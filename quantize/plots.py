"""Pictures of evaluations, with matplotlib: divergence against size, and what each tensor lost."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlxarch.errors import BackendMissing, InvalidInput, OutputError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.evaluation import Evaluation
from mlxarch.quantize.rows import Loss, chunks
from mlxarch.quantize.subject import Subject
from mlxarch.tensors import Packed

SUFFIXES = (".svg", ".png")
CHUNK = 8 << 20  # bytes in float32 that are compared at once
ABREAST = 3  # panels in a row
SPREAD = 4  # between the largest and the smallest value, from which on an axis is logarithmic
_LAYER = re.compile(r".*\blayers\.(\d+)\.(.+)\.weight")


def check(file: Path) -> None:
    """Refuse what could not be drawn, before anything is measured for it.

    Raises:
        InvalidInput: another suffix than .svg or .png, no folder to write it to, or something there that must stay.
        BackendMissing: matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{file}: pictures are written as {' or '.join(SUFFIXES)}; give the file such a name")
    if not file.absolute().parent.is_dir():
        raise InvalidInput(f"{file}: {file.parent} is no folder; make it first")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK) or file.is_dir():
        raise InvalidInput(f"{file} cannot be written; name another file")
    if find_spec("matplotlib") is None:
        raise BackendMissing("drawing needs the matplotlib package: pip install 'mlxarch[plot]'")


def losses(model: Subject, original: Subject, progress: Progress = silent) -> dict[str, float]:
    """The sum of squared differences over the sum of squares of each quantized tensor of ``model``, by its path."""
    found: dict[str, float] = {}
    with model.opened() as made, original.opened() as source:
        packed = {path: tensor for path, tensor in made.parameters.items() if isinstance(tensor, Packed)}
        done, total = 0, sum(tensor.nbytes for tensor in packed.values())
        for path, tensor in packed.items():
            progress("comparing weights", done, total)
            loss, exact = Loss(), source.parameters[path]
            for start, stop in chunks(tensor, CHUNK):
                loss.add(exact.rows(start, stop), tensor.rows(start, stop))
            if loss.relative is not None:
                found[path] = loss.relative
            done += tensor.nbytes
        progress("comparing weights", total, total)
    return found


def draw(file: Path, evaluations: Sequence[Evaluation], lost: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Write the picture: one panel for all evaluations, and one for each model in ``lost``.

    Args:
        file: .svg or .png.
        evaluations: against one original.
        lost: names of models, and what ``losses`` found of each.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(1 + len(lost), ABREAST)
    rows = -(-(1 + len(lost)) // columns)
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    _sizes(first, evaluations)
    styles = _styles([errors for _, errors in lost])
    for panel, (name, errors) in zip(others, lost, strict=False):
        _layers(panel, name, errors, styles)
    for panel in others[len(lost) :]:
        panel.set_axis_off()
    if styles:
        lines = [Line2D([], [], **style) for style in styles.values()]
        figure.legend(lines, list(styles), loc="outside lower center", ncols=2 * columns, fontsize=8)
    try:
        with rc_context({"svg.hashsalt": "mlxarch", "svg.fonttype": "none"}):  # the same picture every time
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise OutputError(f"{file} could not be written: {error.strerror or error}") from error


def _sizes(panel: Any, evaluations: Sequence[Evaluation]) -> None:
    for found in evaluations:
        if found.all.kl_mean is not None:
            size, kl = found.size.bytes / 1e6, found.all.kl_mean
            panel.errorbar(size, kl.value, yerr=2 * (kl.error or 0), fmt="o", capsize=3)
            panel.annotate(found.model, (size, kl.value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    _scale(panel, [found.all.kl_mean.value if found.all.kl_mean else 0.0 for found in evaluations])
    panel.margins(x=0.25)
    panel.set(title=f"against {evaluations[0].against}", xlabel="weights, MB", ylabel="KL, nats a token (± 2 s.e.)")
    panel.grid(alpha=0.3)


def _layers(panel: Any, name: str, errors: Mapping[str, float], styles: Mapping[str, dict[str, Any]]) -> None:
    kinds: dict[str, dict[int | None, float]] = defaultdict(dict)
    for path, error in errors.items():
        kind, layer = _kind(path)
        kinds[kind][layer] = error
    for kind, by_layer in kinds.items():
        if None in by_layer:
            panel.axhline(by_layer[None], **styles[kind])
        else:
            panel.plot(list(by_layer), list(by_layer.values()), **styles[kind])
    _scale(panel, list(errors.values()))
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(title=name, xlabel="layer", ylabel="squared error over squares of the original")
    panel.grid(alpha=0.3)


def _kind(path: str) -> tuple[str, int | None]:
    """What a tensor is called in every layer, and its layer; its own name and None outside of them."""
    if found := _LAYER.fullmatch(path):
        return found[2], int(found[1])
    return path.removesuffix(".weight"), None


def _styles(lost: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """How each kind of tensor is drawn, in every panel alike: a line over the layers, or a level in gray."""
    kinds = dict(_kind(path) for errors in lost for path in errors)
    lines = [kind for kind, layer in kinds.items() if layer is not None]
    levels = [kind for kind, layer in kinds.items() if layer is None]
    return {
        kind: {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "."}
        for number, kind in enumerate(lines)
    } | {kind: {"color": "gray", "linestyle": (":", "-.", "--")[number % 3]} for number, kind in enumerate(levels)}


def _scale(panel: Any, values: Sequence[float]) -> None:
    """Logarithmic where that shows more: its marks are few, and hard to read, within a factor of some."""
    if min(values, default=0.0) > 0 and max(values) > SPREAD * min(values):
        panel.set_yscale("log")
