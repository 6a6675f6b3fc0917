"""Life of a server process: loading, a failed engine, signals."""

import json
import signal
import socket
import threading
import time
from pathlib import Path

from live_server import running_server

DEAD_ENGINE = (
    "from mlxarch.engine.scheduler import Scheduler;"
    "Scheduler.turn = lambda self: 1 / 0;"
    "from mlxarch.cli.main import main; main()"
)
SLOW_LOAD = (
    "import time, mlxarch.language_model as lm; load = lm.load_folder;"
    "lm.load_folder = lambda *a, **k: (k['progress']('weights', 3, 6), time.sleep(1), load(*a, **k))[-1];"
    "from mlxarch.cli.main import main; main()"
)


def test_an_engine_that_fails_ends_the_process(tiny: Path):
    with running_server([tiny], command=("-c", DEAD_ENGINE, "serve")) as live:
        live.wait_until_ready()
        reply = live.chat()
        assert reply.status == 503
        assert reply.headers["x-should-retry"] == "false"
        health = live.get("/health")
        assert health.status == 503
        assert health.json["status"] == "error"
        assert live.process.wait(10) == 1
    assert any("ZeroDivisionError" in line for line in live.log)


def test_loading_shows_its_progress_and_a_signal_lets_answers_end(tiny: Path):
    with running_server([tiny], command=("-c", SLOW_LOAD, "serve")) as live:
        health = live.get("/health")
        while health.json.get("progress", {}).get("total") != 6:
            assert health.status == 503
            assert health.json["status"] == "loading"
            health = live.get("/health")
        assert health.json["progress"]["fraction"] == 0.5
        busy = live.chat()
        assert busy.status == 503
        assert "retry-after" in busy.headers
        live.wait_until_ready()
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100, "stream": True}
        replies = []
        asking = threading.Thread(
            target=lambda: replies.append(live.post("/v1/chat/completions", body))
        )
        asking.start()
        time.sleep(0.2)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(10) == 0
        asking.join()
    [reply] = replies
    assert reply.events[-1] == "[DONE]"


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path, tiny: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:100] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with running_server([broken]) as live:
        assert live.process.wait(20) == 1
    assert any("error:" in line for line in live.log)


def test_a_key_protects_a_server_and_a_signal_ends_an_endless_answer(tiny: Path):
    command = (
        "import mlxarch.server.settings as s; s.SHUTDOWN_SECONDS = 0.1;"
        "from mlxarch.cli.main import main; main()"
    )
    options = ("--api-key", "secret", "--lenient")
    with running_server([tiny], *options, command=("-c", command, "serve")) as live:
        while live.get("/health").status != 200:
            time.sleep(0.05)
        assert live.get("/health").json == {"status": "ok"}
        assert live.chat().status == 401
        key = {"authorization": "Bearer secret"}
        assert live.get("/health", **key).json["model"] == "tiny"
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "frobnicate": 1}
        reply = live.post("/v1/chat/completions", body, **key)
        assert reply.status == 200
        assert "frobnicate" in reply.json["warnings"][0]

        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1200, "stream": True}
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "x-api-key: secret\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", live.port), 20) as connection:
            connection.sendall(head.encode() + data)
            received = connection.recv(1000)
            live.process.send_signal(signal.SIGTERM)
            while block := connection.recv(65536):
                received += block
        assert live.process.wait(10) == 0
    assert b'data: {"error":{"message":' in received
    assert b"[DONE]" not in received
    assert not any("secret" in line for line in live.log)
