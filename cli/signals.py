"""Termination signals: an exception in Python code, and the end of a process that does not react.

``raise_terminated`` raises an exception, so that cleanup runs as after Ctrl-C. Python raises it
only between two of its instructions. ``end_if_busy`` ends a process that computes for longer, as
SIGKILL would, which every file that mlxarch writes survives.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
KEPT = (
    "what is written so far is kept, if there is anything; the same command goes on from there, and "
    "repeats calibration and measurements"
)
GRACE_SECONDS = 0.3  # from a signal until a process that has not reacted is ended

Handler = Callable[[int, FrameType | None], object]
_reacted = threading.Event()
_notes: list[str] = []  # on the work under way, for a process that is ended by force


class Terminated(KeyboardInterrupt):
    """Raised by one of ``SIGNALS``: the command must end, even where Ctrl-C only stops a step.

    Attributes:
        exit_code: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Reacting:
    """Signal handler that lets ``end_if_busy`` know that it runs.

    Args:
        handler: function that handles the signal.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        _reacted.set()
        self._handler(number, frame)


@contextmanager
def raise_terminated() -> Iterator[None]:
    """Raise ``Terminated`` at the first of ``SIGNALS``; later ones do not interrupt the cleanup.

    Signals that the parent process ignores, as under ``nohup``, stay ignored. Outside the main
    thread, which alone may install handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    previous = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    handled = [number for number, handler in previous.items() if handler in usual]
    ending = False

    def terminate(number: int, _: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise Terminated(number)

    try:
        for number in handled:
            react = signal.default_int_handler if number == signal.SIGINT else terminate
            signal.signal(number, Reacting(react))
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


@contextmanager
def note_what_is_kept() -> Iterator[None]:
    """Say what a conversion or download that a signal ends leaves to the next run.

    An exception that says so itself is left alone.
    """
    _notes.append(KEPT)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not getattr(interrupt, "__notes__", ()):
            interrupt.add_note(KEPT)
        raise
    finally:
        _notes.remove(KEPT)


@contextmanager
def end_if_busy(end: Callable[[int], None] = os._exit) -> Iterator[None]:
    """End the process when a signal stays without reaction, or at a second termination signal.

    A thread waits for signals, because the main thread may be inside a computation of MLX. It acts
    where the handler of the signal is ``Reacting``. Where another library replaces the file
    descriptor that wakes the thread, as the line editor of a chat does, it rests.

    Args:
        end: called with the exit code in place of ending the process.
    """
    wake, written = os.pipe()
    os.set_blocking(written, False)
    previous = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    restore = _terminal_restorer()
    thread = threading.Thread(target=_watch, args=(wake, restore, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        if signal.set_wakeup_fd(previous) not in (written, -1):
            signal.set_wakeup_fd(previous)
        os.close(written)  # ends the thread


def _watch(wake: int, restore: Callable[[], None], end: Callable[[int], None]) -> None:
    terminations = 0
    while received := os.read(wake, 1):
        number = received[0]
        if not isinstance(signal.getsignal(number), Reacting):
            continue
        terminations += number in SIGNALS
        if terminations > 1 or not _reacted.wait(GRACE_SECONDS):
            restore()
            for note in _notes:
                os.write(2, f"\n{note}\n".encode())
            end(128 + number)
        _reacted.clear()
    os.close(wake)


def _terminal_restorer() -> Callable[[], None]:
    """Make a function that gives the terminal back its present settings, and shows the cursor."""
    import termios

    settings = None
    terminal = -1
    with suppress(AttributeError, ValueError, OSError, termios.error):
        terminal = sys.stdin.fileno()
        settings = termios.tcgetattr(terminal)

    def restore() -> None:
        if settings is None:
            return
        with suppress(OSError, termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, settings)
        with suppress(OSError, AttributeError, ValueError):
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\x1b[0m\r\n")

    return restore
