"""The ASGI application: paths, and the start and end of a server."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType

from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxarch.errors import EngineStopped
from mlxarch.server import metrics, openapi, status
from mlxarch.server.answers.answers import Mailbox
from mlxarch.server.api import tokenization
from mlxarch.server.api.anthropic import messages
from mlxarch.server.api.ollama import endpoints as ollama
from mlxarch.server.api.openai import chat, completions, models, responses
from mlxarch.server.http.access import AccessRules
from mlxarch.server.http.errors import ApiError
from mlxarch.server.http.gate import Gate
from mlxarch.server.served_models import Load, ServedModels
from mlxarch.server.server import Server
from mlxarch.server.settings import SHUTDOWN_SECONDS, Settings

logger = logging.getLogger("mlxarch.server")


def _routes() -> list[BaseRoute]:
    return [
        Route("/", status.start_page, methods=["GET"]),
        Route("/health", status.health, methods=["GET"]),
        Route("/metrics", metrics.metrics, methods=["GET"]),
        Route("/openapi.json", openapi.openapi, methods=["GET"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        *_with_and_without_v1("/models", models.list_models, "GET"),
        *_with_and_without_v1("/models/{name:path}", models.show_model, "GET"),
        *_with_and_without_v1("/chat/completions", chat.chat_completions, "POST"),
        *_with_and_without_v1("/completions", completions.completions, "POST"),
        *_with_and_without_v1("/embeddings", tokenization.embeddings, "POST"),
        *_with_and_without_v1("/messages", messages.create_message, "POST"),
        *_with_and_without_v1("/messages/count_tokens", messages.count_tokens, "POST"),
        *_with_and_without_v1("/responses", responses.create_response, "POST"),
        *_with_and_without_v1("/responses/{id}", responses.show_response, "GET"),
        *_with_and_without_v1("/responses/{id}", responses.delete_response, "DELETE"),
        *_with_and_without_v1("/responses/{id}/input_items", responses.list_input_items, "GET"),
        *ollama.routes(),
    ]


def _with_and_without_v1(path: str, endpoint: Callable[..., object], method: str) -> list[Route]:
    return [Route(prefix + path, endpoint, methods=[method]) for prefix in ("/v1", "")]


class App:
    """The application of one server process.

    Args:
        names: names of the models, the first one loaded at the start.
        load: loads a model by its name.
        settings: settings of the server.
        aliases: further names of the models, in lower case.
        on_death: called when an engine or the first load has failed; the process must end.

    Attributes:
        server: shared state; made when the application starts.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Load,
        settings: Settings,
        on_death: Callable[[], None] = lambda: None,
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._names = names
        self._load = load
        self._settings = settings
        self._on_death = on_death
        self._aliases = aliases
        self._router = Router(_routes(), redirect_slashes=False, lifespan=self._lifespan)
        self._gate = Gate(self._route, AccessRules(settings), self._methods)
        self.server: Server | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the start and end of the server."""
        await self._gate(scope, receive, send)

    def _methods(self, path: str) -> list[str]:
        """Methods that a path takes, in the order of the alphabet."""
        scope = {"type": "http", "path": path, "method": "GET", "root_path": ""}
        found: set[str] = set()
        for route in self._router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                found |= route.methods or set()
        return sorted(found)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self.server
        await self._router(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: ASGIApp) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        served = ServedModels(
            self._names, self._load, self._settings, self._engine_died, self._aliases
        )
        self.server = Server(self._settings, served, Mailbox(loop), time.time())
        served.default.state = "loading"
        tasks = [asyncio.create_task(self._load_first()), asyncio.create_task(self._unload_idle())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await served.close(0)

    async def begin_shutdown(self) -> None:
        """Refuse new requests, and let running ones end within ``SHUTDOWN_SECONDS``."""
        self._gate.closing = True
        if self.server is not None:
            await self.server.models.close(SHUTDOWN_SECONDS)

    async def _load_first(self) -> None:
        server = self.server
        assert server is not None
        first = server.models.default
        try:
            await server.models.load(first)
        except ApiError as error:
            server.death = first.error or error
            self._on_death()

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self.server is not None:
                await self.server.models.unload_idle()

    def _engine_died(self, error: BaseException) -> None:
        logger.error("an engine failed, so the server ends: %r", error)
        if self.server is not None:
            self.server.death = EngineStopped(f"an engine failed: {error!r}")
        self._on_death()
