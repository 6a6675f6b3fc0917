"""Run a server process: sockets, signals, log, and the exit status."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, MappingProxyType

import uvicorn

from mlxarch.errors import MlxArchError
from mlxarch.server.app import App
from mlxarch.server.http.access import check_bind
from mlxarch.server.http.protocol import LimitedProtocol
from mlxarch.server.served_models import Load
from mlxarch.server.settings import MAX_HEADER_BYTES, SHUTDOWN_SECONDS, Settings

_DEATH_SECONDS = 1.0  # in which /health tells that an engine has failed


class ServeError(MlxArchError):
    """The server cannot listen on its address."""


class _Process(uvicorn.Server):
    """uvicorn's server, which lets running answers end before it closes."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: refuse new requests, wait for running ones, close."""
        if not self.force_exit:
            ending = asyncio.create_task(self._app.begin_shutdown())
            await asyncio.wait({ending}, timeout=SHUTDOWN_SECONDS + 1)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after a signal; at the second one, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def end_soon(self) -> None:
        """End shortly, so that /health can tell why."""
        loop = asyncio.get_running_loop()
        loop.call_later(_DEATH_SECONDS, setattr, self, "should_exit", True)


def serve(
    names: Sequence[str],
    load: Load,
    settings: Settings,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Serve models until a signal ends the process.

    Args:
        names: names of the models, the first one loaded at the start.
        load: loads a model by its name.
        settings: settings of the server.
        aliases: further names of the models, in lower case.

    Raises:
        InvalidInput: other machines would be served without a key.
        ServeError: the address cannot be listened on.
        MlxArchError: the first model cannot be loaded.
        EngineStopped: an engine failed while the server ran.
    """
    check_bind(settings)
    _log_to_stderr()
    processes: list[_Process] = []
    app = App(names, load, settings, lambda: processes[0].end_soon(), aliases)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=LimitedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
    )
    process = _Process(config, app)
    processes.append(process)
    listener = _bind(settings)
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    logging.getLogger("mlxarch.server").info("listening on http://%s:%d", host, address[1])
    process.run(sockets=[listener])
    if app.server is not None and app.server.death is not None:
        raise app.server.death


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {settings.host} port {settings.port}: {error}. Another server may "
            "run there; --port takes another port, and 0 a free one"
        ) from error
    return listener


def _log_to_stderr() -> None:
    """Write the server's log to standard error, one line a request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    for name, level in (("mlxarch.server", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
