"""``mlxarch tune``: sizes of the memory for streamed experts, tried."""

from dataclasses import asdict
from typing import Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, size


@click.command("tune")
@click.argument("model", required=False)
@options.model_option
@options.bits_option
@options.memory_options
@click.option(*options.CONTEXT, type=options.Tokens(), metavar="TOKENS", help="To plan for; else what fits.")
@click.option(
    "-n", "--tokens", type=click.IntRange(8), default=64, show_default=True, help="To generate in each trial."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune_command(
    model: str | None, named: str | None, bits: str | None, tokens: int, as_json: bool, **given: Any
) -> None:
    """Find out how much memory streamed experts should have on this machine.

    More is not always faster, for the system's own cache of the files has what is left. A few sizes are tried, and the
    best is what later plans for this model give its experts at most.
    """
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch.tuning import tune

    request = options.asked(**given)
    folder = options.obtain(options.the_model(named, model), bits, False)
    trials = []
    for trial in tune(folder, request, tokens):
        trials.append(trial)
        read = f"{trial.hit_rate:.0%} of experts in memory, {size(round(trial.read))} read a token"
        say(f"{size(trial.bank)} for experts: {trial.rate:.2f} tokens a second, {read}")
    best = max(trials, key=lambda trial: trial.rate)
    if as_json:
        answer_json({"best": asdict(best), "trials": [asdict(trial) for trial in trials]})
    else:
        answer(f"{size(best.bank)} for experts is remembered as the best for {folder.name}")
