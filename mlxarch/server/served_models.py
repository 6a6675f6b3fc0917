"""Models of a server: loaded when they are asked for, unloaded when they are idle.

Only names of the start-up list exist; a request can never name a path or a repository.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from mlxarch.engine.engine import Engine
from mlxarch.errors import MemoryBudgetError, MlxArchError, TokenizerError
from mlxarch.generation.sampling import Sampling
from mlxarch.hub.catalog import normalize_name
from mlxarch.language_model import LanguageModel
from mlxarch.progress import Progress
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, to_api_error
from mlxarch.server.settings import Settings

logger = logging.getLogger("mlxarch.server")

Load = Callable[[str, Progress], LanguageModel]
State = Literal["unloaded", "loading", "loaded", "failed"]


@dataclass
class ServedModel:
    """One model of the start-up list.

    Attributes:
        name: name that clients use.
        created: Unix time of the server's start.
        state: whether it is in memory.
        step: step of loading, with bytes done and in all.
        model: the loaded model; None while it is unloaded.
        engine: its engine.
        sampling: sampling where a request names nothing.
        error: why it could not be loaded.
        users: requests that use it.
        keep_seconds: idle time after which it is unloaded; negative keeps it.
        last_used: value of ``time.monotonic`` at the end of the last request.
    """

    name: str
    created: int
    keep_seconds: float
    state: State = "unloaded"
    step: tuple[str, int, int] = ("", 0, 0)
    model: LanguageModel | None = None
    engine: Engine | None = None
    sampling: Sampling = field(default_factory=Sampling)
    error: MlxArchError | None = None
    users: int = 0
    last_used: float = 0.0
    load_seconds: float = 0.0

    @property
    def language_model(self) -> LanguageModel:
        """The loaded model.

        Raises:
            ApiError: it is not loaded.
        """
        if self.model is None:
            raise ApiError(503, f"{self.name} is not loaded", retry_after=1)
        return self.model

    @property
    def running_engine(self) -> Engine:
        """The engine of the loaded model.

        Raises:
            ApiError: it is not loaded.
        """
        if self.engine is None:
            raise ApiError(503, f"{self.name} is not loaded", retry_after=1)
        return self.engine

    @property
    def expires_in(self) -> float | None:
        """Seconds until it is unloaded if nobody asks; None if it is kept."""
        if self.keep_seconds < 0:
            return None
        return max(0.0, self.last_used + self.keep_seconds - time.monotonic())

    def describe_progress(self) -> dict[str, Any]:
        """State of loading, for health reports."""
        label, done, total = self.step
        share = round(done / total, 4) if total else 0.0
        return {"step": label, "done": done, "total": total, "fraction": share}


class ServedModels:
    """The models of a server.

    Args:
        names: names of the start-up list, the default model first.
        load: loads a model by its name; called on a thread of its own, one at a time.
        settings: settings of the server.
        on_death: called on the event loop when an engine has failed.
        aliases: further names of models, in lower case.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Load,
        settings: Settings,
        on_death: Callable[[BaseException], None],
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        now = int(time.time())
        self._models = {name: ServedModel(name, now, settings.idle_seconds) for name in names}
        self._load = load
        self._settings = settings
        self._on_death = on_death
        self._aliases = aliases
        self._loading = asyncio.Lock()
        self.texts = ThreadPoolExecutor(2, "mlxarch-text")  # templates, tokenizers, grammars

    def all(self) -> list[ServedModel]:
        """All models of the start-up list."""
        return list(self._models.values())

    @property
    def default(self) -> ServedModel:
        """First model of the start-up list."""
        return next(iter(self._models.values()))

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name; None or "default" is the first one.

        Raises:
            ApiError: 404; the message lists the names.
        """
        if name is None or name in ("", "default"):
            return self.default
        text = name.removesuffix(":latest")
        for spelling in (name, text, self._aliases.get(text.lower(), text)):
            if spelling in self._models:
                return self._models[spelling]
        wanted, bits = normalize_name(text)
        for served in self.all():
            other, others_bits = normalize_name(served.name)
            if wanted == other and (bits == others_bits or bits is None or others_bits is None):
                return served
        known = ", ".join(self._models)
        raise ApiError(
            404,
            f"this server has no model of that name; it has: {known}",
            code="model_not_found",
            param="model",
        )

    async def acquire(self, name: str | None, context: RequestContext) -> ServedModel:
        """Return a loaded model that stays loaded until the request has ended.

        Raises:
            ApiError: no such model, or it cannot be loaded.
        """
        served = self.find(name)
        served.users += 1
        context.cleanup.callback(self._release, served)
        context.log["model"] = served.name
        if served.state != "loaded":
            if served.state == "loading" and not served.load_seconds and served is self.default:
                raise ApiError(503, f"{served.name} is being loaded", retry_after=2)
            await self.load(served)
        return served

    def _release(self, served: ServedModel) -> None:
        served.users -= 1
        served.last_used = time.monotonic()

    async def load(self, served: ServedModel) -> None:
        """Load a model, unless it is; others are unloaded if it does not fit beside them.

        Raises:
            ApiError: it cannot be loaded.
        """
        async with self._loading:
            if served.state == "loaded":
                return
            served.state = "loading"
            served.keep_seconds = self._settings.idle_seconds
            started = time.monotonic()
            try:
                await self._load_beside_others(served)
            except Exception as error:
                served.state = "failed"
                known = isinstance(error, MlxArchError)
                served.error = error if known else ApiError(500, "loading the model failed")
                logger.error("loading %s failed: %s", served.name, error, exc_info=not known)
                raise to_api_error(served.error) from error
            served.state = "loaded"
            served.error = None
            served.last_used = time.monotonic()
            served.load_seconds = served.last_used - started
            logger.info("%s loaded in %.1f s", served.name, served.load_seconds)

    async def _load_beside_others(self, served: ServedModel) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await _in_daemon(partial(self._load_now, served, loop))
                return
            except MemoryBudgetError:
                idle = [
                    each
                    for each in self.all()
                    if each.state == "loaded" and each.users == 0 and each is not served
                ]
                if not idle:
                    raise
                await self.unload(min(idle, key=lambda each: each.last_used))

    def _load_now(self, served: ServedModel, loop: asyncio.AbstractEventLoop) -> None:
        def report(label: str, done: int, total: int) -> None:
            served.step = (label, done, total)

        def on_death(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._on_death, error)

        model = self._load(served.name, report)
        served.sampling = model.recommended_sampling
        served.step = ("preparing grammars", 0, 1)
        with contextlib.suppress(TokenizerError):  # grammars of such a model are refused later on
            model.grammars.prepare()
        most = self._settings.prefix_cache_bytes
        limits = {} if most is None else {"prefix_cache_bytes": most}
        engine = model.engine(
            **limits,
            max_rows=self._settings.parallel,
            max_waiting=self._settings.max_waiting,
            deterministic=self._settings.deterministic,
            prefix_cache_dir=self._settings.prefix_cache_dir,
            on_death=on_death,
        )
        engine.wait_until_ready()
        served.engine = engine
        served.model = model

    async def unload(self, served: ServedModel) -> None:
        """Unload a model that no request uses."""
        if served.state != "loaded" or served.users:
            return
        engine = served.engine
        served.state = "unloaded"
        served.engine = None
        served.model = None
        if engine is not None:
            await _in_daemon(engine.close)
        logger.info("%s unloaded", served.name)

    async def unload_idle(self) -> None:
        """Unload the models that nobody has asked for longer than they are kept."""
        for served in self.all():
            expired = served.expires_in == 0.0
            if served.state == "loaded" and expired and not served.users:
                await self.unload(served)

    async def close(self, timeout: float) -> None:
        """End all engines; running requests get ``timeout`` seconds to finish."""
        engines = [served.engine for served in self.all() if served.engine is not None]
        closing = [_in_daemon(partial(engine.close, timeout)) for engine in engines]
        await asyncio.gather(*closing)
        self.texts.shutdown(wait=False, cancel_futures=True)


async def _in_daemon(function: Callable[[], None]) -> None:
    """Run a function on a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            function()
        except BaseException as problem:
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="mlxarch-load", daemon=True).start()
    await future
