"""Options and arguments that several commands share."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxarch.cli.output import is_terminal, say, size

if TYPE_CHECKING:
    from mlxarch.language_model import LanguageModel
    from mlxarch.memory import Request
    from mlxarch.store import Plan


class Bytes(click.ParamType):
    """A size of memory: 16GB, 900MB, 16GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See ``machines.parse_size``."""
        from mlxarch.errors import InvalidInput
        from mlxarch.machines import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except InvalidInput as error:
            self.fail(str(error), param, ctx)


class Tokens(click.ParamType):
    """A number of tokens: 4096, 32k."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """A number from 1 on; k stands for 1024."""
        text = str(value).strip().lower()
        number = text.removesuffix("k")
        if not re.fullmatch(r"[0-9]{1,15}", number) or not int(number):
            self.fail(f"{value!r} is no number of tokens; write 4096 or 32k", param, ctx)
        return int(number) * (1024 if text.endswith("k") else 1)


Command = TypeVar("Command", bound=Callable[..., Any])
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
BITS = ("8", "6", "5", "4", "3", "2", "original")
DTYPES = ("float32", "float16", "bfloat16")
ASK_ABOVE = 5 * 10**9  # bytes
KV_BITS = ("16", "8", "4")
PLE = ("auto", "ssd", "memory")
OVERFLOW = ("refuse", "keep-ends")
EFFORTS = ("low", "medium", "high")


def _combined(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sampling_options = _combined(
    [
        click.option("--temp", "--temperature", "temperature", type=float, help="0: always the most likely token."),
        click.option("--top-k", type=int, help="Only the K most likely tokens; 0: all."),
        click.option("--top-p", type=float, help="Only the most likely tokens that make up P together; 1: all."),
        click.option("--min-p", type=float, help="Only tokens P times as likely as the most likely one; 0: all."),
        click.option("--repetition-penalty", type=float, help="Above 1: less of what was there; 1: no penalty."),
        click.option("--seed", type=int, help="The same seed gives the same answer."),
    ]
)
answer_options = _combined(
    [
        click.option("-s", "--system", "--system-prompt", "system", metavar="TEXT", help="A system prompt."),
        click.option("-n", "--max-tokens", type=click.IntRange(1), help="At most; else until it ends."),
        click.option(
            "--overflow",
            type=click.Choice(OVERFLOW),
            default="refuse",
            show_default=True,
            help="Where the context is too short; keep-ends: leave out the middle.",
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Repeatable."),
        click.option("--stats", "--verbose", is_flag=True, help="Tell how fast it was, on standard error."),
        click.option("--plain", is_flag=True, help="Do not render Markdown."),
    ]
)
thinking_options = _combined(
    [
        click.option("--think/--no-think", "think", default=None, help="Let it think before it answers, or not."),
        click.option("--effort", type=click.Choice(EFFORTS), help="How hard to think."),
        click.option("--hide-thinking", is_flag=True, help="Do not show the thinking on the terminal."),
    ]
)
CONTEXT = ("-c", "--context", "--ctx", "--ctx-size", "--context-length", "--max-context", "context")  # all are usual
bits_option = click.option(
    "--bits", type=click.Choice(BITS), help="Of the weights; else the largest of 8, 4 that fits."
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
memory_options = _combined(
    [
        click.option(
            "--memory", type=Bytes(), metavar="SIZE", help="That it may use, such as 16GB; else the machine's."
        ),
        click.option(
            "--kv-bits", type=click.Choice(KV_BITS), help="Of keys and values; 16, the default: as they are computed."
        ),
        click.option(
            "--ple",
            type=click.Choice(PLE),
            default="auto",
            show_default=True,
            help="Where per-layer embeddings are; auto: ssd if need be.",
        ),
    ]
)
loading_options = _combined(
    [
        bits_option,
        click.option("--dtype", type=click.Choice(DTYPES), help="To compute in; else what suits the machine."),
        click.option(
            *CONTEXT,
            type=Tokens(),
            metavar="TOKENS",
            envvar="MLXARCH_CONTEXT",
            show_envvar=True,
            help="Tokens of prompt and answer to plan for, such as 32k; else as many as model and memory allow.",
        ),
        memory_options,
        click.option("--wire", is_flag=True, help="On a Mac, keep what is planned for from being swapped out."),
        click.option("--slice", metavar="NAME", help="Of Gemma 3n E4B only this slice, such as e2b."),
        yes_option,
    ]
)
model_option = click.option("-m", "--model", "named", metavar="MODEL", help="The model, if not the first argument.")


def parsed_bits(bits: str | None) -> int | str | None:
    """As the library takes them."""
    return int(bits) if bits and bits.isdigit() else bits


def the_model(named: str | None, argument: str | None) -> str:
    """The model of -m, of the argument, or of MLXARCH_MODEL."""
    if named and argument:
        raise click.UsageError(f"the model is named twice, as {argument!r} and as {named!r}")
    if model := named or argument or os.environ.get("MLXARCH_MODEL"):
        return model
    raise click.UsageError("name a model, or set MLXARCH_MODEL; `mlxarch list` shows which there are")


def open_model(
    name: str, *, bits: str | None, dtype: str | None, slice: str | None, wire: bool, yes: bool, **given: Any
) -> "LanguageModel":
    """Obtain and load a model, showing how far that is."""
    from mlxarch.language_model import load

    request = asked(**given)
    return load(
        obtain(name, bits, yes, request=request),
        **{"dtype": dtype, "memory": request.memory, "context": request.context, "kv_bits": request.kv_bits},
        **{"ple": request.ple, "wire": wire, "slice": slice},
    )


def asked(*, memory: int | None, context: int | None, kv_bits: str | None, ple: Any, **_: object) -> "Request":
    """What ``memory_options`` and --context say."""
    from mlxarch.memory import Request

    return Request(memory=memory, context=context, kv_bits=int(kv_bits) if kv_bits else None, ple=ple)


def obtain(
    name: str,
    bits: str | None,
    yes: bool,
    *,
    refresh: bool = False,
    request: "Request | None" = None,
    evaluate: bool = False,
) -> Path:
    """The folder of a model; what it takes is said before it begins, and asked where it is much."""
    from mlxarch import store
    from mlxarch.progress import on_terminal

    how: Any = {"bits": parsed_bits(bits), "confirm": _confirm(yes), "refresh": refresh, "request": request}
    with on_terminal(None) as progress:
        return store.obtain(name, progress=progress, evaluate=evaluate, **how)


def _confirm(yes: bool) -> "Callable[[Plan], bool]":
    def confirm(plan: "Plan") -> bool:
        say(f"{plan.name}: {plan.description}; to {plan.target}")
        if plan.verdict:
            say(f"{plan.name}: {plan.verdict}")
        large = max(plan.download_bytes, plan.disk_bytes) > ASK_ABOVE
        fits = not plan.verdict.startswith("does not fit")
        if yes or (fits and not large) or not is_terminal(sys.stdin):
            return True
        here = "" if fits else ", and it does not fit into the memory of this machine"
        return click.confirm(f"That takes {size(plan.disk_bytes)} of disk{here}. Go on?", default=fits, err=True)

    return confirm


def chosen_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings that were given, validated before any model is loaded."""
    from mlxarch.sampling import Sampling

    given = {name: options[name] for name in SAMPLING if options[name] is not None}
    Sampling(**given)
    return given
