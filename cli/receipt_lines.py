"""Text form of a receipt, as ``show`` and ``quantize`` print it."""

from typing import Any

from mlxarch.checkpoint.receipt import format_forecast

WORST_TENSORS = 3  # tensors with the largest error that are listed

_METRICS = (  # field of the evaluation, label, unit
    ("kl_mean", "KL", " nats a token"),
    ("top1_agreement", "same top token", ""),
    ("perplexity_ratio", "perplexity", " times the source's"),
)


def receipt_lines(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    """Describe a receipt as pairs of label and text.

    Every field may be missing, since other releases write other fields.
    """
    lines = [("made by:", str(receipt.get("method", "-")))]
    source = _dict_field(receipt, "source")
    if source:
        origin = [str(source[key]) for key in ("name", "revision") if source.get(key)]
        lines.append(("from:", " at ".join(origin)))
    lines += [("note:", str(note)) for note in receipt.get("notes") or []]
    forecast = _dict_field(receipt, "forecast")
    expected = forecast.get("kl")
    measured = forecast.get("measured")
    if isinstance(expected, float | int) and isinstance(measured, float | int):
        lines.append(("forecast:", format_forecast(expected, measured)))
    evaluation = _dict_field(receipt, "evaluation")
    if evaluation:
        lines += _metric_lines(_dict_field(evaluation, "all"))
    elif receipt.get("not_evaluated"):
        lines.append(("not evaluated:", str(receipt["not_evaluated"])))
    if worst := _worst_tensors(_dict_field(receipt, "tensors")):
        lines.append(("most lost in:", worst))
    versions = _dict_field(receipt, "versions")
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines.append(("with:", packages or "-"))
    return lines


def _metric_lines(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for field, label, unit in _METRICS:
        metric = _dict_field(metrics, field)
        value = metric.get("value")
        error = metric.get("error")
        if isinstance(value, float | int):
            spread = f" ±{error:.2g}" if isinstance(error, float | int) else ""
            lines.append((f"{label}:", f"{value:.4g}{spread}{unit}"))
    return lines


def _worst_tensors(tensors: dict[str, Any]) -> str:
    errors = [
        (fields["error"], path)
        for path, fields in tensors.items()
        if isinstance(fields, dict) and isinstance(fields.get("error"), float)
    ]
    worst = sorted(errors, reverse=True)[:WORST_TENSORS]
    return ", ".join(f"{path.removesuffix('.weight')} {error:.2%}" for error, path in worst)


def _dict_field(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    return value if isinstance(value, dict) else {}
