"""Termination signals raise an exception, so that cleanup runs as after Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """Raised by one of ``SIGNALS``: the command must end, even where Ctrl-C only stops a step.

    Attributes:
        exit_code: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def raise_terminated() -> Iterator[None]:
    """Raise ``Terminated`` at the first of ``SIGNALS``; later ones do not interrupt the cleanup.

    Signals that the parent process ignores, as under ``nohup``, stay ignored. Outside the main
    thread, which alone may install handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in previous.items() if handler == signal.SIG_DFL]

    def terminate(number: int, _: object) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for number in handled:
            signal.signal(number, terminate)
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])
