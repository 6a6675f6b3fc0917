"""Entry point of the ``mlxarch`` command, and of ``python -m mlxarch``."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C ends the process without a traceback from its first import on."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlxarch.cli.main import main

    main()


if __name__ == "__main__":
    main()
