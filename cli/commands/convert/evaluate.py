"""``mlxarch eval``: perplexity of a model, and KL divergence from its original."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr, print_table
from mlxarch.progress import terminal_progress

if TYPE_CHECKING:
    from mlxarch.quantize.evaluation.eval_model import EvalModel
    from mlxarch.quantize.evaluation.evaluate import Evaluation

DEFAULT_CONTEXT = 512  # tokens


@dataclass(frozen=True)
class EvalOptions:
    """Arguments and options of the command, as click parses them."""

    models: tuple[str, ...]
    against: str | None
    text_files: tuple[Path, ...]
    tokens: int
    context: int | None
    batch: int
    seed: int
    max_kl: float | None
    plot: Path | None
    as_json: bool
    yes: bool


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--against",
    metavar="ORIGINAL",
    help="Original model to compare with (default: none, perplexity only)",
)
@click.option(
    "--text",
    "text_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text to evaluate on; repeatable (default: bundled texts)",
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=1024,
    help="Maximum tokens per text (default: 1024)",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Context window in tokens (default: 512, or fewer if a model has fewer)",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=8,
    help="Number of contexts computed at once (default: 8)",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Random seed of the KL estimate (default: 0)",
)
@click.option(
    "--max-kl",
    type=float,
    metavar="X",
    help="Mean KL divergence above which the exit code is 1 (default: none)",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Plot to write, as .svg or .png (default: none)",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each MODEL.")
@options.threads_option
@options.yes_option
def eval_command(**given: Any) -> None:
    """Measure perplexity, and KL divergence from the original.

    With --against, KL(ORIGINAL || MODEL) is computed for each token. The bundled texts are prose,
    code, a chat and German. Only one layer of one model is in memory at a time, and the predictions
    of ORIGINAL are kept for the next MODEL.
    """
    given_options = EvalOptions(**given)
    _check_options(given_options)
    from mlxarch.system.backend import require_backend

    require_backend()
    from mlxarch.quantize.evaluation import plots

    if given_options.plot is not None:
        plots.check_plot_file(given_options.plot)
    _evaluate_models(given_options)


def _check_options(given: EvalOptions) -> None:
    """Raise click.UsageError for options that need --against, or a --max-kl out of range."""
    if given.against is None and (given.max_kl is not None or given.plot is not None):
        option = "--max-kl" if given.max_kl is not None else "--plot"
        raise click.UsageError(f"{option} needs --against ORIGINAL")
    if given.max_kl is not None and not given.max_kl >= 0:
        raise click.UsageError(f"--max-kl is a number from 0 on; found {given.max_kl:g}")


def _evaluate_models(given: EvalOptions) -> None:
    """Evaluate, print and plot; exits with code 1 if a model's mean KL is above --max-kl."""
    from mlxarch.quantize.calibration.texts import read_texts
    from mlxarch.quantize.evaluation import report
    from mlxarch.quantize.evaluation.eval_model import EvalModel
    from mlxarch.quantize.evaluation.evaluate import EvaluationSettings, evaluate

    texts = read_texts(given.text_files) if given.text_files else None
    original = None if given.against is None else _obtain_original(given.against, given.yes)
    reference = None if original is None else EvalModel.from_folder(original)
    results = []
    folders = []
    for name in given.models:
        folder = options.obtain_model(name, None, given.yes)
        subject = EvalModel.from_folder(folder)
        context = given.context or _default_context(subject, reference)
        settings = EvaluationSettings(tokens=given.tokens, context=context, seed=given.seed)
        with terminal_progress(None) as progress:
            result = evaluate(
                subject,
                reference,
                texts=texts,
                settings=settings,
                batch=given.batch,
                progress=progress,
            )
        if given.as_json:
            print_json(report.evaluation_to_json(result))
        else:
            if results:
                print_line()
            _print_result(result)
        folders.append(folder)
        results.append(result)
    if len(results) > 1 and not given.as_json:
        print_line("\nThe best first:")
        print_table(report.ranking_table(results))
    if given.plot is not None and original is not None:
        _draw_plot(given.plot, results, folders, original)
    if given.max_kl is not None:
        _check_max_kl(results, given.max_kl)


def _default_context(model: "EvalModel", original: "EvalModel | None") -> int:
    """Return the context window that both models have, and name one that has less than usual."""
    shortest = min((each for each in (model, original) if each), key=lambda m: m.context_length)
    if shortest.context_length < DEFAULT_CONTEXT:
        print_stderr(
            f"{shortest.name} has a context of {shortest.context_length} tokens, so texts are read "
            f"in windows of {shortest.context_length} instead of {DEFAULT_CONTEXT}"
        )
    return min(DEFAULT_CONTEXT, shortest.context_length)


def _print_result(result: "Evaluation") -> None:
    from mlxarch.quantize.evaluation import report

    against = f" against {result.against}" if result.against else ""
    print_line(f"{result.model}{against}")
    print_table(report.metrics_table(result))
    for sentence in report.describe_evaluation(result):
        print_line(sentence)
    if worst := report.worst_tokens_table(result):
        print_line(
            "\nThe tokens that changed most: KL, where, expected by the original -> by the model"
        )
        print_table(worst)


def _draw_plot(
    plot: Path, results: "list[Evaluation]", folders: list[Path], original: Path
) -> None:
    from mlxarch.quantize.evaluation import plots
    from mlxarch.quantize.evaluation.eval_model import EvalModel

    errors = []
    with terminal_progress(None) as progress:
        reference = EvalModel.from_folder(original)
        models = [EvalModel.from_folder(folder) for folder in folders]
        for model in models:
            errors.append((model.name, plots.relative_weight_errors(model, reference, progress)))
    plots.draw_plots(plot, results, [(name, found) for name, found in errors if found])
    print_stderr(f"{plot}: drawn")


def _check_max_kl(results: "list[Evaluation]", max_kl: float) -> None:
    """Print the results whose mean KL is above the limit, and exit with code 1 if there are any."""
    above = False
    for result in results:
        mean = result.all.kl_mean
        if mean and not mean.value <= max_kl:
            print_stderr(f"{result.model}: mean KL {mean.value:.4g} is above {max_kl:g}")
            above = True
    if above:
        raise click.exceptions.Exit(1)


def _obtain_original(name: str, yes: bool) -> Path:
    """Obtain a model as published, unless the name asks for bits."""
    from mlxarch.store.names import resolve_name

    return options.obtain_model(name, None if resolve_name(name).bits else "original", yes)
