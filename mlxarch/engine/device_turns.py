"""Turns of engines on one device: at most one model computes at a time."""

import threading
from collections import deque
from types import TracebackType


class DeviceTurns:
    """Lock whose holders take turns in the order in which they asked for it.

    An ordinary lock would be taken again at once by the engine that has just released it. Two models
    that compute at once would need the working memory of both, and neither would be faster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for its turn."""
        return bool(self._waiting)

    def __enter__(self) -> "DeviceTurns":
        with self._lock:
            if not self._taken:
                self._taken = True
                return self
            called = threading.Event()
            self._waiting.append(called)
        called.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


DEVICE_TURNS = DeviceTurns()
"""Turns of all engines of this process, which compute on one device."""
