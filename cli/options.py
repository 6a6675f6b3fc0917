"""Options and arguments that several commands share, and the library calls behind them."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxarch.cli.confirm import make_confirm
from mlxarch.cli.output import is_terminal, print_stderr
from mlxarch.generation.thinking.switches import EFFORTS
from mlxarch.progress import terminal_progress
from mlxarch.quantization import formats
from mlxarch.system.dtypes import COMPUTE_DTYPES

if TYPE_CHECKING:
    from mlxarch.language_model import LanguageModel
    from mlxarch.planner.plan import Request


class ByteSize(click.ParamType):
    """A size in bytes with an optional unit: 16GB, 900MB, 16GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text with ``machines.parse_size``; a number passes through."""
        from mlxarch.errors import InvalidInput
        from mlxarch.system.machines import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except InvalidInput as error:
            self.fail(str(error), param, ctx)


class TokenCount(click.ParamType):
    """A positive number of tokens: 4096, 32k."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a whole number of at least 1; k stands for 1024."""
        from mlxarch.errors import InvalidInput
        from mlxarch.system.machines import parse_tokens

        try:
            return parse_tokens(str(value))
        except InvalidInput as error:
            self.fail(str(error), param, ctx)


Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
BITS_CHOICES = (*map(str, sorted(formats.BITS, reverse=True)), "original")
KV_BITS_CHOICES = ("16", *map(str, formats.KV_BITS))
PLE_CHOICES = ("auto", "ssd", "memory")
OVERFLOW_CHOICES = ("refuse", "keep-ends")

CONTEXT_FLAGS = (  # the usual names of this option in other programs
    "-c",
    "--context",
    "--ctx",
    "--ctx-size",
    "--context-length",
    "--max-context",
    "context",
)


def _combine(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Make one decorator of several, in the order in which ``--help`` lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sampling_options = _combine(
    [
        click.option(
            "--temp",
            "--temperature",
            "temperature",
            type=float,
            help="Sampling temperature; 0 for greedy (default: from the model)",
        ),
        click.option(
            "--top-k",
            type=int,
            help="Number of most likely tokens kept; 0 for all (default: from the model)",
        ),
        click.option(
            "--top-p",
            type=float,
            help="Total probability of the most likely tokens kept; 1 for all "
            "(default: from the model)",
        ),
        click.option(
            "--min-p",
            type=float,
            help="Minimum probability relative to the most likely token; 0 for none "
            "(default: from the model)",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            help="Penalty on tokens in prompt and answer; 1 for none (default: from the model)",
        ),
        click.option("--seed", type=int, help="Random seed of sampling (default: a new one)"),
    ]
)
answer_options = _combine(
    [
        click.option(
            "-s",
            "--system",
            "--system-prompt",
            "system",
            metavar="TEXT",
            help="System prompt (default: none)",
        ),
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(1),
            help="Maximum tokens to generate (default: until the answer ends)",
        ),
        click.option(
            "--overflow",
            type=click.Choice(OVERFLOW_CHOICES),
            default="refuse",
            help="Handling of prompts longer than the context window; keep-ends drops the middle "
            "(default: refuse)",
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="Stop string, not part of the answer; repeatable (default: none)",
        ),
        click.option(
            "--loop-guard/--no-loop-guard",
            default=True,
            help="Stop an answer that repeats itself without end, or not (default: stop).",
        ),
        click.option(
            "--stats", "--verbose", is_flag=True, help="Print speed and memory to standard error."
        ),
        click.option("--plain", is_flag=True, help="Print the text without rendering Markdown."),
    ]
)
thinking_options = _combine(
    [
        click.option(
            "--think/--no-think",
            "think",
            default=None,
            help="Switch thinking on or off (default: from the model).",
        ),
        click.option(
            "--effort",
            type=click.Choice(EFFORTS),
            help="Reasoning effort (default: from the model)",
        ),
        click.option("--hide-thinking", is_flag=True, help="Hide the thinking on the terminal."),
    ]
)


def _use_threads(context: click.Context, param: click.Parameter, count: int | None) -> None:
    """Set the variable that the kernels read when they are loaded, as they are not here yet."""
    if count is not None:
        os.environ["MLXARCH_THREADS"] = str(count)


threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 1024),
    envvar="MLXARCH_THREADS",
    show_envvar=True,
    expose_value=False,
    callback=_use_threads,
    help="Threads of the CPU kernels (default: one per physical core)",
)
bits_option = click.option(
    "--bits",
    type=click.Choice(BITS_CHOICES),
    help="Weight bits (default: 8, or 4 if 8 does not fit)",
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Skip confirmation.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
force_option = click.option(
    "--force", is_flag=True, help="Replace an existing output once the new one is complete."
)
memory_options = _combine(
    [
        click.option(
            "--memory",
            type=ByteSize(),
            metavar="SIZE",
            help="Memory budget, e.g. 16GB (default: available memory)",
        ),
        click.option(
            "--kv-bits",
            type=click.Choice(KV_BITS_CHOICES),
            help="KV cache bits; 16 for unquantized (default: 16)",
        ),
        click.option(
            "--ple",
            type=click.Choice(PLE_CHOICES),
            default="auto",
            help="Location of per-layer embeddings (default: auto, the SSD if memory is short)",
        ),
    ]
)
loading_options = _combine(
    [
        bits_option,
        click.option(
            "--dtype",
            type=click.Choice(COMPUTE_DTYPES),
            help="Compute dtype (default: best for the machine)",
        ),
        click.option(
            *CONTEXT_FLAGS,
            type=TokenCount(),
            metavar="TOKENS",
            envvar="MLXARCH_CONTEXT",
            show_envvar=True,
            help="Context window, e.g. 32k (default: as large as model and memory allow)",
        ),
        memory_options,
        click.option(
            "--wire", is_flag=True, help="Keep the planned memory from being swapped out (macOS)."
        ),
        click.option(
            "--slice",
            metavar="NAME",
            help="MatFormer sub-model of Gemma 3n E4B, e.g. e2b (default: the full model)",
        ),
        threads_option,
        yes_option,
    ]
)
model_option = click.option(
    "-m",
    "--model",
    "model_flag",
    metavar="MODEL",
    help="Model name or folder (default: the first argument, or MLXARCH_MODEL)",
)


def parse_bits(bits: str | None) -> int | str | None:
    """Convert the text of ``--bits`` to the library's type: an int, "original" or None."""
    return int(bits) if bits and bits.isdigit() else bits


def decode_utf8(data: bytes, name: str, end: str = "\n") -> str:
    """Decode a text, without byte order mark and without the characters ``end`` at its end.

    Raises:
        InvalidInput: it is not UTF-8.
    """
    from mlxarch.errors import InvalidInput

    try:
        return data.decode("utf-8-sig").rstrip(end)
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{name} is no text in UTF-8: byte {error.start} is {data[error.start]:#04x}"
        ) from error


def resolve_model_name(model_flag: str | None, argument: str | None) -> str:
    """Return the model named by -m, by the argument or by MLXARCH_MODEL.

    Raises:
        click.UsageError: no model is named, or -m and the argument both name one.
    """
    if model_flag and argument:
        raise click.UsageError(f"the model is named twice, as {argument!r} and as {model_flag!r}")
    if model := model_flag or argument or os.environ.get("MLXARCH_MODEL"):
        return model
    raise click.UsageError(
        "name a model, or set MLXARCH_MODEL; `mlxarch list` shows which there are"
    )


def load_model(
    name: str,
    *,
    bits: str | None,
    dtype: str | None,
    slice: str | None,
    wire: bool,
    yes: bool,
    **options: Any,
) -> "LanguageModel":
    """Obtain and load a model with the values of ``loading_options``, showing the progress."""
    from mlxarch.cpu_kernels import native
    from mlxarch.language_model import load_folder

    request = make_request(**options)
    folder = obtain_model(name, bits, yes, request=request)
    model = load_folder(folder, request, dtype=dtype, wire=wire, slice=slice)
    if is_terminal(sys.stderr) and (advice := native.advice()):
        print_stderr(advice, dim=True)
    return model


def make_request(
    *, memory: int | None, context: int | None, kv_bits: str | None, ple: Any, **_: object
) -> "Request":
    """Make a planning request from the values of ``memory_options`` and --context."""
    from mlxarch.planner.plan import Request

    return Request(
        memory=memory, context=context, kv_bits=int(kv_bits) if kv_bits else None, ple=ple
    )


def obtain_model(
    name: str,
    bits: str | None,
    yes: bool,
    *,
    refresh: bool = False,
    request: "Request | None" = None,
    evaluate: bool = False,
    method: str | None = None,
) -> Path:
    """Obtain a model and return its folder.

    Prints size, destination and duration before a download or conversion begins, and asks for
    confirmation if it is large, takes long or does not fit into the memory.
    """
    from mlxarch.store import obtain as store

    settings: Any = {
        "bits": parse_bits(bits),
        "confirm": make_confirm(yes),
        "refresh": refresh,
        "request": request,
        "method": method,
    }
    with terminal_progress(None) as progress:
        return store.obtain(name, progress=progress, evaluate=evaluate, **settings)


def obtain_source(source: str, yes: bool) -> tuple[str, Path]:
    """Obtain a model to convert: as published unless its name asks for bits, or another copy is here.

    Returns:
        A name for the output, and the folder.
    """
    from mlxarch.store.names import find_local_copy, resolve_name

    reference = resolve_name(source)
    if reference.path:
        return reference.path.resolve().name, reference.path
    published = replace(reference, bits=reference.bits or "original")
    here = find_local_copy(published) or find_local_copy(reference)
    wanted = None if here or reference.bits else "original"
    folder = obtain_model(str(here or source), wanted, yes)
    return reference.name.rsplit("/", 1)[-1].replace("@", "-"), folder


def given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling options that were given, validated before any model is loaded."""
    from mlxarch.generation.sampling import Sampling

    given = {name: options[name] for name in SAMPLING_NAMES if options[name] is not None}
    Sampling(**given)
    return given
