"""Who may call: Host, Origin, keys, and the form of a request's head."""

import itertools

import pytest
from live_server import LiveServer
from starlette.datastructures import Headers

from mlxarch.errors import InvalidInput
from mlxarch.server.http.access import AccessRules, check_bind
from mlxarch.server.http.errors import ApiError
from mlxarch.server.settings import Settings

LOCAL_HOSTS = [
    "localhost", "localhost:8000", "LOCALHOST", "app.localhost:1", "127.0.0.1", "127.0.0.1:8000",
    "127.8.9.10", "[::1]", "[::1]:8000", "localhost.",
]  # fmt: skip
OTHER_HOSTS = [
    "evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com", "192.168.1.5",
    "10.0.0.1", "0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "", ":8000", "evillocalhost", "127.1.evil",
    "localhost@evil.com", "evil.com/localhost", "[fe80::1]", "169.254.169.254", "a.b.c",
]  # fmt: skip
LOCAL_ORIGINS = [
    None, "http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173", "app://x", "tauri://localhost",
    "vscode-webview://abc",
]  # fmt: skip
OTHER_ORIGINS = [
    "http://evil.com", "https://localhost.evil.com", "null", "file://", "", "http://", "ftp://localhost",
    "http://192.168.0.2", "http://[",
]  # fmt: skip
JSON = "application/json"


def status(rules: AccessRules, method: str = "POST", path: str = "/v1/x", **headers: str) -> int:
    """Status of a refusal; 0 if the head is accepted."""
    given = {"host": "localhost", "content-type": JSON}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    try:
        rules.check(method, path, Headers(raw=raw))
    except ApiError as error:
        return error.status
    return 0


def test_only_local_names_and_origins_pass():
    rules = AccessRules(Settings())
    for host, origin in itertools.product(LOCAL_HOSTS + OTHER_HOSTS, LOCAL_ORIGINS + OTHER_ORIGINS):
        for kind in (JSON, "text/plain"):
            extra = {} if origin is None else {"origin": origin}
            local = host in LOCAL_HOSTS and origin in LOCAL_ORIGINS
            expected = 403
            if local:
                expected = 0 if kind == JSON else 415
            assert status(rules, host=host, content_type=kind, **extra) == expected, (host, origin)


def test_further_names_and_origins_can_be_allowed():
    rules = AccessRules(
        Settings(
            allowed_hosts=frozenset({"mac.lan"}),
            allowed_origins=frozenset({"https://chat.example.org"}),
        )
    )
    assert status(rules, host="mac.lan:8000", origin="https://chat.example.org") == 0
    assert status(rules, host="mac.lan.evil.com") == 403
    assert status(rules, origin="https://chat.example.org.evil.com") == 403
    assert status(rules, origin="http://chat.example.org") == 403


def test_a_key_is_asked_for_everywhere_but_on_the_health_page():
    rules = AccessRules(Settings(api_keys=("secret", "other")))
    assert status(rules) == 401
    assert status(rules, authorization="Bearer wrong") == 401
    assert status(rules, authorization="Basic secret") == 401
    assert status(rules, x_api_key="secre") == 401
    assert status(rules, authorization="Bearer é") == 401
    assert status(rules, authorization="Bearer secret") == 0
    assert status(rules, authorization="bearer other") == 0
    assert status(rules, x_api_key="other") == 0
    assert status(rules, "GET", "/health") == 0
    assert status(rules, "GET", "/metrics") == 401


def test_a_head_of_a_wrong_form_is_refused():
    rules = AccessRules(Settings())
    assert status(rules, content_length="1", transfer_encoding="chunked") == 400
    assert status(rules, content_length=str(10**10)) == 413
    assert status(rules, content_type="application/json; charset=utf-8") == 0
    assert status(rules, **{f"x_{n}": "1" for n in range(200)}) == 431
    with pytest.raises(ApiError, match="exactly one Host"):
        rules.check("GET", "/", Headers(raw=[]))
    twice = [(b"host", b"localhost")] * 2
    with pytest.raises(ApiError, match="exactly one Host"):
        rules.check("GET", "/", Headers(raw=twice))


def test_other_machines_are_not_served_without_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.2", "mac.lan", ""):
        with pytest.raises(InvalidInput, match="--api-key"):
            check_bind(Settings(host=host))
        check_bind(Settings(host=host, api_keys=("k",)))
    check_bind(Settings(host="127.0.0.1"))
    check_bind(Settings(host="::1"))


def test_the_process_applies_the_rules(server: LiveServer):
    assert server.get("/v1/models", host="evil.com").status == 403
    assert server.get("/v1/models", origin="http://evil.com").status == 403
    reply = server.get("/v1/models", origin="http://localhost:3000")
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert reply.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in reply.headers
    preflight = server.request("OPTIONS", "/v1/chat/completions", None, {"origin": "http://[::1]"})
    assert preflight.status == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["access-control-allow-origin"] == "http://[::1]"
    assert server.request("OPTIONS", "/v1/models", None, {"origin": "http://a.b"}).status == 403
    text = server.request("POST", "/v1/chat/completions", b"{}", {"content-type": "text/plain"})
    assert text.status == 415


def test_a_path_tells_its_own_methods(server: LiveServer):
    preflight = server.request("OPTIONS", "/v1/responses/x", None, {"origin": "http://localhost"})
    assert preflight.status == 204
    assert preflight.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert preflight.headers["access-control-allow-methods"] == preflight.headers["allow"]
    assert server.request("OPTIONS", "/v1/chat/completions").headers["allow"] == "POST, OPTIONS"
    assert server.request("OPTIONS", "/v1/nothing").status == 404
    refused = server.request("PUT", "/v1/responses/x", {})
    assert refused.status == 405
    assert refused.headers["allow"] == "DELETE, GET, HEAD"


def test_the_client_decides_on_the_form_of_errors_where_the_path_does_not(server: LiveServer):
    version = {"anthropic-version": "2023-06-01"}
    for path in ("/v1/models/nothing", "/v1/nothing"):
        assert server.request("GET", path, None, version).json["type"] == "error"
        assert set(server.get(path).json) == {"error"}
    chat = server.request("POST", "/v1/chat/completions", {}, version).json
    assert set(chat["error"]) == {"message", "type", "param", "code"}
