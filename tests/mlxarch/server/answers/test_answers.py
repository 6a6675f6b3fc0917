"""Answers on the event loop, with an engine that does what the test says."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from mlxarch import Tokenizer
from mlxarch.engine.request import GenerationRequest, RowOutput
from mlxarch.errors import QueueFull
from mlxarch.server.answers import answers as module
from mlxarch.server.answers.answers import Answers, Job, Mailbox
from mlxarch.server.answers.events import Delta, End, Waiting
from mlxarch.server.answers.reader import OutputReader
from mlxarch.server.http.errors import ApiError
from mlxarch.server.settings import MAX_UNREAD


class Handle:
    def __init__(self) -> None:
        self.cancelled = False
        self.paused = False
        self.pauses = 0

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.paused = False

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    """Accepts a number of requests, and delivers what it is told to from another thread."""

    def __init__(self, room: int = 10) -> None:
        self.room = room
        self.inlets: list[Any] = []
        self.handles: list[Handle] = []

    def submit(self, request: GenerationRequest, deliver: Any) -> Handle:
        if len(self.handles) >= self.room:
            raise QueueFull("full", 3.0)
        self.inlets.append(deliver)
        self.handles.append(Handle())
        return self.handles[-1]

    def deliver(self, *outputs: tuple[int, RowOutput]) -> None:
        def run() -> None:
            for index, output in outputs:
                self.inlets[index](output)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny)


def jobs(tokenizer: Tokenizer, count: int) -> list[Job]:
    request = GenerationRequest(prompt=(1,), max_tokens=5)
    return [Job(request, OutputReader(tokenizer, [1], ["stop"])) for _ in range(count)]


def make(engine: Any, tokenizer: Tokenizer, count: int = 1) -> Answers:
    return Answers(engine, Mailbox(asyncio.get_running_loop()), jobs(tokenizer, count), count)


def test_signs_of_life_come_while_nothing_else_does(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.01)
    engine = Engine()
    a = tokenizer.encode("a")[0]

    async def run():
        found = []
        async for index, event in make(engine, tokenizer).events():
            found.append((index, type(event)))
            if len(found) == 2:
                engine.deliver((0, RowOutput((a,))), (0, RowOutput((a,), finish_reason="length")))
        return found

    found = asyncio.run(run())
    assert found[:2] == [(0, Waiting), (0, Waiting)]
    kinds = [kind for _, kind in found if kind is not Waiting]
    assert kinds == [Delta, Delta, End]


def test_several_answers_end_one_by_one(tokenizer):
    engine = Engine()
    [a, b] = tokenizer.encode("ab")

    async def run():
        answers = make(engine, tokenizer, 2)
        engine.deliver(
            (0, RowOutput((a,))),
            (1, RowOutput((b,), finish_reason="stop")),
            (0, RowOutput((a,), finish_reason="length")),
        )
        events = [each async for each in answers.events()]
        return events, answers.usage

    events, usage = asyncio.run(run())
    ends = [(index, event.reason) for index, event in events if isinstance(event, End)]
    assert ends == [(1, "stop"), (0, "length")]
    assert (usage.prompt, usage.answer) == (1, 3)


def test_whoever_leaves_cancels_what_runs(tokenizer):
    engine = Engine()

    async def run():
        answers = make(engine, tokenizer, 2)
        task = asyncio.create_task(anext(answers.events()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert [handle.cancelled for handle in engine.handles] == [True, True]


def test_a_full_queue_leaves_no_half_of_a_request(tokenizer):
    engine = Engine(room=2)

    async def run():
        with pytest.raises(QueueFull):
            make(engine, tokenizer, 3)

    asyncio.run(run())
    assert [handle.cancelled for handle in engine.handles] == [True, True]


def test_an_answer_that_the_engine_ended_is_an_error(tokenizer):
    engine = Engine()

    async def run():
        answers = make(engine, tokenizer)
        engine.deliver((0, RowOutput(finish_reason="cancelled")))
        with pytest.raises(ApiError) as refusal:
            async for _ in answers.events():
                pass
        return refusal.value.status

    assert asyncio.run(run()) == 503


def test_a_stop_string_ends_the_request_in_the_engine(tokenizer):
    engine = Engine()

    async def run():
        answers = make(engine, tokenizer)
        engine.deliver((0, RowOutput(tuple(tokenizer.encode("a stop b")))))
        return [event async for _, event in answers.events()]

    events = asyncio.run(run())
    assert isinstance(events[-1], End)
    assert events[-1].stop_sequence == "stop"
    assert engine.handles[0].cancelled


def test_an_answer_pauses_while_its_client_is_behind(tokenizer):
    async def run():
        engine = Engine()
        answers = make(engine, tokenizer)
        token = tuple(tokenizer.encode("a"))
        engine.deliver(*[(0, RowOutput(token)) for _ in range(MAX_UNREAD - 1)])
        await asyncio.sleep(0)
        [handle] = engine.handles
        assert not handle.paused
        engine.deliver((0, RowOutput(token)))
        await asyncio.sleep(0)
        assert handle.paused
        events = answers.events()
        taken = 0
        while handle.paused:
            await anext(events)
            taken += 1
        assert taken == MAX_UNREAD // 2
        await events.aclose()
        assert handle.pauses == 1

    asyncio.run(run())
