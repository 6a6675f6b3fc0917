"""``mlxarch eval``: how good a model is, and how much of its original it lost."""

from pathlib import Path

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, table


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--against", metavar="ORIGINAL", help="The model that it was made from; without it, perplexity only.")
@click.option(
    "--text", "files", multiple=True, type=click.Path(path_type=Path), help="Instead of the texts here. Repeatable."
)
@click.option("--tokens", type=click.IntRange(2), default=1024, show_default=True, help="At most, of each text.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens read together.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Contexts computed at once.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws that are compared.")
@click.option("--max-kl", type=float, metavar="X", help="Exit with status 1 if the mean KL of a MODEL is above X.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the results: FILE.svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each MODEL.")
@options.yes_option
def eval_command(
    models: tuple[str, ...],
    against: str | None,
    files: tuple[Path, ...],
    tokens: int,
    context: int,
    batch: int,
    seed: int,
    max_kl: float | None,
    plot: Path | None,
    as_json: bool,
    yes: bool,
) -> None:
    """Measure perplexity, and how far a model is from its original.

    With --against, the divergence KL(ORIGINAL || MODEL) over texts that come with mlxarch: prose, code, a chat and
    another language. A layer of one model is in memory at a time. What the original said is kept for the next MODEL.
    """
    if against is None and (max_kl is not None or plot is not None):
        raise click.UsageError(f"{'--max-kl' if max_kl is not None else '--plot'} needs --against ORIGINAL")
    if max_kl is not None and not max_kl >= 0:
        raise click.UsageError(f"--max-kl is a number from 0 on; found {max_kl:g}")
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch.progress import on_terminal
    from mlxarch.quantize import plots, report
    from mlxarch.quantize.corpus import read_texts
    from mlxarch.quantize.evaluation import Settings, evaluate
    from mlxarch.quantize.subject import Subject

    if plot is not None:
        plots.check(plot)
    texts = read_texts(files) if files else None
    settings = Settings(tokens=tokens, context=context, seed=seed)
    original = None if against is None else _original(against, yes)
    results, folders = [], []
    for number, name in enumerate(models):
        folder = options.obtain(name, None, yes)
        folders.append(folder)
        with on_terminal(None) as progress:
            result = evaluate(folder, original, texts=texts, settings=settings, batch=batch, progress=progress)
        results.append(result)
        if as_json:
            answer_json(report.as_json(result))
            continue
        answer(("\n" if number else "") + result.model + (f" against {result.against}" if result.against else ""))
        table(report.rows(result))
        for sentence in report.sentences(result):
            answer(sentence)
        if worst := report.worst(result):
            answer("\nThe tokens that changed most: KL, where, expected by the original -> by the model")
            table(worst)
    if plot is not None and original is not None:
        with on_terminal(None) as progress:
            source = Subject.from_folder(original)
            subjects = [Subject.from_folder(folder) for folder in folders]
            lost = [(subject.name, plots.losses(subject, source, progress)) for subject in subjects]
        plots.draw(plot, results, [(name, errors) for name, errors in lost if errors])
        say(f"{plot}: drawn")
    above = [r for r in results if max_kl is not None and r.all.kl_mean and not r.all.kl_mean.value <= max_kl]
    for result in above:
        say(f"{result.model}: mean KL {result.all.kl_mean.value:.4g} is above {max_kl:g}")
    if above:
        raise click.exceptions.Exit(1)


def _original(name: str, yes: bool) -> Path:
    """As it was published, unless the name says bits."""
    from mlxarch import catalog

    return options.obtain(name, None if catalog.parse(name).bits else "original", yes)
