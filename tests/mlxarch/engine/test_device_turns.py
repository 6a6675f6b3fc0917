"""Engines of one process take turns on the device, and a row whose reader is behind lets others go on."""

import queue
import threading
import time
from functools import partial

import pytest

import parity
from mlxarch.engine import Engine, GenerationRequest, RowOutput
from mlxarch.engine.device_turns import DeviceTurns
from mlxarch.engine.scheduler import Scheduler
from mlxarch.loading.load import load_model

WAIT = 30


@pytest.fixture(scope="module")
def model():
    return load_model(parity.GOLDEN / "qwen3")[0]


def test_a_thread_that_releases_does_not_overtake_those_that_wait():
    turns = DeviceTurns()
    order: list[str] = []

    def work(name: str) -> None:
        for _ in range(3):
            with turns:
                order.append(name)
                deadline = time.monotonic() + 2
                while not turns.wanted and len(order) < 5 and time.monotonic() < deadline:
                    time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert "".join(order) in ("ababab", "bababa")


def test_two_models_never_compute_at_once(model, monkeypatch: pytest.MonkeyPatch):
    inside: list[Scheduler] = []
    turns: list[tuple[Scheduler, int]] = []
    turn = Scheduler.turn

    def watched(self: Scheduler) -> None:
        inside.append(self)
        turn(self)
        turns.append((self, len(inside)))
        inside.remove(self)

    monkeypatch.setattr(Scheduler, "turn", watched)
    with Engine(model, probe=False) as one, Engine(model, probe=False) as two:
        streams = [
            engine.stream(GenerationRequest(prompt=(3, 4, 5), max_tokens=40))
            for engine in (one, two)
        ]
        firsts = [next(stream) for stream in streams]
        lasts = [list(stream)[-1] for stream in streams]
    assert firsts and [last.finish_reason for last in lasts] == ["length", "length"]
    assert {count for _, count in turns} == {1}
    owners = [owner for owner, _ in turns]
    assert sum(a is not b for a, b in zip(owners, owners[1:], strict=False)) >= 5


def test_a_paused_row_keeps_its_place_and_lets_the_others_go_on(model):
    def collect(outputs: queue.SimpleQueue[RowOutput]) -> list[int]:
        tokens: list[int] = []
        while True:
            output = outputs.get(timeout=WAIT)
            tokens += output.tokens
            if output.finish_reason is not None:
                return tokens

    with Engine(model, max_rows=2) as engine:
        wanted = GenerationRequest(prompt=(3, 4, 5), max_tokens=60)
        expected = [token for output in engine.stream(wanted) for token in output.tokens]
        outputs: queue.SimpleQueue[RowOutput] = queue.SimpleQueue()
        handle = engine.submit(wanted, outputs.put)
        first = outputs.get(timeout=WAIT)
        handle.pause()
        assert len(list(engine.stream(GenerationRequest(prompt=(7, 8), max_tokens=30)))) >= 30
        delivered = outputs.qsize()
        assert len(list(engine.stream(GenerationRequest(prompt=(9, 8), max_tokens=30)))) >= 30
        assert outputs.qsize() == delivered < 58
        assert engine.status().running == 1 and not handle.done.is_set()
        handle.resume()
        assert [*first.tokens, *collect(outputs)] == expected

        left = [engine.submit(wanted, partial(lambda _: None)) for _ in range(2)]
        for each in left:
            each.pause()
        third = engine.stream(GenerationRequest(prompt=(7, 8), max_tokens=3))
        left[0].cancel()  # makes room, although all rows are paused
        assert list(third)[-1].finish_reason == "length"
        left[1].cancel()
