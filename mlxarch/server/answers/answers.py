"""Answers to the prompts of one HTTP request, as a stream of events on the event loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from mlxarch.engine.engine import Engine
from mlxarch.engine.request import GenerationRequest, RequestHandle, RowOutput
from mlxarch.server.answers.events import End, Event, Usage, Waiting
from mlxarch.server.answers.reader import OutputReader
from mlxarch.server.http.errors import ApiError
from mlxarch.server.settings import KEEP_ALIVE_SECONDS, MAX_UNREAD


class Mailbox:
    """Outputs on their way from engine threads to the event loop.

    One call wakes the loop for all outputs of a step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._items: list[tuple[Callable[[RowOutput], None], RowOutput]] = []

    def post(self, receive: Callable[[RowOutput], None], output: RowOutput) -> None:
        """Have ``receive(output)`` called on the event loop; safe from every thread."""
        with self._lock:
            self._items.append((receive, output))
            if len(self._items) > 1:
                return  # the loop has been woken already
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            items = self._items
            self._items = []
        for receive, output in items:
            receive(output)


@dataclass(frozen=True)
class Job:
    """One answer to generate: what the engine needs, and how to read its outputs."""

    request: GenerationRequest
    reader: OutputReader


class Answers:
    """Answers to one or several prompts, generated side by side.

    Iterate with ``events``; leaving the iteration cancels what is not finished.
    """

    def __init__(
        self, engine: Engine, mailbox: Mailbox, jobs: Sequence[Job], per_prompt: int = 1
    ) -> None:
        """Submit the requests.

        Args:
            engine: engine of the model.
            mailbox: way of outputs to the event loop.
            jobs: requests, those of one prompt next to each other.
            per_prompt: answers to each prompt.

        Raises:
            MlxArchError: as for ``Engine.submit``; nothing runs then.
        """
        self.readers = [job.reader for job in jobs]
        self._per_prompt = per_prompt
        self._outputs: deque[tuple[int, RowOutput]] = deque()
        self._unread = [0] * len(jobs)  # outputs of each answer that have not been taken
        self._arrived = asyncio.Event()
        self._handles: list[RequestHandle] = []
        try:
            for index, job in enumerate(jobs):
                self._handles.append(engine.submit(job.request, self._inlet(mailbox, index)))
        except BaseException:
            self.cancel()
            raise

    def _inlet(self, mailbox: Mailbox, index: int) -> Callable[[RowOutput], None]:
        def arrive(output: RowOutput) -> None:
            self._outputs.append((index, output))
            self._unread[index] += 1
            if self._unread[index] == MAX_UNREAD and index < len(self._handles):
                self._handles[index].pause()
            self._arrived.set()

        return lambda output: mailbox.post(arrive, output)

    def cancel(self) -> None:
        """End all requests that are not finished."""
        for handle in self._handles:
            handle.cancel()

    @property
    def count(self) -> int:
        """Number of answers."""
        return len(self.readers)

    @property
    def usage(self) -> Usage:
        """Token counts of all answers so far; a prompt counts once, however many answers it has."""
        total = Usage()
        for reader in self.readers[:: self._per_prompt]:
            total.prompt += reader.usage.prompt
            total.cached += reader.usage.cached
        for reader in self.readers:
            total.answer += reader.usage.answer
            total.thinking += reader.usage.thinking
        return total

    @property
    def first_difference(self) -> int | None:
        """Token of the first prompt from which on the prefix cache held something else."""
        return self.readers[0].first_difference

    @property
    def endings(self) -> list[End]:
        """Last events of the answers that have ended."""
        return [reader.end for reader in self.readers if reader.end is not None]

    def _take(self) -> tuple[int, RowOutput]:
        """Next output; a row that was paused goes on when half of its outputs have been taken."""
        index, output = self._outputs.popleft()
        self._unread[index] -= 1
        handle = self._handles[index]
        if handle.paused and self._unread[index] <= MAX_UNREAD // 2:
            handle.resume()
        return index, output

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield (index of the answer, event) until all answers have ended.

        Raises:
            MlxArchError: the model failed.
            ApiError: the server ended an answer because it shuts down.
        """
        open_answers = len(self.readers)
        try:
            while open_answers:
                if not self._outputs:
                    if not await self._wait():
                        yield 0, Waiting()
                    continue
                index, output = self._take()
                if output.finish_reason == "cancelled" and not self.readers[index].ended:
                    raise ApiError(503, "the answer was ended because the server shuts down")
                for event in self.readers[index].read(output):
                    if isinstance(event, End):
                        open_answers -= 1
                        self._handles[index].cancel()  # where a stop string ended it
                    yield index, event
        finally:
            self.cancel()

    async def _wait(self) -> bool:
        """Wait for an output; False if none came within ``KEEP_ALIVE_SECONDS``."""
        self._arrived.clear()
        if self._outputs:
            return True
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True
