"""``mlxarch quantize``: write a quantized copy of a checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxarch.checkpoint.receipt import read_receipt
from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr
from mlxarch.cli.receipt_lines import receipt_lines
from mlxarch.cli.signals import note_what_is_kept
from mlxarch.errors import QuantizationError
from mlxarch.progress import format_size, terminal_progress
from mlxarch.quantization import formats
from mlxarch.system.dtypes import COMPUTE_DTYPES

if TYPE_CHECKING:
    from mlxarch.checkpoint.source import CheckpointSource
    from mlxarch.quantize import Summary
    from mlxarch.quantize.conversion import Conversion
    from mlxarch.quantize.mixed_precision.bit_allocation import Target
    from mlxarch.quantize.mixed_precision.recipes import Recipe
    from mlxarch.quantize.schedule import Method
    from mlxarch.quantize.staging import Staging

METHODS = ("search", "gptq", "round")
EXPERT_LAYOUTS = ("stacked", "packed")


@dataclass(frozen=True)
class QuantizeOptions:
    """Arguments and options of the command, as click parses them."""

    source: str
    bits: str | None
    group_size: int | None
    mode: str
    method: str | None
    calibration: str | None
    target_size: str | None
    target_bits: float | None
    target_kl: float | None
    recipe: str | None
    text_files: tuple[str, ...]
    dtype: str | None
    output: str | None
    experts: str
    force: bool
    no_eval: bool
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class QuantizationChoice:
    """Validated choice of the quantization, made before the source is opened.

    Attributes:
        bits: weight bits; None to copy without quantization.
        group_size: weights per scale; None for the default of the mode.
        method: name of the quantization method.
        target: target of mixed precision, or None.
        recipe: recipe of mixed precision; None without one, or if it depends on the model.
        label: suffix of the default output folder.
    """

    bits: int | None
    group_size: int | None
    method: "Method"
    target: "Target | None"
    recipe: "Recipe | None"
    label: str


@click.command("quantize")
@click.argument("source")
@click.option(
    "--bits",
    "--q-bits",
    type=click.Choice(options.BITS_CHOICES),
    help="Weight bits; original for a copy (default: 4, or 8 in mode mxfp8)",
)
@click.option(
    "--group-size",
    "--q-group-size",
    type=int,
    help="Number of weights that share a scale (default: the mode's; 128 with a target)",
)
@click.option(
    "--mode",
    "--q-mode",
    type=click.Choice((*formats.MODES,)),
    default="affine",
    help="Quantization mode (default: affine)",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Quantization method (default: search in mode affine, else round)",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Calibration text (default: self-generated; gptq adds a bundled text)",
)
@click.option(
    "--target-size",
    metavar="SIZE",
    help="Mixed-precision target: size of the output folder, e.g. 14GB (default: none)",
)
@click.option(
    "--target-bits",
    type=float,
    metavar="X",
    help="Mixed-precision target: bits per weight, scales included (default: none)",
)
@click.option(
    "--target-kl",
    type=float,
    metavar="X",
    help="Mixed-precision target: KL divergence from the source, in nats per token (default: none)",
)
@click.option(
    "--recipe",
    metavar="[NAME]",
    is_flag=False,
    flag_value="auto",
    help="Mixed-precision recipe: a bundled name, a TOML file, or no NAME for the one that suits "
    "the model (default: none)",
)
@click.option(
    "--text",
    "text_files",
    multiple=True,
    metavar="FILE",
    help="Text for forecast and evaluation; repeatable (default: bundled texts)",
)
@click.option(
    "--dtype",
    type=click.Choice(COMPUTE_DTYPES),
    help="Dtype of scales and unquantized tensors (default: as in the source)",
)
@click.option(
    "-o",
    "--output",
    "--mlx-path",
    metavar="DIR",
    help="Output folder (default: ./NAME-BITSbit)",
)
@click.option(
    "--experts",
    type=click.Choice(EXPERT_LAYOUTS),
    default="stacked",
    help="Layout of experts; packed for SSD offload (default: stacked)",
)
@options.force_option
@click.option("--no-eval", is_flag=True, help="Skip the evaluation against the source.")
@options.threads_option
@options.yes_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize_command(**given: Any) -> None:
    """Quantize a checkpoint to a folder of MLX weights.

    SOURCE is a folder, a GGUF file, a repository or a short name. The memory needed does not depend
    on the size of the model. An interrupted run continues when the same command is given again.

    --bits original only copies, and casts with --dtype. A target or a recipe assigns more bits to
    matrices that affect the output more. The result is evaluated against the source; receipt.json
    and the model card record the outcome.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    given_options = QuantizeOptions(**given)
    choice = _choose_quantization(given_options)
    with note_what_is_kept():
        summary, receipt = _quantize(given_options, choice)
    for note in summary.notes:
        print_stderr(f"note: {note}")
    if given_options.as_json:
        print_json(asdict(summary) | {"evaluation": receipt.get("evaluation")})
        return
    print_line(_describe_summary(summary))
    if _evaluates(given_options, choice):
        for label, text in receipt_lines(receipt):
            if label not in ("made by:", "from:", "note:", "with:"):
                print_line(f"{label} {text}")


def _choose_quantization(given: QuantizeOptions) -> QuantizationChoice:
    """Validate the options that select the quantization.

    Raises:
        click.UsageError: options contradict each other, or a value is out of range.
    """
    from mlxarch.quantization.scheme import check_quantization, default_bits
    from mlxarch.quantize.mixed_precision.bit_allocation import DEFAULT_GROUP_SIZE
    from mlxarch.quantize.schedule import check_method

    named_bits = options.parse_bits(given.bits) or default_bits(given.mode)
    bits = None if named_bits == "original" else int(named_bits)
    group_size = given.group_size
    affine = given.mode == "affine"
    if bits is None and (group_size is not None or not affine):
        raise click.UsageError(
            "--bits original quantizes nothing; leave out --group-size and --mode"
        )
    try:
        target, recipe = _choose_mixed_precision(given)
        if (target or given.recipe is not None) and not affine:
            raise click.UsageError(
                "targets and recipes choose bits of mode affine; leave out --mode"
            )
        if target:
            group_size = group_size or DEFAULT_GROUP_SIZE
        scheme = None if bits is None else check_quantization(bits, group_size, given.mode)
        method = check_method(given.method, scheme, given.calibration)
    except QuantizationError as error:
        raise click.UsageError(str(error)) from error
    if given.recipe or target:
        label = "mixed"
    elif bits is None:
        label = given.dtype or "copy"
    else:
        label = f"{bits}bit" if affine else given.mode
    return QuantizationChoice(bits, group_size, method, target, recipe, label)


def _choose_mixed_precision(given: QuantizeOptions) -> "tuple[Target | None, Recipe | None]":
    """Return the target or the recipe of the options; a recipe "auto" is found once opened.

    Raises:
        click.UsageError: more than one of them, or one beside --bits.
    """
    from mlxarch.quantize.mixed_precision.bit_allocation import Target
    from mlxarch.quantize.mixed_precision.recipes import AUTO, Recipe
    from mlxarch.system.machines import parse_size

    values = {
        "--target-size": given.target_size,
        "--target-bits": given.target_bits,
        "--target-kl": given.target_kl,
        "--recipe": given.recipe,
        "--bits": given.bits,
    }
    named = [name for name, value in values.items() if value is not None]
    if len(named) > 1:
        raise click.UsageError(
            f"{' and '.join(named)} exclude each other: each says which bits to use"
        )
    if given.recipe is not None:
        return None, None if given.recipe == AUTO else Recipe.read(given.recipe)
    size = None if given.target_size is None else parse_size(given.target_size)
    if not named or given.bits is not None:
        return None, None
    return Target(size=size, bits=given.target_bits, kl=given.target_kl), None


def _quantize(
    given: QuantizeOptions, choice: QuantizationChoice
) -> "tuple[Summary, dict[str, Any]]":
    """Open the source, quantize it, and return the summary and the receipt."""
    from mlxarch.quantize import prepare
    from mlxarch.quantize.calibration.texts import read_texts
    from mlxarch.quantize.staging import Staging
    from mlxarch.ssd_streaming.attach import experts_of

    texts = read_texts(given.text_files) if given.text_files else None
    name, source = _open_source(given.source, given.yes)
    output = given.output or f"{name}-{choice.label}"
    packs_experts = given.experts == "packed"
    staging = Staging(Path(output).expanduser().absolute()) if packs_experts else None
    conversion = prepare(
        source,
        staging.model if staging else output,
        bits=choice.bits,
        group_size=choice.group_size,
        mode=given.mode,
        dtype=given.dtype,
        method=choice.method,
        calibration=given.calibration,
        texts=texts,
    )
    if packs_experts and not experts_of(conversion.resolved.model):
        raise click.UsageError(f"{given.source} has no experts; leave out --experts packed")
    evaluate = _evaluates(given, choice)
    try:
        conversion = _allocate_bits(given, choice, conversion, staging)
        _print_plan(given.source, conversion, staging)
        with terminal_progress(None) as progress:
            if staging:
                return staging.run(
                    conversion, force=given.force, evaluate=evaluate, progress=progress
                )
            summary = conversion.run(force=given.force, evaluate=evaluate, progress=progress)
            return summary, read_receipt(summary.output) or {}
    finally:
        conversion.close()


def _allocate_bits(
    given: QuantizeOptions,
    choice: QuantizationChoice,
    conversion: "Conversion",
    staging: "Staging | None",
) -> "Conversion":
    """Apply the recipe or the target, once the output folder is known to be free."""
    from mlxarch.quantize import Recipe
    from mlxarch.quantize.mixed_precision.recipes import by_recipe
    from mlxarch.quantize.mixed_precision.targets import toward
    from mlxarch.quantize.output.workspace import Workspace

    output = staging.output if staging else conversion.output
    Workspace(output, conversion.disk).check_target(given.force)
    if given.recipe is not None:
        recipe = choice.recipe or Recipe.for_architecture(conversion.resolved.architecture)
        conversion = by_recipe(conversion, recipe, choice.group_size)
    if choice.target is not None:
        with terminal_progress(None) as progress:
            conversion = toward(conversion, choice.target, progress)
    return conversion


def _print_plan(source: str, conversion: "Conversion", staging: "Staging | None") -> None:
    needed = staging.disk_bytes(conversion) if staging else conversion.disk_bytes
    output = staging.output if staging else conversion.output
    print_stderr(
        f"{source}: {conversion.description}; needs {format_size(needed)} of disk, at {output}"
    )
    if conversion.expected_kl is not None:
        print_stderr(f"expected KL {conversion.expected_kl:.3g} nats a token")


def _evaluates(given: QuantizeOptions, choice: QuantizationChoice) -> bool:
    """Return whether the result is evaluated: never a plain copy."""
    changes = choice.bits is not None or given.dtype is not None
    return changes and not given.no_eval


def _open_source(source: str, yes: bool) -> "tuple[str, Path | CheckpointSource]":
    """Return a name for the output and the checkpoint, downloaded as published if necessary."""
    from mlxarch.store.names import resolve_name

    reference = resolve_name(source)
    if reference.path is None:
        name = reference.name.rsplit("/", 1)[-1].replace("@", "-")
        return name, options.obtain_model(source, None if reference.bits else "original", yes)
    if reference.path.suffix.lower() == ".gguf" and reference.path.is_file():
        from mlxarch.checkpoint.gguf.source import open_gguf

        return reference.path.stem, open_gguf(reference.path)
    return reference.path.resolve().name, reference.path


def _describe_summary(summary: "Summary") -> str:
    before = format_size(summary.source_bytes)
    after = format_size(summary.output_bytes)
    return (
        f"{summary.output}: {before} -> {after}, {summary.bits_per_weight:.2f} bits per weight, "
        f"{summary.quantized} of {summary.tensors} tensors quantized"
    )
