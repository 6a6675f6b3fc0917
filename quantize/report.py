"""An evaluation in the forms in which it leaves: JSON, and rows of a table."""

from dataclasses import asdict
from typing import Any

from mlxarch.quantize.evaluation import Evaluation
from mlxarch.quantize.figures import Figure, Table
from mlxarch.receipts import compared

FIGURES = {
    "perplexity": "perplexity",
    "original_perplexity": "of the original",
    "perplexity_ratio": "ratio",
    "kl_mean": "KL mean",
    "kl_median": "KL median",
    "kl_p99": "KL 99 %",
    "kl_max": "KL largest",
    "top1_agreement": "same top token",
}


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """As docs/evaluation.md describes it."""
    return asdict(evaluation)


def rows(evaluation: Evaluation) -> list[list[str]]:
    """A row for each figure, a column for all texts and for each; the first row is the head."""
    tables = {"all": evaluation.all, **evaluation.domains} if len(evaluation.domains) > 1 else evaluation.domains
    lines = [["", *tables], ["tokens", *(str(table.tokens) for table in tables.values())]]
    for field, label in FIGURES.items():
        if getattr(evaluation.all, field) is not None:
            lines.append([label, *(in_words(getattr(table, field), field) for table in tables.values())])
    return lines


def markdown(evaluation: Evaluation, forecast: float | None = None) -> str:
    """The table and the sentences, for a model card; ``forecast`` is the mean divergence that was expected."""
    head, *body = rows(evaluation)
    lines = [head, ["---"] * len(head), *body]
    texts = ", ".join(f"{name} {digest[:12]}…" for name, digest in evaluation.texts.items())
    remarks = [f"{sentence}." for sentence in sentences(evaluation)]
    if forecast is not None and evaluation.all.kl_mean is not None:
        remarks.append(f"Forecast of the mean KL: {compared(forecast, evaluation.all.kl_mean.value)}.")
    return "\n".join(
        [*(f"| {' | '.join(line)} |" for line in lines), "", *remarks, f"Texts, by their SHA-256: {texts}."]
    )


def in_words(figure: Figure, field: str) -> str:
    """A value and its standard error, in as many digits as that leaves."""
    value, error = figure.value, figure.error
    if field == "top1_agreement":
        return f"{value:.1%}" + (f" ±{error:.1%}" if error is not None else "")
    digits = 4 if field.startswith("kl") or field.endswith("ratio") else 2
    if field.startswith("kl") and 0 < abs(value) < 0.001:
        return f"{value:.1e}" + (f" ±{error:.0e}" if error is not None else "")
    return f"{value:.{digits}f}" + (f" ±{error:.{digits}f}" if error is not None else "")


def sentences(evaluation: Evaluation) -> list[str]:
    """What belongs to the table: size, and how it was measured."""
    size, settings = evaluation.size, evaluation.settings
    packed = size.quantized_bits_per_weight
    found = [
        f"{size.bytes / 1e6:.1f} MB, {size.bits_per_weight:.2f} bits per weight"
        + (f", {packed:.2f} in the quantized matrices" if packed else ", nothing quantized")
        + (f"; the original {evaluation.original_size.bytes / 1e6:.1f} MB" if evaluation.original_size else "")
    ]
    how = f"At most {settings.tokens} tokens of each text, {settings.context} at a time"
    if evaluation.against is not None:
        how += f"; KL(original ‖ model) in nats per token, {precision(evaluation.all, settings.kept)}"
    return [*found, how]


def precision(table: Table, kept: int) -> str:
    """How far the mean divergence may be off because the original was not kept whole."""
    if not table.kl_bound:
        return "its mean exact"
    assert table.kl_mean is not None
    share = f" ({table.kl_bound / table.kl_mean.value:.2%})" if table.kl_mean.value > 0 else ""
    return f"its mean off by at most {table.kl_bound:.1e}{share}, {kept} tokens of each distribution kept"


def worst(evaluation: Evaluation) -> list[list[str]]:
    """A row for each of the worst tokens, as far as anything became of them at all."""
    lines = []
    for place in (place for place in evaluation.worst if place.kl > 0):
        text = f"{place.before[-30:]}[{place.token}]{place.after[:12]}".replace("\n", "⏎")
        where = f"{place.text} {place.position}"
        lines.append(
            [
                f"{place.kl:.3f}" if place.kl >= 0.001 else f"{place.kl:.1e}",
                where,
                text,
                f"{place.original_expected!r} -> {place.expected!r}",
            ]
        )
    return lines
