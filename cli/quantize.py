"""``mlxarch quantize``: a checkpoint in, a smaller one out."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxarch import receipts
from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, size
from mlxarch.cli.receipts import lines
from mlxarch.errors import QuantizationError

if TYPE_CHECKING:
    from mlxarch.quantize import Summary
    from mlxarch.quantize.budget import Target
    from mlxarch.quantize.mixture import Recipe
    from mlxarch.weights import Source

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
METHODS = ("search", "gptq", "round")


@click.command("quantize")
@click.argument("source")
@click.option("--bits", "--q-bits", type=click.Choice(options.BITS), help="4 unless the mode has others.")
@click.option(
    "--group-size", "--q-group-size", type=int, help="Weights that share a scale: 32, 64 or 128; 64, with a target 128."
)
@click.option("--mode", "--q-mode", type=click.Choice(MODES), default="affine", show_default=True)
@click.option("--method", type=click.Choice(METHODS), help="How scales are chosen; search, in mode affine.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="A text that tells which weights matter; else what the model writes, for gptq also a text that comes along.",
)
@click.option("--target-size", metavar="SIZE", help="Choose bits for each matrix: of the whole folder, as 14GB.")
@click.option("--target-bits", type=float, metavar="X", help="The same for bits per weight, scales included.")
@click.option("--target-kl", type=float, metavar="X", help="The same for a KL from the source, nats per token.")
@click.option(
    "--recipe",
    metavar="[NAME]",
    is_flag=False,
    flag_value="auto",
    help="Bits by the names of matrices: one that comes along, a TOML file, or none for what suits the model.",
)
@click.option("--text", "files", multiple=True, help="To foretell and measure by, instead of texts here. Repeatable.")
@click.option("--dtype", type=click.Choice(options.DTYPES), help="Of what is not quantized; else as in the source.")
@click.option("-o", "--output", "--mlx-path", metavar="DIR", help="The folder to make; else ./NAME-BITSbit.")
@click.option(
    "--experts",
    type=click.Choice(("stacked", "packed")),
    default="stacked",
    show_default=True,
    help="Packed: to be read one at a time.",
)
@click.option("--force", is_flag=True, help="Replace an output that exists, once the new one is complete.")
@click.option("--no-eval", is_flag=True, help="Do not measure the result against the source in the end.")
@options.yes_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize_command(
    source: str,
    bits: str | None,
    group_size: int | None,
    mode: str,
    method: str | None,
    calibration: str | None,
    target_size: str | None,
    target_bits: float | None,
    target_kl: float | None,
    recipe: str | None,
    files: tuple[str, ...],
    dtype: str | None,
    output: str | None,
    experts: str,
    force: bool,
    no_eval: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as a folder of MLX weights, quantized.

    SOURCE is a folder, a GGUF file, a repository or a short name. The memory it takes does not depend on the model's
    size; a run that was interrupted goes on when the same command is given again. --bits original only copies, and with
    --dtype casts. With a target or a recipe, matrices that matter more get more bits. In the end both are compared on a
    few texts, and receipt.json and the model card tell the result.
    """
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch.progress import on_terminal
    from mlxarch.quantize import Recipe, prepare
    from mlxarch.quantize.budget import GROUP_SIZE
    from mlxarch.quantize.corpus import read_texts
    from mlxarch.quantize.formats import default_bits, settings
    from mlxarch.quantize.journal import Workspace
    from mlxarch.quantize.methods import checked
    from mlxarch.quantize.mixture import by_recipe, toward
    from mlxarch.quantize.staging import Staging
    from mlxarch.streaming.attach import experts_of

    wanted = options.parsed_bits(bits) or default_bits(mode)
    width = None if wanted == "original" else int(wanted)
    if width is None and (group_size is not None or mode != "affine"):
        raise click.UsageError("--bits original packs nothing; leave out --group-size and --mode")
    try:
        target, own = _mixture(target_size, target_bits, target_kl, recipe, bits)
        if (target or recipe is not None) and mode != "affine":
            raise click.UsageError("targets and recipes choose bits of mode affine; leave out --mode")
        if target and mode == "affine":
            group_size = group_size or GROUP_SIZE
        packed = None if width is None else settings(width, group_size, mode)
        chosen = checked(method, packed, calibration)
    except QuantizationError as error:
        raise click.UsageError(str(error)) from error
    label = dtype or "copy" if width is None else f"{width}bit" if mode == "affine" else mode
    label = "mixed" if recipe or target else label
    texts = read_texts(files) if files else None
    name, opened = _open(source, yes)
    output = output or f"{name}-{label}"
    staging = Staging(Path(output).expanduser().absolute()) if experts == "packed" else None
    conversion = prepare(
        opened,
        staging.model if staging else output,
        bits=width,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
        method=chosen,
        calibration=calibration,
        texts=texts,
    )
    if experts == "packed" and not experts_of(conversion.resolved):
        raise click.UsageError(f"{source} has no experts; leave out --experts packed")
    try:
        Workspace(staging.output if staging else conversion.output, conversion.disk).check_target(force)
        if recipe is not None:
            own = own or Recipe.meant_for(conversion.resolved.architecture)
            conversion = by_recipe(conversion, own, group_size)
        if target is not None:
            with on_terminal(None) as progress:
                conversion = toward(conversion, target, progress)
        needed, place = conversion.needed, conversion.output
        if staging:
            needed, place = staging.needed(conversion), staging.output
        say(f"{source}: {conversion.method}; needs {size(needed)} of disk, at {place}")
        if conversion.forecast is not None:
            say(f"expected KL {conversion.forecast:.3g} nats a token")
        with on_terminal(None) as progress:
            changed = width is not None or dtype is not None
            judged = changed and not no_eval
            if staging:
                summary, receipt = staging.run(conversion, force=force, evaluate=judged, progress=progress)
            else:
                summary = conversion.run(force=force, evaluate=judged, progress=progress)
                receipt = receipts.read(summary.output) or {}
    finally:
        conversion.close()
    for note in summary.notes:
        say(f"note: {note}")
    if as_json:
        answer_json(asdict(summary) | {"evaluation": receipt.get("evaluation")})
    else:
        answer(_in_words(summary))
        for label, text in lines(receipt) if judged else ():
            if label not in ("made by:", "from:", "note:", "with:"):
                answer(f"{label} {text}")


def _mixture(
    target_size: str | None, target_bits: float | None, target_kl: float | None, recipe: str | None, bits: str | None
) -> "tuple[Target | None, Recipe | None]":
    """A target or a recipe, if one was given; a recipe that depends on the model is still to be found."""
    from mlxarch.machines import parse_size
    from mlxarch.quantize.budget import Target
    from mlxarch.quantize.mixture import AUTO, Recipe

    given = {"--target-size": target_size, "--target-bits": target_bits, "--target-kl": target_kl, "--recipe": recipe}
    named = [name for name, value in {**given, "--bits": bits}.items() if value is not None]
    if len(named) > 1 and named != ["--bits"]:
        raise click.UsageError(f"{' and '.join(named)} exclude each other: each says which bits to use")
    if recipe is not None:
        return None, None if recipe == AUTO else Recipe.read(recipe)
    size = None if target_size is None else parse_size(target_size)
    return (Target(size=size, bits=target_bits, kl=target_kl) if named and bits is None else None), None


def _open(source: str, yes: bool) -> "tuple[str, Path | Source]":
    """A name for the output, and what to read; a name or a repository is downloaded first, as it was published."""
    from mlxarch import catalog

    reference = catalog.parse(source)
    if reference.path is None:
        return reference.name.rsplit("/", 1)[-1].replace("@", "-"), options.obtain(source, "original", yes)
    if reference.path.suffix == ".gguf" and reference.path.is_file():
        from mlxarch.quantize.gguf import open_gguf

        return reference.path.stem, open_gguf(reference.path)
    return reference.path.resolve().name, reference.path


def _in_words(summary: "Summary") -> str:
    before, after = size(summary.source_bytes), size(summary.output_bytes)
    return (
        f"{summary.output}: {before} -> {after}, {summary.bits_per_weight:.2f} bits per weight, "
        f"{summary.quantized} of {summary.tensors} tensors quantized"
    )
