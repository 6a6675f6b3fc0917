"""Receipt of a conversion (receipt.json): method, error of each tensor, evaluation, hashes."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.layout import OutputLayout
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress
from mlxarch.quantization.config_section import quantization_to_config
from mlxarch.quantize.calibration.texts import Text
from mlxarch.quantize.evaluation import report
from mlxarch.quantize.evaluation.eval_model import EvalModel, content_hash, measure_size
from mlxarch.quantize.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from mlxarch.quantize.output.model_card import Origin
from mlxarch.quantize.output.summary import ParameterResult
from mlxarch.system.checksums import sha256_files

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raised when a key changes its meaning
EVALUATION_SETTINGS = EvaluationSettings(tokens=512, context=256)
SIGNIFICANT_DIGITS = 6  # of numbers; results on two machines may differ in later digits


def evaluate_output(
    folder: Path,
    title: str,
    source: CheckpointSource,
    resolved: Resolved,
    origin: Origin,
    texts: Sequence[Text] | None,
    progress: Progress,
) -> Evaluation | str:
    """Evaluate a converted model against its source; if that fails, return the reason.

    The conversion is complete by then and must not be lost, so every exception is caught.

    Args:
        folder: folder of the converted model.
        title: its name in the evaluation.
        source: checkpoint that it was converted from.
        resolved: the same, resolved to a model with its weights open.
        origin: whose name the source has in the evaluation.
        texts: evaluation texts; None takes those of the package.
        progress: called with the bytes of weights read so far.
    """
    try:
        converted = replace(EvalModel.from_folder(folder), name=title)
        original = EvalModel(
            name=origin.name,
            size=measure_size(resolved.parameters.values(), source.shards),
            vocab_size=resolved.model.vocab_size,
            context_length=resolved.model.context_length,
            tokenizer=converted.tokenizer,  # a copy of the source's
            open_weights=lambda: nullcontext(resolved),
            content_hash=partial(content_hash, source.shards, source.config),
        )
        context = min(EVALUATION_SETTINGS.context, original.context_length)
        settings = replace(EVALUATION_SETTINGS, context=context)
        return evaluate(converted, original, texts=texts, settings=settings, progress=progress)
    except Exception as error:
        reason = str(error).replace(f"{folder}/", "").replace(str(folder), "the model")
        reason = reason or type(error).__name__
        logger.warning("not evaluated: %s", reason)
        return reason


def build_receipt(
    *,
    method: str,
    origin: Origin,
    source_files: Mapping[str, str],
    layout: OutputLayout,
    results: Mapping[str, ParameterResult],
    notes: list[str],
    expected_kl: float | None,
    evaluation: Evaluation | str,
    versions: Mapping[str, str],
    files: Mapping[str, str],
) -> bytes:
    """Build the contents of receipt.json; docs/receipt.md describes its keys.

    The same arguments give the same bytes.

    Args:
        method: in words.
        origin: origin of the source.
        source_files: name of each weight file of the source -> its SHA-256.
        layout: layout of the output.
        results: path of the parameter -> its measurements.
        notes: sentences about anything unexpected.
        expected_kl: KL divergence in nats per token that was forecast; None if there was no
            forecast.
        evaluation: evaluation of the output, or the reason why there is none.
        versions: package -> version.
        files: name of every other file in the output -> its SHA-256.
    """
    forecast = None
    if expected_kl is not None:
        forecast = {"kl": expected_kl, "measured": _measured_kl(evaluation)}
    failed = isinstance(evaluation, str)
    contents = {
        "format": FORMAT_VERSION,
        "method": method,
        "notes": notes,
        "source": {
            "name": origin.name,
            "revision": origin.revision or None,
            "files": dict(source_files),
        },
        "versions": dict(versions),
        "bits_per_weight": 8 * layout.weight_bytes / max(layout.elements, 1),
        "tensors": _quantized_tensors(layout, results),
        "forecast": forecast,
        "evaluation": None if failed else report.evaluation_to_json(evaluation),
        "not_evaluated": evaluation if failed else None,
        "files": dict(sorted(files.items())),
    }
    text = json.dumps(_round_floats(contents), indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _quantized_tensors(
    layout: OutputLayout, results: Mapping[str, ParameterResult]
) -> dict[str, dict[str, Any]]:
    """Path -> quantization, bits per weight and errors of each quantized parameter."""
    tensors = {}
    for path, entry in layout.entries.items():
        if entry.quantization is None:
            continue
        result = results.get(path)
        tensors[path] = {
            **quantization_to_config(entry.quantization),
            "bits_per_weight": 8 * entry.nbytes / entry.elements,
            "error": result.error if result else None,
            "against_rounding": result.against_rounding if result else None,
        }
    return tensors


def _measured_kl(evaluation: Evaluation | str) -> float | None:
    """Mean KL of an evaluation, if there is one."""
    if isinstance(evaluation, str) or evaluation.all.kl_mean is None:
        return None
    return evaluation.all.kl_mean.value


def source_hashes(source: CheckpointSource, origin: Origin) -> dict[str, str]:
    """SHA-256 of the source's weight files by name.

    They are those that the Hub states, or else those of the files on this machine. A source that is
    read from the Hub may have only headers on this machine; these are not hashed.
    """
    if origin.files:
        return dict(origin.files)
    return sha256_files(
        shard.path for shard in source.shards if shard.path.stat().st_size == shard.size
    )


def _round_floats(value: Any) -> Any:
    """Round the floats in JSON values to ``SIGNIFICANT_DIGITS``; NaN and infinity become None."""
    match value:
        case float():
            return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
        case dict():
            return {key: _round_floats(each) for key, each in value.items()}
        case list() | tuple():
            return [_round_floats(each) for each in value]
    return value
