"""``mlxarch pull``: download a model, and quantize it if needed."""

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_line


@click.command("pull")
@click.argument("model", required=False)
@options.model_option
@options.bits_option
@click.option("--no-eval", is_flag=True, help="Skip the evaluation of a quantized model.")
@options.yes_option
def pull_command(
    model: str | None, model_flag: str | None, bits: str | None, no_eval: bool, yes: bool
) -> None:
    """Download a model, and quantize it if needed.

    A short name means the largest of 8 and 4 bits that fits this machine, a repository the weights
    as published; --bits chooses others. Download size and memory verdict are printed first, with a
    confirmation above 5 GB or if the model does not fit. The folder is printed at the end.

    A model quantized here is evaluated against its source if the source stays on this machine;
    `mlxarch show` prints the result.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    name = options.resolve_model_name(model_flag, model)
    folder = options.obtain_model(name, bits, yes, refresh=True, evaluate=not no_eval)
    print_line(str(folder))
