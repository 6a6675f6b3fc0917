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
        for number, (path, tensor) in enumerate(packed.items()):
            progress("comparing weights", number, len(packed))
            loss, exact = Loss(), source.parameters[path]
            for start, stop in chunks(tensor, CHUNK):
                loss.add(exact.rows(start, stop), tensor.rows(start, stop))
            if loss.relative is not None:
                found[path] = loss.relative
        progress("comparing weights", len(packed), len(packed))
    return found


def draw(file: Path, evaluations: Sequence[Evaluation], lost: Mapping[str, Mapping[str, float]]) -> None:
    """Write the picture: one panel for all evaluations, and one for each model in ``lost``.

    Args:
        file: .svg or .png.
        evaluations: against one original.
        lost: name of a model -> what ``losses`` found.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * (1 + len(lost)), 4.5), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(lost), squeeze=False)[0]
    _sizes(first, evaluations)
    for panel, (name, errors) in zip(others, lost.items(), strict=True):
        _layers(panel, name, errors)
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
    if all(found.all.kl_mean and found.all.kl_mean.value > 0 for found in evaluations):
        panel.set_yscale("log")
    panel.margins(x=0.25)
    panel.set(title=f"against {evaluations[0].against}", xlabel="weights, MB", ylabel="KL, nats a token (± 2 s.e.)")
    panel.grid(alpha=0.3)


def _layers(panel: Any, name: str, errors: Mapping[str, float]) -> None:
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for path, error in errors.items():
        if layer := _LAYER.fullmatch(path):
            kinds[layer[2]][int(layer[1])] = error
        else:
            panel.axhline(error, linestyle=":", color="gray")
            panel.annotate(path.removesuffix(".weight"), (0, error), xycoords=("axes fraction", "data"), fontsize=8)
    for kind, by_layer in kinds.items():
        panel.plot(list(by_layer), list(by_layer.values()), marker=".", label=kind)
    if any(errors.values()):
        panel.set_yscale("log")
    panel.set(title=name, xlabel="layer", ylabel="squared error over squares of the original")
    panel.grid(alpha=0.3)
    if kinds:
        panel.legend(fontsize=8)
