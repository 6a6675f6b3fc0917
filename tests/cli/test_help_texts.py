"""Help texts: every option of every command has one, in one form, with its true default."""

import re

import click
import pytest

from mlxarch.cli.main import COMMANDS, cli
from mlxarch.generation.thinking.switches import EFFORTS
from mlxarch.quantization import formats
from mlxarch.system.dtypes import COMPUTE_DTYPES

VALUE = re.compile(r"[A-Z][^\n]*[^.] \((default: [^()]+|required)\)")
FLAG = re.compile(r"[A-Z][^\n]*\.")
BAD_BEGINNINGS = ("What", "Of", "That", "As", "At", "To")


def get_command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


OPTIONS = [
    pytest.param(option, id=f"{name} {option.opts[-1]}")
    for name in COMMANDS
    for option in options_of(get_command(name))
]


def faults(option: click.Option) -> list[str]:
    """Describe what breaks the form of an option's help; empty if nothing does.

    A value: "Noun phrase (default: what happens without it)". A flag: a sentence.
    """
    text = option.help or ""
    found = []
    if option.is_flag:
        if not FLAG.fullmatch(text):
            found.append("a flag's help is a sentence with a period")
    elif not VALUE.fullmatch(text):
        found.append('a value\'s help is "Noun phrase (default: …)", without a period')
    if text.split(" ")[0] in BAD_BEGINNINGS:
        found.append(f"begins with {text.split(' ')[0]}")
    if option.multiple and "repeatable" not in text:
        found.append("does not say that it is repeatable")
    if option.show_default:
        found.append("click shows the default a second time")
    default = option.default
    has_default = isinstance(default, str | int) and not isinstance(default, bool)
    named = re.search(r"\(default: ([^,;)]+)", text)
    if has_default and (named is None or named[1] != str(default)):
        found.append(f"the default is {default!r}")
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_the_help_of_an_option_has_the_form_of_the_house(option):
    assert faults(option) == []


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        (click.Option(["--x"]), "Noun phrase"),
        (click.Option(["--x"], help="Weight bits."), "Noun phrase"),
        (click.Option(["--x"], help="weight bits (default: 8)"), "Noun phrase"),
        (click.Option(["--x"], help="Weight bits (default: 8)."), "Noun phrase"),
        (click.Option(["--x"], help="Of the weights (default: 8)"), "begins with Of"),
        (click.Option(["--x"], help="At most (default: none)"), "begins with At"),
        (click.Option(["--x"], default=4, help="Weight bits (default: 8)"), "the default is 4"),
        (click.Option(["--x"], default="a", help="Mode (default: b, or c)"), "the default is 'a'"),
        (click.Option(["--x"], multiple=True, help="Text (default: none)"), "repeatable"),
        (click.Option(["--x"], show_default=True, help="Text (default: none)"), "second time"),
        (click.Option(["--x"], is_flag=True), "a flag's help"),
        (click.Option(["--x"], is_flag=True, help="Print JSON"), "a flag's help"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.help),
)
def test_a_help_of_another_form_is_seen(option, fault):
    assert fault in "; ".join(faults(option))


@pytest.mark.parametrize(
    "option",
    [
        click.Option(["--x"], help="Weight bits (default: 8, or 4 if 8 does not fit)"),
        click.Option(["--x"], default=4, help="Weight bits (default: 4)"),
        click.Option(["--x"], help="Source to read (required)"),
        click.Option(["--x"], is_flag=True, help="Print JSON."),
    ],
    ids=lambda option: option.help,
)
def test_a_help_of_the_form_is_accepted(option):
    assert faults(option) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_of_a_command_is_an_imperative_on_one_line(name):
    summary = COMMANDS[name][1]
    assert re.fullmatch(r"[A-Z][a-z]+ [^\n]{5,70}\.", summary)
    assert summary.split(" ")[0] not in (*BAD_BEGINNINGS, "Tell", "See", "Whether")


def choices(command: str, option: str) -> tuple[str, ...]:
    [found] = [each for each in options_of(get_command(command)) if option in each.opts]
    assert isinstance(found.type, click.Choice)
    return tuple(found.type.choices)


def test_options_offer_the_values_that_the_library_accepts():
    bits = {str(bits) for bits in formats.BITS}
    assert (
        set(choices("run", "--bits")) == set(choices("quantize", "--bits")) == bits | {"original"}
    )
    assert set(choices("fit", "--bits")) == bits | {"16"}
    assert set(choices("run", "--kv-bits")) == {str(bits) for bits in formats.KV_BITS} | {"16"}
    assert choices("quantize", "--mode") == tuple(formats.MODES)
    assert choices("chat", "--effort") == EFFORTS
    assert choices("run", "--dtype") == choices("quantize", "--dtype") == COMPUTE_DTYPES


def test_the_methods_of_quantize_are_those_of_the_library():
    """They are listed twice, since the library's table cannot be imported without MLX."""
    from mlxarch.quantize.schedule import METHODS

    assert choices("quantize", "--method") == tuple(METHODS)
