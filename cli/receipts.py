"""``mlxarch verify``, and what ``show`` and ``quantize`` print of a receipt."""

from pathlib import Path
from typing import Any

import click

from mlxarch import receipts
from mlxarch.cli.output import answer, answer_json, say
from mlxarch.errors import InvalidInput, ModelNotFound

WORST = 3  # tensors


@click.command("verify")
@click.argument("folder", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_command(folder: str, as_json: bool) -> None:
    """Check the files of a model that mlxarch made against its receipt.

    MODEL is a folder, or the name of a model on this machine. Every file that has changed, is missing or was not there
    is named, and the exit status is 1 if there is one.
    """
    place = _folder(folder)
    problems = receipts.verify(place)
    if as_json:
        answer_json({"folder": str(place), "problems": problems})
    elif not problems:
        answer(f"{place}: every file is as it was made")
    for problem in problems:
        say(f"{place}: {problem}")
    if problems:
        raise click.exceptions.Exit(1)


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from mlxarch.inventory import copies_of

    here = copies_of(name)
    if not here:
        raise ModelNotFound(f"{name} is neither a folder nor a model here; `mlxarch list --installed` shows which are")
    if len(here) > 1:
        raise InvalidInput(f"{name} may be {' or '.join(model.name for model in here)}; name one of them")
    return here[0].path


def lines(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    """What a receipt says, as pairs of a label and a text; a receipt of another release may lack any of it."""
    source, found = _fields(receipt, "source"), [("made by:", str(receipt.get("method", "-")))]
    if source:
        found.append(("from:", " at ".join(str(source[key]) for key in ("name", "revision") if source.get(key))))
    found += [("note:", str(note)) for note in receipt.get("notes") or []]
    evaluation, forecast = _fields(receipt, "evaluation"), _fields(receipt, "forecast")
    expected, measured = forecast.get("kl"), forecast.get("measured")
    if isinstance(expected, float | int) and isinstance(measured, float | int):
        found.append(("forecast:", receipts.compared(expected, measured)))
    if evaluation:
        found += _measured(_fields(evaluation, "all"))
    elif receipt.get("not_evaluated"):
        found.append(("not evaluated:", str(receipt["not_evaluated"])))
    if worst := _worst(_fields(receipt, "tensors")):
        found.append(("most lost in:", worst))
    versions = _fields(receipt, "versions")
    return [*found, ("with:", ", ".join(f"{package} {version}" for package, version in versions.items()) or "-")]


def _measured(table: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for field, label in (("kl_mean", "KL"), ("top1_agreement", "same top token"), ("perplexity_ratio", "perplexity")):
        figure = _fields(table, field)
        value, error = figure.get("value"), figure.get("error")
        if isinstance(value, float | int):
            spread = f" ±{error:.2g}" if isinstance(error, float | int) else ""
            unit = {"kl_mean": " nats a token", "perplexity_ratio": " times the source's"}.get(field, "")
            found.append((f"{label}:", f"{value:.4g}{spread}{unit}"))
    return found


def _worst(tensors: dict[str, Any]) -> str:
    errors = [(facts.get("error"), path) for path, facts in tensors.items() if isinstance(facts, dict)]
    ranked = sorted(((error, path) for error, path in errors if isinstance(error, float)), reverse=True)
    return ", ".join(f"{path.removesuffix('.weight')} {error:.2%}" for error, path in ranked[:WORST])


def _fields(holder: dict[str, Any], key: str) -> dict[str, Any]:
    value = holder.get(key)
    return value if isinstance(value, dict) else {}
