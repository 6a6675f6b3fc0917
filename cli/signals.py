"""Signals that end the process raise, so that what is under way is put right as after Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """By one of ``SIGNALS``: other than after Ctrl-C, nobody is there to go on with.

    Attributes:
        exit_code: as a shell reports a process that the signal ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def raising() -> Iterator[None]:
    """Within, these signals raise Terminated: once, for a second one would end what the first one made tidy up.

    What the parent had ignored, as ``nohup`` does, stays ignored. Only the main thread may decide on signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
