"""A server in a process of its own, and a client of a few lines that hides nothing."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


@dataclass
class Reply:
    """Status, headers in lower case and body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Values of the data lines of a stream of events."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class LiveServer:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: list[str] = field(default_factory=list)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request on a connection of its own; ``body`` is bytes, or a value for JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {} if data is None else {"content-type": "application/json"}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, given | (headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, None, headers)

    def chat(self, text: str = "hi", **fields: Any) -> Reply:
        """Ask for a short greedy answer."""
        message = {"role": "user", "content": text}
        body = {"messages": [message], "max_tokens": 6, "temperature": 0}
        return self.post("/v1/chat/completions", body | fields)

    def wait_until_ready(self) -> None:
        for _ in range(600):
            if self.get("/health").status == 200:
                return
            time.sleep(0.05)
        raise AssertionError("the server is not ready:\n" + "\n".join(self.log))


@contextmanager
def running_server(
    models: Sequence[Path], *options: str, command: Sequence[str] = ("-m", "mlxarch", "serve")
) -> Iterator[LiveServer]:
    """Start a server on a free port, and end it after the block."""
    arguments = [*map(str, models), "--port", "0", *options]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    log: list[str] = []
    found: list[int] = []
    listening = threading.Event()

    def follow() -> None:
        for line in process.stderr or ():
            log.append(line.rstrip())
            if match := re.search(r"listening on http://\S+:(\d+)$", line.rstrip()):
                found.append(int(match[1]))
                listening.set()
        listening.set()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        listening.wait(60)
        assert found, "the server did not start:\n" + "\n".join(log)
        yield LiveServer(process, found[0], log)
    finally:
        process.terminate()
        process.wait(15)
        follower.join(5)
        if process.stderr:
            process.stderr.close()
