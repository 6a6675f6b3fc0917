"""``mlxarch tune``: measure memory sizes for streamed experts."""

from typing import Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr
from mlxarch.progress import format_size


@click.command("tune")
@click.argument("model", required=False)
@options.model_option
@options.bits_option
@options.threads_option
@options.memory_options
@click.option(
    *options.CONTEXT_FLAGS,
    type=options.TokenCount(),
    metavar="TOKENS",
    help="Context window to plan for, e.g. 32k (default: as large as fits)",
)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(8),
    default=64,
    help="Number of tokens to generate per trial (default: 64)",
)
@options.yes_option
@options.json_option
def tune_command(
    model: str | None,
    model_flag: str | None,
    bits: str | None,
    tokens: int,
    yes: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the best memory size for streamed experts on this machine.

    More is not always faster, because the file cache of the system uses the rest of the memory. A
    few sizes are measured, and the fastest becomes the upper limit in later plans for this model.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    from mlxarch.hub.hub_cache import model_title
    from mlxarch.store.tune import tune

    request = options.make_request(**given)
    folder = options.obtain_model(options.resolve_model_name(model_flag, model), bits, yes)
    trials = []
    for trial in tune(folder, request, tokens):
        trials.append(trial)
        print_stderr(
            f"{format_size(trial.expert_cache_bytes)} for experts: "
            f"{trial.tokens_per_second:.2f} tokens a second, "
            f"{trial.hit_rate:.0%} of experts in memory, "
            f"{format_size(round(trial.bytes_read_per_token))} read a token"
        )
    best = max(trials, key=lambda trial: trial.tokens_per_second)
    if as_json:
        print_json({"best": best.to_json(), "trials": [trial.to_json() for trial in trials]})
    else:
        size = format_size(best.expert_cache_bytes)
        print_line(f"{size} for experts is remembered as the best for {model_title(folder)}")
