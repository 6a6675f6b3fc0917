"""SIGTERM and SIGHUP: what is under way is put right, and what can be gone on with stays and is told."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from mlxarch.cli import signals
from mlxarch.cli.signals import SIGNALS, Terminated, raise_terminated
from mlxarch.quantize import conversion, convert_checkpoint
from mlxarch.quantize.mixed_precision import targets

LIMITS = conversion.Limits(sync_bytes=20_000)  # several notes of what is written, for a tiny model


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Signals have their usual effect, also where the suite was told to ignore them, as by nohup."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number in before:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str) -> Path:
    shutil.copytree(tiny, tmp_path / "work" / "tiny")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def at_tensor(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Let ``act`` happen when a conversion comes to its ``count``-th tensor."""
    seen, usual = list[str](), conversion.ParameterResult.from_error_stats

    def counted(*arguments):
        seen.append("")
        if len(seen) == count:
            act()
        return usual(*arguments)

    monkeypatch.setattr(conversion.ParameterResult, "from_error_stats", counted)


def quantize(invoke, monkeypatch: pytest.MonkeyPatch, limits: conversion.Limits):
    defaults = convert_checkpoint.prepare.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "limits", limits)
    return invoke("quantize", "./tiny", "--method", "round", "--no-eval")


@pytest.mark.parametrize("number", SIGNALS)
def test_what_nobody_can_go_on_with_is_removed(invoke, here, monkeypatch, number):
    at_tensor(monkeypatch, 8, lambda: os.kill(os.getpid(), number))
    ended = quantize(invoke, monkeypatch, conversion.Limits())
    assert (ended.exit_code, ended.stdout) == (128 + number, "")
    assert "is kept" not in ended.stderr and os.listdir(here) == ["tiny"]


def test_what_can_be_gone_on_with_stays_and_is_told(invoke, here, monkeypatch):
    at_tensor(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = quantize(invoke, monkeypatch, LIMITS)
    assert ended.exit_code == 143
    assert (
        "tiny-4bit: what is written so far is kept; the same command goes on from there"
        in ended.stderr
    )
    assert sorted(os.listdir(here)) == ["tiny", "tiny-4bit.partial"]
    assert quantize(invoke, monkeypatch, LIMITS).exit_code == 0
    assert sorted(os.listdir(here)) == ["tiny", "tiny-4bit"]


def test_a_second_signal_does_not_end_the_tidying_up(invoke, here, monkeypatch):
    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    at_tensor(monkeypatch, 8, twice)
    assert quantize(invoke, monkeypatch, conversion.Limits()).exit_code == 143
    assert os.listdir(here) == ["tiny"]


def test_what_the_parent_ignores_stays_ignored(invoke, here, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_tensor(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert quantize(invoke, monkeypatch, LIMITS).exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_signals_do_what_they_did():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Terminated), raise_terminated():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_ends_a_chat_where_ctrl_c_ends_an_answer(invoke, tiny, monkeypatch):
    monkeypatch.setattr(
        "mlxarch.cli.commands.generate.chat.PipeReader", type("NobodyReads", (), {})
    )  # as at a terminal
    for error, code in ((KeyboardInterrupt(), 0), (Terminated(signal.SIGTERM), 143)):

        def stops(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("mlxarch.cli.chat.conversation.Conversation.ask", stops)
        ended = invoke("chat", tiny, input="Hi\n")
        assert ended.exit_code == code and ("stopped before" in ended.stderr) is (code == 0)


@pytest.mark.parametrize(
    ("received", "reacts", "ended"),
    [
        ([signal.SIGTERM], False, [143]),
        ([signal.SIGINT], False, [130]),
        ([signal.SIGTERM], True, []),
        ([signal.SIGTERM, signal.SIGTERM], True, [143]),  # a second one ends it at once
        ([signal.SIGINT], True, []),
        ([signal.SIGWINCH], False, []),  # no concern of ours
    ],
)
def test_a_process_without_reaction_is_ended(received, reacts, ended, monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0)
    signals._reacted.clear()
    wake, written = os.pipe()
    os.write(written, bytes(received))
    os.close(written)
    codes = []
    with raise_terminated():
        if reacts:
            signals._reacted.set()
        signals._watch(wake, lambda: None, codes.append)
    assert codes == ended


def test_a_handler_of_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0)
    wake, written = os.pipe()
    os.write(written, bytes([signal.SIGTERM]))
    os.close(written)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        signals._watch(wake, lambda: None, lambda code: pytest.fail(f"ended with {code}"))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_kept_is_said_where_the_process_is_ended(monkeypatch, capfd):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0)
    signals._reacted.clear()
    for note, said in ((signals.note_what_is_kept(), signals.KEPT), (nullcontext(), "")):
        wake, written = os.pipe()
        os.write(written, bytes([signal.SIGTERM]))
        os.close(written)
        with raise_terminated(), note:
            signals._watch(wake, lambda: None, lambda _: None)
        assert capfd.readouterr().err.strip() == said


def test_an_interrupt_while_bits_are_chosen_says_what_is_kept(invoke, here, monkeypatch):
    monkeypatch.setattr(targets, "toward", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = invoke("quantize", "./tiny", "--target-bits", "5", "--method", "round")
    assert result.exit_code == 143
    assert signals.KEPT in result.stderr


INTERRUPTED_IMPORT = """
import importlib.abc, os, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "mlxarch.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))
sys.meta_path.insert(0, Interrupt())
from mlxarch.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported_prints_nothing():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


LONG_CALL = """
import hashlib
from mlxarch.cli.signals import end_if_busy, raise_terminated
def compute():  # for minutes, in which no Python code runs
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
with end_if_busy(), raise_terminated():
    try:
        print("begun", flush=True)
        compute()
    except KeyboardInterrupt:  # the signal was quicker than the call
        compute()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_computation_outside_of_python_does_not_delay_the_end(number):
    with subprocess.Popen([sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"begun\n"
        for _ in range(2):
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        assert process.wait(60) == 128 + number
