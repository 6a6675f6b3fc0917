"""Settings and limits of a server process."""

from dataclasses import dataclass, field
from pathlib import Path

MAX_BODY_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 64 * 2**10
MAX_HEADERS = 100
MAX_JSON_DEPTH = 64
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0
STALLED_SECONDS = 30.0  # without a byte read by the client
MAX_UNREAD = 512  # outputs of an answer that its client has not taken, before the answer pauses
MAX_REQUESTS = 64  # answered at the same time; more are refused with 503
MAX_CONNECTIONS = 1024  # open sockets, idle ones included
KEEP_ALIVE_SECONDS = 10.0  # between signs of life on a stream without tokens
SHUTDOWN_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server process.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        api_keys: keys of which a request must present one; empty asks for none.
        allowed_hosts: names that a Host header may have beside those of this machine.
        allowed_origins: origins of web pages that may call the server beside local ones.
        lenient: whether unknown fields of a request become warnings instead of errors.
        parallel: requests of one model that run at the same time.
        max_waiting: further requests that may wait.
        max_tokens: limit of answers whose request names none; None allows them the whole context.
        idle_seconds: idle time after which a model is unloaded; a negative number keeps it.
        deterministic: whether an answer's bits must not depend on other requests.
        prefix_cache_bytes: most memory of the caches of earlier prompts; None allows them what the
            running requests leave.
        prefix_cache_dir: folder where caches of prompts outlive the process; None keeps them in
            memory only.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] = field(default_factory=frozenset)
    allowed_origins: frozenset[str] = field(default_factory=frozenset)
    lenient: bool = False
    parallel: int = 8
    max_waiting: int = 64
    max_tokens: int | None = None
    idle_seconds: float = 600.0
    deterministic: bool = False
    prefix_cache_bytes: int | None = None
    prefix_cache_dir: Path | None = None
