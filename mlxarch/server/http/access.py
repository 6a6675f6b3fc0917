"""Rules of access: Host and Origin headers, API keys, and form of a request's head."""

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from mlxarch.errors import InvalidInput
from mlxarch.server.http.errors import ApiError
from mlxarch.server.settings import MAX_BODY_BYTES, MAX_HEADERS, Settings

CORS_HEADERS = (
    "authorization, content-type, x-api-key, anthropic-version, anthropic-beta, "
    "anthropic-dangerous-direct-browser-access, x-session-id, x-session-affinity, "
    "x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, "
    "x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, "
    "x-stainless-poll-helper, x-stainless-retry-count, x-stainless-runtime, "
    "x-stainless-runtime-version, x-stainless-timeout"
)
_APP_SCHEMES = ("app", "tauri", "vscode-webview")  # of pages inside of desktop programs
_OPEN_PATHS = ("/", "/health", "/favicon.ico")  # they tell nothing that needs a key


def check_bind(settings: Settings) -> None:
    """Refuse to serve other machines without a key.

    Raises:
        InvalidInput: the address is not one of this machine alone, and there is no key.
    """
    if not is_loopback(settings.host) and not settings.api_keys:
        raise InvalidInput(
            f"--host {settings.host} serves other machines, which needs --api-key KEY (or "
            "MLXARCH_API_KEY); without a key the server listens on 127.0.0.1 only"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, is this machine itself."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class AccessRules:
    """Checks of a request's head."""

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allowed_origins)
        self._local = is_loopback(settings.host)

    def check(self, method: str, path: str, headers: Headers, *, takes_post: bool = True) -> None:
        """Refuse a request by its head.

        Args:
            method: method of the request.
            path: its path.
            headers: its headers.
            takes_post: whether the path takes a POST; otherwise that is what is wrong with one.

        Raises:
            ApiError: 400, 401, 403, 413, 415 or 431.
        """
        self._check_form(headers)
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and not self.allows_origin(origin):
            raise ApiError(
                403,
                "web pages of this origin may not call the server; allow it with --allowed-origins",
            )
        if method == "OPTIONS":
            return
        if path not in _OPEN_PATHS:
            self._check_key(headers)
        if method == "POST" and takes_post and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")

    def has_key(self, headers: Headers) -> bool:
        """Whether a request presents a key, or none is needed."""
        if not self._keys:
            return True
        bearer = headers.get("authorization", "")
        scheme, _, token = bearer.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # every key is compared, so that the time does not tell which one was nearly right
        matches = [hmac.compare_digest(key, given.encode()) for key in self._keys]
        return any(matches)

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of an origin may call the server."""
        origin = origin.rstrip("/").lower()
        if origin in self._origins:
            return True
        try:
            parts = urlsplit(origin)
            host = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme in _APP_SCHEMES:
            return True
        return parts.scheme in ("http", "https") and is_loopback(host)

    def _check_key(self, headers: Headers) -> None:
        if not self.has_key(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or "
                "`x-api-key: KEY`",
                code="invalid_api_key",
            )

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        if len(given) != 1:
            raise ApiError(400, "a request has exactly one Host header")
        host = _without_port(given[0])
        if host in self._hosts or (self._local and is_loopback(host)):
            return
        if self._local or self._hosts:
            raise ApiError(
                403, "this Host is not one of the server's; allow it with --allowed-hosts"
            )

    @staticmethod
    def _check_form(headers: Headers) -> None:
        if len(headers.raw) > MAX_HEADERS:
            raise ApiError(
                431, f"the request has {len(headers.raw)} headers; at most {MAX_HEADERS} are read"
            )
        length = headers.get("content-length")
        if length is not None and "transfer-encoding" in headers:
            raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other")
        if length is not None and length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise body_too_large()


def body_too_large() -> ApiError:
    """Error 413 with the limit of bodies."""
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes, the most that is read")


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _without_port(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def cors_headers(origin: str | None, methods: Iterable[str] = ()) -> list[tuple[bytes, bytes]]:
    """Headers that let a page of an allowed origin read a response."""
    if origin is None:
        return []
    headers = [
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", "x-request-id, request-id, retry-after"),
        ("vary", "Origin"),
    ]
    if methods:
        headers += [
            ("access-control-allow-methods", ", ".join(methods)),
            ("access-control-allow-headers", CORS_HEADERS),
            ("access-control-max-age", "600"),
        ]
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
