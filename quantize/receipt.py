"""The receipt of a conversion: what was done, what was lost, how good the result is, and the hashes of all files."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlxarch import receipts
from mlxarch.progress import Progress
from mlxarch.quantize import report
from mlxarch.quantize.card import Origin
from mlxarch.quantize.corpus import Text
from mlxarch.quantize.evaluation import Evaluation, Settings, evaluate
from mlxarch.quantize.formats import as_config
from mlxarch.quantize.plan import Plan
from mlxarch.quantize.subject import Subject, identity, size_of
from mlxarch.quantize.summary import Fact
from mlxarch.weights import Resolved, Source

logger = logging.getLogger(__name__)

FORMAT = 1  # of the receipt; raised when a key changes its meaning
SETTINGS = Settings(tokens=512, context=256)
DIGITS = 6  # of a number: two machines may differ in the last ones


def judge(
    model: Path,
    title: str,
    source: Source,
    resolved: Resolved,
    origin: Origin,
    texts: Sequence[Text] | None,
    progress: Progress,
) -> Evaluation | str:
    """Evaluate a model against what it was made from; where that cannot be done, the reason.

    The conversion stands whatever comes of this, so no error leaves it.
    """
    try:
        made = replace(Subject.from_folder(model), name=title)
        original = Subject(
            name=origin.name,
            size=size_of(resolved.parameters.values(), source.shards),
            vocabulary=resolved.model.vocab_size,
            tokenizer=made.tokenizer,  # the output's is a copy of it
            opened=lambda: nullcontext(resolved),
            identity=partial(identity, source.shards, source.config),
        )
        settings = replace(SETTINGS, context=min(SETTINGS.context, resolved.model.context_length))
        return evaluate(made, original, texts=texts, settings=settings, progress=progress)
    except Exception as error:
        reason = str(error).replace(f"{model}/", "").replace(str(model), "the model") or type(error).__name__
        logger.warning("not evaluated: %s", reason)
        return reason


def make(
    *,
    method: str,
    origin: Origin,
    source_files: Mapping[str, str],
    plan: Plan,
    facts: Mapping[str, Fact],
    notes: list[str],
    forecast: float | None,
    outcome: Evaluation | str,
    versions: Mapping[str, str],
    files: Mapping[str, str],
) -> bytes:
    """The contents of receipt.json; docs/receipt.md describes its keys. The same arguments give the same bytes.

    Args:
        facts: by parameter.
        forecast: nats per token that were expected, if somebody did.
        outcome: an evaluation, or why there is none.
        files: name -> SHA-256, of all others in the folder.
    """
    tensors = {
        path: {
            **as_config(entry.quantization),
            "bits_per_weight": 8 * entry.nbytes / entry.elements,
            "error": facts[path].error if path in facts else None,
            "against_rounding": facts[path].against_rounding if path in facts else None,
        }
        for path, entry in plan.entries.items()
        if entry.quantization is not None
    }
    contents = {
        "format": FORMAT,
        "method": method,
        "notes": notes,
        "source": {"name": origin.name, "revision": origin.revision or None, "files": dict(source_files)},
        "versions": dict(versions),
        "bits_per_weight": 8 * plan.weight_bytes / max(plan.elements, 1),
        "tensors": tensors,
        "forecast": None if forecast is None else {"kl": forecast, "measured": _measured(outcome)},
        "evaluation": None if isinstance(outcome, str) else report.as_json(outcome),
        "not_evaluated": outcome if isinstance(outcome, str) else None,
        "files": dict(sorted(files.items())),
    }
    return (json.dumps(_rounded(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _measured(outcome: Evaluation | str) -> float | None:
    return outcome.all.kl_mean.value if isinstance(outcome, Evaluation) and outcome.all.kl_mean else None


def hashes_of(source: Source, origin: Origin) -> dict[str, str]:
    """SHA-256 of the source's weight files: as the Hub states them, or of the files that are here."""
    here = [shard.path for shard in source.shards if shard.path.stat().st_size == shard.size]  # not headers alone
    return dict(origin.files) or receipts.sha256(here)


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
    return value
