"""Hostile requests against a real process: each is refused, and a normal one succeeds after it."""

import contextlib
import json
import random
import socket
import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, running_server

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GOOD = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}'
# limits of seconds, short enough for a test
SHORT = (
    "import mlxarch.server.settings as s; s.HEADER_SECONDS = 0.5; s.BODY_SECONDS = 0.5;"
    "s.MAX_REQUESTS = 4;"
    "from mlxarch.cli.main import main; main()"
)


def exchange(port: int, data: bytes, timeout: float = 10) -> bytes:
    """Send bytes and read until the server closes or the time is over."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(data)
        received = b""
        try:
            while block := connection.recv(65536):
                received += block
                if b"\r\n\r\n" in received and b"Connection: close" not in received:
                    head, _, body = received.partition(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                    if length.isdigit() and len(body) >= int(length):
                        break
        except (TimeoutError, ConnectionResetError):
            pass
        return received


@pytest.mark.parametrize(
    "request_text",
    [
        "GARBAGE\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        HEAD + "Content-Length: -1\r\n\r\n",
        HEAD + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + "Content-Length: 10000000000\r\n\r\n",
        HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + "Transfer-Encoding: gzip\r\n\r\n",
        HEAD + "X: " + "a" * 200_000 + "\r\n\r\n",
        HEAD + "".join(f"X-{n}: 1\r\n" for n in range(3000)) + "\r\n",
        HEAD + "Bad Header: 1\r\n\r\n",
        HEAD + "Content-Length: 2\r\n\r\n{]",
        HEAD + 'Content-Length: 13\r\n\r\n{"seed": NaN}',
        "DELETE /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "CONNECT evil.com:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_a_malformed_request_is_refused_in_the_form_of_the_api(server: LiveServer, request_text):
    reply = exchange(server.port, request_text.encode("latin-1"))
    status = int(reply.split(b" ", 2)[1])
    assert 400 <= status < 500
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "/root" not in error["message"] and "Traceback" not in error["message"]
    assert server.chat().status == 200


def test_a_body_that_is_too_large_is_refused_while_it_arrives(server: LiveServer):
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode())
        try:
            for _ in range(40):
                connection.sendall(chunk)
            answer = connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""  # closed before all was sent
    assert answer == b"" or b" 413 " in answer
    assert server.chat().status == 200


def test_a_refusal_before_the_body_is_read_reaches_the_client(server: LiveServer):
    body = b"x" * 3_000_000
    for path, status in (("/v1/chat/completions", 415), ("/health", 405), ("/nothing", 404)):
        for _ in range(5):
            reply = server.request("POST", path, body, {"content-type": "text/plain"})
            assert reply.status == status, path
    head = f"{HEAD}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    early = exchange(server.port, head.replace("application/json", "text/plain").encode())
    assert early.startswith(b"HTTP/1.1 415 ")  # without asking for the body first


def test_random_bodies_never_harm(server: LiveServer):
    """Every field that the server describes, with values of every kind."""
    described = server.get("/openapi.json").json
    schemas = described["components"]["schemas"]
    draw = random.Random(7)
    user = [{"role": "user", "content": "hi"}]
    sound = {"model": "tiny", "messages": user, "input": "hi", "prompt": "hi", "tokens": [5], "content": "hi",
             "max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}}  # fmt: skip
    names = ["type", "role", "content", "text", "function", "name", "id", "schema"]

    def value(depth: int = 0):
        kinds = [None, True, -1, 0, 2**70, 1.5, 1e300, "", "ü\0", "<|user|>", "text", "auto"]
        if depth < 3 and draw.random() < 0.5:
            items = [value(depth + 1) for _ in range(draw.randrange(3))]
            return draw.choice([items, {draw.choice(names): item for item in items}])
        return draw.choice([*kinds, "".join(draw.choices(string.printable, k=5))])

    statuses = set()
    for path, operations in described["paths"].items():
        if "post" not in operations:
            continue
        content = operations["post"]["requestBody"]["content"]["application/json"]
        fields = list(schemas[content["schema"]["$ref"].rpartition("/")[2]]["properties"])
        for _ in range(25):
            body = {name: given for name, given in sound.items() if name in fields}
            body |= {draw.choice(fields): value() for _ in range(2)}
            for limit in ("max_tokens", "max_output_tokens", "options"):
                if limit in fields and not body.get(limit):
                    body[limit] = sound[limit]
            reply = server.post(path, body)
            statuses.add(reply.status)
            assert reply.status in (200, 400, 404), (path, body, reply.body)
    assert {200, 400} <= statuses
    assert server.chat().status == 200


@pytest.fixture(scope="module")
def hasty(tiny: Path) -> Iterator[LiveServer]:
    """A server with limits of half a second, and of four requests at a time."""
    with running_server([tiny], command=("-c", SHORT, "serve")) as live:
        live.wait_until_ready()
        yield live


def test_slow_clients_are_closed_and_harm_nobody(hasty: LiveServer):
    slow = [socket.create_connection(("127.0.0.1", hasty.port), 10) for _ in range(150)]
    for connection in slow:
        connection.sendall(b"GET / HT")
    assert hasty.chat().status == 200
    deadline = time.monotonic() + 10
    for connection in slow:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(hasty: LiveServer):
    reply = exchange(hasty.port, (HEAD + "Content-Length: 100\r\n\r\n{").encode())
    assert b" 408 " in reply.split(b"\r\n")[0]


def test_too_many_requests_at_a_time_are_told_to_come_back(hasty: LiveServer):
    body = json.dumps(json.loads(GOOD) | {"max_tokens": 1200, "stream": True})
    request = f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    held = [socket.create_connection(("127.0.0.1", hasty.port), 10) for _ in range(4)]
    for connection in held:
        connection.sendall(request)
        connection.recv(100)
    reply = hasty.chat()
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json["error"]["type"] == "overloaded"
    assert hasty.get("/health").status == 200
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 20
    while hasty.chat().status != 200:
        assert time.monotonic() < deadline
