"""Many clients at once: each gets the answer that it would get alone, and leaves nothing behind."""

import json
import random
import threading
import time
from http.client import HTTPConnection

from live_server import LiveServer


def ask(server: LiveServer, client: int, round: int) -> str:
    """Ask through one of the APIs; the answer depends on client and round only."""
    text = f"{client} {round} " * (1 + client)
    user = [{"role": "user", "content": text}]
    kind = (client + round) % 4
    if kind == 0:
        reply = server.chat(text, max_tokens=12, seed=client, temperature=1.0)
        return reply.json["choices"][0]["message"]["content"]
    if kind == 1:
        body = {"messages": user, "max_tokens": 12, "temperature": 0, "stream": True}
        events = server.post("/v1/messages", body).events
        return "".join(event.get("delta", {}).get("text", "") for event in events)
    if kind == 2:
        body = {"input": text, "max_output_tokens": 12, "temperature": 0}
        return server.post("/v1/responses", body).json["output"][0]["content"][0]["text"]
    options = {"num_predict": 12, "seed": round, "temperature": 1.0}
    body = {"model": "tiny", "messages": user, "stream": False, "options": options}
    return server.post("/api/chat", body).json["message"]["content"]


def leave(server: LiveServer, draw: random.Random) -> None:
    """Ask for a long answer, and leave after a moment."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000}
    body["stream"] = draw.random() < 0.5
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    time.sleep(draw.random() * 0.2)
    connection.close()


def running(server: LiveServer) -> float:
    lines = server.get("/metrics").body.decode().splitlines()
    return sum(
        float(line.split()[1])
        for line in lines
        if line.startswith(("vllm:num_requests_running ", "vllm:num_requests_waiting "))
    )


def test_answers_do_not_mix_while_others_come_and_leave(server: LiveServer):
    clients = range(6)
    rounds = range(4)
    expected = {(c, r): ask(server, c, r) for c in clients for r in rounds}
    assert len(set(expected.values())) >= 8  # they do differ
    wrong: list[tuple[int, int]] = []
    stop = threading.Event()

    def client(number: int) -> None:
        for round in rounds:
            if ask(server, number, round) != expected[number, round]:
                wrong.append((number, round))

    def leaver() -> None:
        draw = random.Random(1)
        while not stop.is_set():
            leave(server, draw)

    threads = [threading.Thread(target=client, args=(number,)) for number in clients]
    disturbing = threading.Thread(target=leaver)
    disturbing.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    disturbing.join()
    assert not wrong
    deadline = time.monotonic() + 10
    while running(server):
        assert time.monotonic() < deadline, "a client that has left still has its place"
        time.sleep(0.05)
