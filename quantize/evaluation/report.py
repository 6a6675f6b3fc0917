"""Evaluation results for output: JSON, text tables and Markdown."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlxarch.checkpoint.receipt import format_forecast
from mlxarch.progress import format_size
from mlxarch.quantize.evaluation.evaluate import Evaluation
from mlxarch.quantize.evaluation.statistics import Estimate, Metrics

METRIC_LABELS = {
    "perplexity": "perplexity",
    "original_perplexity": "of the original",
    "perplexity_ratio": "ratio",
    "kl_mean": "KL mean",
    "kl_median": "KL median",
    "kl_p99": "KL 99 %",
    "kl_max": "KL largest",
    "top1_agreement": "same top token",
}


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Convert an evaluation to JSON values; docs/evaluation.md describes the keys."""
    return asdict(evaluation)


def metrics_table(evaluation: Evaluation) -> list[list[str]]:
    """Table of the metrics as rows of cells: a row per metric, a column per text.

    The first row is the header, the first column of numbers is for all texts together. With a
    single text, the column for all is left out.
    """
    columns = evaluation.domains
    if len(columns) > 1:
        columns = {"all": evaluation.all, **columns}
    header = ["", *columns]
    token_counts = ["tokens", *(str(metrics.tokens) for metrics in columns.values())]
    rows = [header, token_counts]
    for metric, label in METRIC_LABELS.items():
        if getattr(evaluation.all, metric) is not None:
            estimates = [getattr(metrics, metric) for metrics in columns.values()]
            rows.append([label, *(format_estimate(each, metric) for each in estimates)])
    return rows


def evaluation_to_markdown(evaluation: Evaluation, expected_kl: float | None = None) -> str:
    """Format an evaluation for a model card: the table of metrics, then how they were measured.

    Args:
        evaluation: evaluation to format.
        expected_kl: the mean KL divergence that was forecast, in nats per token; None leaves the
            comparison out.
    """
    header, *body = metrics_table(evaluation)
    lines = [header, ["---"] * len(header), *body]
    texts = ", ".join(f"{name} {digest[:12]}…" for name, digest in evaluation.texts.items())
    remarks = [f"{sentence}." for sentence in describe_evaluation(evaluation)]
    measured_kl = evaluation.all.kl_mean
    if expected_kl is not None and measured_kl is not None:
        remarks.append(
            f"Forecast of the mean KL: {format_forecast(expected_kl, measured_kl.value)}."
        )
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            *remarks,
            f"Texts, by their SHA-256: {texts}.",
        ]
    )


def format_estimate(estimate: Estimate, metric: str) -> str:
    """Format a metric's value and its standard error, such as ``0.0312 ±0.0008``.

    Args:
        estimate: estimate to format.
        metric: name of its field in ``Metrics``, which decides the number of digits.
    """
    if metric == "top1_agreement":
        number_format, error_format = ".1%", ".1%"
    elif metric.startswith("kl") and 0 < abs(estimate.value) < 0.001:
        number_format, error_format = ".1e", ".0e"
    elif metric.startswith("kl") or metric.endswith("ratio"):
        number_format, error_format = ".4f", ".4f"
    else:
        number_format, error_format = ".2f", ".2f"
    text = format(estimate.value, number_format)
    if estimate.error is not None:
        text += f" ±{format(estimate.error, error_format)}"
    return text


def describe_evaluation(evaluation: Evaluation) -> list[str]:
    """Two sentences, without full stops: the model's size, and how it was measured."""
    size = evaluation.size
    settings = evaluation.settings
    size_sentence = f"{size.bytes / 1e6:.1f} MB, {size.bits_per_weight:.2f} bits per weight"
    if size.quantized_bits_per_weight:
        size_sentence += f", {size.quantized_bits_per_weight:.2f} in the quantized matrices"
    else:
        size_sentence += ", nothing quantized"
    if evaluation.original_size:
        size_sentence += f"; the original {evaluation.original_size.bytes / 1e6:.1f} MB"
    how = f"At most {settings.tokens} tokens of each text, {settings.context} at a time"
    if evaluation.against is not None:
        precision = describe_kl_precision(evaluation.all, settings.kept)
        how += f"; KL(original ‖ model) in nats per token, {precision}"
    return [size_sentence, how]


def describe_kl_precision(metrics: Metrics, kept: int) -> str:
    """Describe the error of the mean KL that comes from keeping part of each distribution.

    Args:
        metrics: metrics of an evaluation against an original.
        kept: number of most likely tokens kept of each distribution.
    """
    if not metrics.kl_bound:
        return "its mean exact"
    assert metrics.kl_mean is not None
    mean = metrics.kl_mean.value
    relative = f" ({metrics.kl_bound / mean:.2%})" if mean > 0 else ""
    return (
        f"its mean off by at most {metrics.kl_bound:.1e}{relative}, "
        f"{kept} tokens of each distribution kept"
    )


_JUDGEMENTS = (
    (0.003, "no difference to be seen in answers"),
    (0.03, "answers differ in words, seldom in substance"),
    (0.1, "weaker at code, figures and rare languages"),
    (float("inf"), "clearly worse than the original"),
)


def judge_kl(mean: float) -> str:
    """Describe in a few words how close a mean KL divergence is in practice; see docs/evaluation.md."""
    return next(text for limit, text in _JUDGEMENTS if mean <= limit)


def ranking_table(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Rows that rank several models, the best first: by mean KL divergence, or by perplexity."""

    def figure(evaluation: Evaluation) -> Estimate:
        return evaluation.all.kl_mean or evaluation.all.perplexity

    ranked = sorted(evaluations, key=lambda evaluation: figure(evaluation).value)
    divergences = all(evaluation.all.kl_mean for evaluation in ranked)
    metric = "kl_mean" if divergences else "perplexity"
    rows = [["", "model", "weights", METRIC_LABELS[metric], *(["in practice"] * divergences)]]
    for rank, evaluation in enumerate(ranked, 1):
        estimate = figure(evaluation)
        size = format_size(evaluation.size.bytes)
        row = [f"{rank}.", evaluation.model, size, format_estimate(estimate, metric)]
        rows.append(row + [judge_kl(estimate.value)] * divergences)
    return rows


def worst_tokens_table(evaluation: Evaluation) -> list[list[str]]:
    """Table of the tokens with the largest KL divergence: KL, place, context, original -> model.

    Tokens whose KL is 0 are left out.
    """
    rows = []
    for token in evaluation.worst:
        if not token.kl > 0:
            continue
        kl = f"{token.kl:.3f}" if token.kl >= 0.001 else f"{token.kl:.1e}"
        context = f"{token.before[-30:]}[{token.token}]{token.after[:12]}".replace("\n", "⏎")
        expected = f"{token.original_expected!r} -> {token.expected!r}"
        rows.append([kl, f"{token.text} {token.position}", context, expected])
    return rows
