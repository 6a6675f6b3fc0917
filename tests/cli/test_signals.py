"""SIGTERM and SIGHUP: what is under way is put right, and what can be gone on with stays and is told."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxarch.cli.signals import SIGNALS, Terminated, raise_terminated
from mlxarch.quantize import conversion, convert_checkpoint

LIMITS = conversion.Limits(sync_bytes=20_000)  # several notes of what is written, for a tiny model


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
