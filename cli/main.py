"""The ``mlxarch`` command: its subcommands, and the conversion of errors to exit codes.

A subcommand's module is imported only when that command runs, so that ``mlxarch --help`` answers
at once and without MLX.
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
from mlxarch.cli.output import configure_streams, print_error, print_stderr
from mlxarch.cli.signals import SIGNALS, Terminated, end_if_busy, raise_terminated
from mlxarch.errors import ContextLengthError, MemoryBudgetError, MlxArchError

# command: (module below mlxarch.cli.commands, summary: the first line of the command's own help)
COMMANDS = {
    "run": ("generate.run", "Answer one prompt."),
    "chat": ("generate.chat", "Chat with a model."),
    "serve": ("generate.serve", "Serve models to HTTP clients."),
    "ps": ("generate.ps", "List the loaded models of a running server."),
    "stop": ("generate.stop", "Unload models of a running server."),
    "pull": ("models.pull", "Download a model, and quantize it if needed."),
    "list": ("models.list", "List available and installed models."),
    "show": ("models.show", "Show the properties of a model without downloading it."),
    "rm": ("models.rm", "Remove models that mlxarch created."),
    "fit": ("plan.fit", "Estimate whether a model fits into memory, and its speed."),
    "tune": ("plan.tune", "Find the best memory size for streamed experts on this machine."),
    "compare": ("plan.compare", "Compare architectures by their configs."),
    "quantize": ("convert.quantize", "Quantize a checkpoint to a folder of MLX weights."),
    "pack": ("convert.pack", "Repack a model for SSD offload, with one read per expert."),
    "slice": ("convert.slice", "Extract a MatFormer sub-model from Gemma 3n E4B."),
    "eval": ("convert.evaluate", "Measure perplexity, and KL divergence from the original."),
    "verify": ("models.verify", "Check the files of a model against its receipt."),
    "paths": ("models.paths", "Print the folders that mlxarch uses."),
}
ALIASES = {"get": "pull", "ls": "list"}

# exit codes as a shell reports a process that SIGPIPE or SIGINT ended
BROKEN_PIPE = 141
INTERRUPTED = 130
SIGNAL_CODES = (INTERRUPTED, *(128 + number for number in SIGNALS))

REMEDIES: dict[type[MlxArchError], str] = {
    ContextLengthError: "--overflow keep-ends drops the middle of the prompt; -c 32k loads the model "
    "with more context, if it has so much (`mlxarch show` says)",
    MemoryBudgetError: "`mlxarch fit` shows what fits; -c 2k takes less memory for the context, and "
    "--memory sets another budget",
}
"""Options of the command line that help against an error of the library."""

EPILOG = """\b
A model is a short name (smollm2-135m, qwen3-8b-4bit), a repository of the
Hub (org/name, org/name@revision) or a folder (./name).

\b
Exit codes:
  0    success
  1    failure
  2    wrong usage, or a value out of range
  3    model not found, or access to it not granted
  4    model does not fit into memory
  5    network needed but not reachable
  129  the terminal was closed (SIGHUP)
  130  interrupted (Ctrl-C)
  141  the reader of the output ended (SIGPIPE)
  143  terminated (SIGTERM)

\b
Environment:
  MLXARCH_MODEL    default model
  MLXARCH_CONTEXT  default of --context, in tokens
  MLXARCH_API_KEY  key that clients of `mlxarch serve` must present
  MLXARCH_SERVER   address of the server for `mlxarch ps` and `stop`
  MLXARCH_HOME     one folder for all files (see `mlxarch paths`)
  MLXARCH_MODELS   additional read-only model folders, separated by colons
  MLXARCH_THREADS  default of --threads
  MLXARCH_CPU_KERNELS
                   off, baseline, avx2 or avx512 (default: the best of this CPU)
  MLXARCH_DEBUG    1 to print tracebacks and log messages
  NO_COLOR         if set, no colors and no rendered Markdown
  HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HTTPS_PROXY
                   as in other programs that use the Hub
"""


class CommandLine(click.Group):
    """A group that imports its commands on demand and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of ``--help``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is no such name."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name == "help":
            return _help_command
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlxarch.cli.commands.{COMMANDS[name][0]}")
        return getattr(module, f"{name}_command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command, suggesting the nearest name for an unknown one."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], [*COMMANDS, *ALIASES], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command is called {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list from ``COMMANDS``, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run one command line and exit."""
        if "_MLXARCH_COMPLETE" in os.environ:  # a shell asks for completions
            super().main(args, "mlxarch", **extra)
        configure_streams()
        sys.exit(_run_to_exit_code(self, sys.argv[1:] if args is None else list(args)))


@click.command(
    cls=CommandLine,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mlxarch", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run open-weight language models on this machine, quantized, on MLX."""
    _log_to_stderr()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.command("help")
@click.argument("command", required=False)
@click.pass_context
def _help_command(context: click.Context, command: str | None) -> None:
    """Show the help of a command, or of all."""
    parent = context.parent
    assert parent is not None, "help is a command of the group"
    if command is None:
        click.echo(parent.get_help())
        return
    _, found, _ = cli.resolve_command(parent, [command])
    assert found is not None, "resolve_command refuses unknown names"
    with click.Context(found, info_name=command, parent=parent) as own:
        click.echo(found.get_help(own))


def main() -> NoReturn:
    """Run the command line of this process: the entry point of the package.

    After a signal the process ends without the interpreter's own tidying up, which frees gigabytes
    and waits for threads.
    """
    with end_if_busy():
        try:
            cli.main()
        except SystemExit as end:
            if end.code in SIGNAL_CODES:
                sys.stderr.flush()
                os._exit(end.code)
            raise


def _run_to_exit_code(group: CommandLine, arguments: list[str]) -> int:
    """Run a command line and return its exit code; every error is reported here."""
    try:
        with raise_terminated():
            code = _invoke(group, arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        for note in ["", *getattr(interrupt, "__notes__", ())]:
            print_stderr(note)
        return interrupt.exit_code if isinstance(interrupt, Terminated) else INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _end_after_broken_pipe()
        file = f": {error.filename}" if error.filename else ""
        return _report(f"{error.strerror or error}{file}", 1)
    except MlxArchError as error:
        for note in getattr(error, "__notes__", ()):
            print_stderr(note)
        code = _report(str(error), error.exit_code)
        if remedy := REMEDIES.get(type(error)):
            print_stderr(f"mlxarch: {remedy}")
        return code
    except MemoryError:
        return _report("the memory is full", 4)
    except Exception as error:
        return _report(
            f"{type(error).__name__}: {error}\nmlxarch: this should not happen. Please report it, "
            "with the command and what it prints with MLXARCH_DEBUG=1",
            1,
        )


def _invoke(group: CommandLine, arguments: list[str]) -> int:
    """Invoke the command and return its exit code, reporting click's own errors."""
    try:
        with group.make_context("mlxarch", arguments) as context:
            group.invoke(context)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort as abort:  # from click's prompts, at Ctrl-C or the end of input
        if isinstance(interrupt := abort.__context__, KeyboardInterrupt):
            raise interrupt from None
        return _report("no answer was given, so nothing was done", 1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mlxarch"
        return _report(
            f"{error.format_message().rstrip('.')}\nmlxarch: `{command} --help` says more",
            error.exit_code,
        )
    except click.ClickException as error:
        return _report(error.format_message(), error.exit_code)


def _report(message: str, code: int) -> int:
    """Print an error, with its traceback in debug mode, and return the exit code."""
    if _debug_enabled():
        traceback.print_exc()
    print_error(message)
    return code


def _end_after_broken_pipe() -> int:
    """Discard further output, so that Python's final flush does not fail, and return the code."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, sys.stdout.fileno())
    return BROKEN_PIPE


def _debug_enabled() -> bool:
    return os.environ.get("MLXARCH_DEBUG", "") not in ("", "0")


class _StderrHandler(logging.Handler):
    """Print each log line once: planning and loading read the same folder and log the same."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"mlxarch: {record.levelname.lower()}: {record.getMessage()}"
        if line not in self._printed:
            self._printed.add(line)
            print_stderr(line)


def _log_to_stderr() -> None:
    logger = logging.getLogger("mlxarch")
    logger.handlers = [_StderrHandler()]
    logger.setLevel(logging.DEBUG if _debug_enabled() else logging.WARNING)
