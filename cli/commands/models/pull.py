"""``mlxarch pull``: download a model, and quantize it if needed."""

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_line
from mlxarch.cli.signals import note_what_is_kept


@click.command("pull")
@click.argument("model", required=False)
@options.model_option
@options.bits_option
@click.option(
    "--method",
    type=click.Choice(("search", "round")),
    help="Quantization method below 8 bits; round takes minutes instead of hours (default: search)",
)
@click.option("--no-eval", is_flag=True, help="Skip the evaluation of a quantized model.")
@options.threads_option
@options.yes_option
def pull_command(
    model: str | None,
    model_flag: str | None,
    bits: str | None,
    method: str | None,
    no_eval: bool,
    yes: bool,
) -> None:
    """Download a model, and quantize it if needed.

    A short name means the largest of 8 and 4 bits that fits this machine, a repository the weights
    as published; --bits chooses others. Download size, duration and memory verdict are printed
    first, with a confirmation above 5 GB or a minute, or if the model does not fit; without a
    terminal, --yes is needed. An interrupted download goes on where it stopped. The folder is
    printed at the end.

    A model quantized here is evaluated against its source if the source stays on this machine;
    `mlxarch show` prints the result.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    name = options.resolve_model_name(model_flag, model)
    with note_what_is_kept():
        folder = options.obtain_model(
            name, bits, yes, refresh=True, evaluate=not no_eval, method=method
        )
    print_line(str(folder))
