"""The ``mlxarch`` command: which commands there are, and what becomes of their errors.

A command's module is imported when the command runs, so that ``mlxarch --help`` answers at once and without MLX.
"""

import difflib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mlxarch import __version__
from mlxarch.cli.output import fail, prepare_streams, say
from mlxarch.cli.signals import Terminated, raising
from mlxarch.errors import MlxArchError

# command: (module of mlxarch.cli, what it does: the first sentence of its own help)
COMMANDS = {
    "run": ("run", "Answer one prompt."),
    "chat": ("chat", "Talk with a model."),
    "pull": ("models", "Download a model, quantized on the way where need be."),
    "list": ("models", "List the models there are, and those that are here."),
    "show": ("models", "Show what is known of a model, without downloading it."),
    "rm": ("models", "Remove models that mlxarch made."),
    "fit": ("fit", "Tell whether a model fits, with every term, and how fast it would be."),
    "tune": ("tune", "Find out how much memory streamed experts should have on this machine."),
    "compare": ("compare", "Compare architectures, from their configs alone."),
    "quantize": ("quantize", "Write a checkpoint as a folder of MLX weights, quantized."),
    "pack": ("pack", "Lay out a model's experts so that they can be read one at a time."),
    "slice": ("slice", "Write a smaller Gemma 3n out of the whole one."),
    "eval": ("evaluate", "Measure perplexity, and how far a model is from its original."),
    "verify": ("receipts", "Check the files of a model that mlxarch made against its receipt."),
    "paths": ("models", "Print where files are kept."),
}
ALIASES = {"get": "pull", "ls": "list"}
BROKEN_PIPE, INTERRUPTED, TERMINATED = 141, 130, 143  # as a shell reports a process that SIGPIPE, SIGINT, SIGTERM ended

EPILOG = """\b
A model is a short name (smollm2-135m, qwen3-8b-4bit), a repository of the
Hub (org/name, org/name@revision) or a folder (./name).

\b
Exit codes:
  0    done
  1    failed
  2    wrong usage, or a value out of its range
  3    model not found, or access to it not granted
  4    does not fit into the memory
  5    the network is needed and out of reach
  130  interrupted (Ctrl-C)
  143  ended (SIGTERM)

\b
Environment:
  MLXARCH_MODEL    the model where none is named
  MLXARCH_CONTEXT  tokens of context to plan for, as --context
  MLXARCH_HOME     one folder for all files (see `mlxarch paths`)
  MLXARCH_MODELS   more folders with models, only read, separated by colons
  MLXARCH_DEBUG    1 prints tracebacks and log messages
  NO_COLOR         plain text: no colors, no rendered Markdown
  HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HTTPS_PROXY
                   as everywhere
"""


class CommandLine(click.Group):
    """A group whose commands are imported on demand, and the one place where errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlxarch.cli.{COMMANDS[name][0]}")
        return getattr(module, f"{name}_command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest a name for one that does not exist."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], [*COMMANDS, *ALIASES], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command is called {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, so that no command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run one command line and exit."""
        if "_MLXARCH_COMPLETE" in os.environ:  # a shell asks for completions
            super().main(args, "mlxarch", **extra)
        prepare_streams()
        sys.exit(_guarded(self, sys.argv[1:] if args is None else list(args)))


@click.command(
    cls=CommandLine,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mlxarch", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """mlxarch runs open-weight language models on this machine, quantized, on MLX."""
    _log_to_stderr()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """The entry point."""
    cli.main()


def _guarded(group: CommandLine, arguments: list[str]) -> int:
    """Run it, and return the exit code; no error passes."""
    try:
        with raising():
            code = _run(group, arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        for note in ["", *getattr(interrupt, "__notes__", ())]:
            say(note)
        return interrupt.exit_code if isinstance(interrupt, Terminated) else INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _reader_went_away()
        return _failed(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    except MlxArchError as error:
        for note in getattr(error, "__notes__", ()):
            say(note)
        return _failed(str(error), error.exit_code)
    except MemoryError:
        return _failed("the memory is full", 4)
    except Exception as error:
        return _failed(
            f"{type(error).__name__}: {error}\nmlxarch: this should not happen. Please report it, with the command and "
            "what it prints with MLXARCH_DEBUG=1",
            1,
        )


def _run(group: CommandLine, arguments: list[str]) -> int:
    try:
        with group.make_context("mlxarch", arguments) as context:
            group.invoke(context)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort as abort:  # click's prompts turn Ctrl-C and the end of input into this
        if isinstance(interrupt := abort.__context__, KeyboardInterrupt):
            raise interrupt from None
        return _failed("no answer was given, so nothing was done", 1)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "mlxarch"
        return _failed(f"{error.format_message().rstrip('.')}\nmlxarch: `{where} --help` says more", error.exit_code)
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code)


def _failed(message: str, code: int) -> int:
    if _debug():
        traceback.print_exc()
    fail(message)
    return code


def _reader_went_away() -> int:
    """Nobody reads standard output any more: end quietly, also when Python flushes at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return BROKEN_PIPE


def _debug() -> bool:
    return os.environ.get("MLXARCH_DEBUG", "") not in ("", "0")


class _Handler(logging.Handler):
    """Says everything once: a folder is opened to plan for it, and again to load it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"mlxarch: {record.levelname.lower()}: {record.getMessage()}"
        if line not in self._said:
            self._said.add(line)
            say(line)


def _log_to_stderr() -> None:
    logger = logging.getLogger("mlxarch")
    logger.handlers = [_Handler()]
    logger.setLevel(logging.DEBUG if _debug() else logging.WARNING)
