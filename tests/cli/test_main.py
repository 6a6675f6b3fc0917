"""The command as a whole: help, exit codes, errors."""

import errno
import subprocess
import sys

import click
import pytest

from mlxarch import errors
from mlxarch.cli import main as module
from mlxarch.cli.main import ALIASES, COMMANDS, cli
from mlxarch.cli.signals import SIGNALS


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def test_without_arguments_it_shows_help(invoke):
    bare, asked = invoke(), invoke("--help")
    assert (bare.exit_code, asked.exit_code) == (0, 0)
    assert bare.stdout == asked.stdout
    assert all(name in bare.stdout for name in COMMANDS)


def test_help_documents_every_exit_code(invoke):
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and hasattr(value, "exit_code")
    ]
    codes = (
        {kind.exit_code for kind in kinds}
        | {0, module.INTERRUPTED, module.BROKEN_PIPE}
        | {128 + number for number in SIGNALS}
    )
    text = invoke("--help").stdout
    listed = text[text.index("Exit codes:") : text.index("Environment:")]
    assert {int(line.split()[0]) for line in listed.splitlines()[1:] if line.strip()} == codes


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_commands_says_what_each_says_itself(name):
    assert (command(name).help or "").splitlines()[0] == COMMANDS[name][1]


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_command(alias):
    assert command(alias) is command(ALIASES[alias])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_its_options(invoke, name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert all(
        option.opts[0] in result.stdout
        for option in command(name).params
        if isinstance(option, click.Option)
    )


@pytest.mark.parametrize(
    ("typed", "meant"), [("chta", "chat"), ("quantise", "quantize"), ("lst", "list")]
)
def test_an_unknown_command_offers_the_nearest(invoke, typed, meant):
    result = invoke(typed)
    assert result.exit_code == 2
    assert f"did you mean '{meant}'?" in result.stderr
    assert result.stdout == ""


def test_an_unknown_option_is_wrong_usage_and_offers_the_nearest(invoke):
    result = invoke("run", "--tempp", "1", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("mlxarch: error: ")
    assert "--temp" in result.stderr and "mlxarch run --help" in result.stderr


def test_the_version_is_the_packages(invoke):
    from mlxarch import __version__

    assert invoke("--version").stdout == f"mlxarch {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.InvalidInput("top_p must be small"), 2, "top_p must be small"),
        (errors.ModelNotFound("no such"), 3, "no such"),
        (errors.GatedModel("ask first"), 3, "ask first"),
        (errors.MemoryBudgetError("too large"), 4, "too large"),
        (errors.OfflineError("no network"), 5, "no network"),
        (errors.CheckpointError("torn"), 1, "torn"),
        (errors.CheckpointError("torn \x1b[31m by\x07 hand"), 1, "torn ␛[31m by␇ hand"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "Permission denied: /x"),
        (MemoryError(), 4, "the memory is full"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 1, "nothing was done"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_becomes_a_line_and_an_exit_code(invoke, monkeypatch, error, code, text):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("mlxarch.store.obtain.list_installed", fails)
    result = invoke("list")
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_an_unexpected_error_says_how_to_report_it_and_debug_shows_where(invoke, monkeypatch):
    def fails() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("mlxarch.store.obtain.list_installed", fails)
    assert "MLXARCH_DEBUG=1" in invoke("list").stderr
    monkeypatch.setenv("MLXARCH_DEBUG", "1")
    assert "in fails" in invoke("list").stderr


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (errors.CheckpointError("it is torn"), 1)]
)
def test_what_ended_the_work_tells_what_is_left_of_it(invoke, monkeypatch, error, code):
    def fails() -> None:
        error.add_note("what is written so far is kept")
        raise error

    monkeypatch.setattr("mlxarch.store.obtain.list_installed", fails)
    result = invoke("list")
    assert result.exit_code == code and "so far is kept" in result.stderr
    assert result.stderr.endswith(
        "mlxarch: error: it is torn\n" if code == 1 else "so far is kept\n"
    )


def test_warnings_of_the_library_reach_standard_error_once(invoke, monkeypatch):
    import logging

    def warns() -> list[object]:
        for _ in range(2):
            logging.getLogger("mlxarch.checkpoint.shards").warning(
                "a stray file: %s", "x\x1b]0;title\x07"
            )
        logging.getLogger("mlxarch.checkpoint.shards").info("not shown")
        return []

    monkeypatch.setattr("mlxarch.store.obtain.list_installed", warns)
    result = invoke("list")
    assert result.stderr == "mlxarch: warning: a stray file: x␛]0;title␇\n"


def test_a_reader_that_goes_away_ends_it_quietly(home, tiny):
    command = f"{sys.executable} -m mlxarch run {tiny} hello | head -c 5; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout[5:].strip() == "141"


def test_output_that_is_closed_is_no_error(home):
    command = f"{sys.executable} -m mlxarch --version >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json"], ["show", "qwen3-8b"], ["paths"]]
)
def test_looking_around_needs_no_mlx(home, arguments):
    code = (
        "import sys\nfrom mlxarch.cli.main import cli\n"
        f"try: cli.main({arguments!r})\nexcept SystemExit as stop: assert not stop.code\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout
    assert "'click'" in done.stderr
    assert (
        "'mlx'" not in done.stderr and "'numpy'" not in done.stderr and "'rich'" not in done.stderr
    )


def test_help_is_a_command_too(invoke):
    assert invoke("help").stdout == invoke("--help").stdout
    assert "Usage: mlxarch fit" in invoke("help", "fit").stdout
    wrong = invoke("help", "fits")
    assert wrong.exit_code == 2 and "did you mean 'fit'" in wrong.stderr
