"""Measure a server: clients that leave, answers that must not mix, the prefix cache, and a soak.

    python benchmarks/server.py leave MODEL
    python benchmarks/server.py mix MODEL
    python benchmarks/server.py prefix MODEL --tokens 2000
    python benchmarks/server.py soak MODEL --minutes 10

Each starts ``mlxarch serve`` on a free port with a cache folder of its own, and passes on the options
that it does not know, such as ``--kv-bits 8``. Times on a machine that does other work are noisy.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any


class Client:
    """Requests to the server on a port."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

    def connect(self, method: str, path: str, body: Any = None) -> HTTPConnection:
        """Send a request, and leave the answer unread."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=1800)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"})
        return connection

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request; gives the decoded answer, or the text of one that is no JSON."""
        connection = self.connect(method, path, body)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {text[:300]}")
        return json.loads(text) if text.startswith("{") else text

    def figures(self) -> dict[str, float]:
        """Figures of /metrics by name."""
        lines = self.ask("GET", "/metrics").splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("vllm:"): float(value) for name, value in pairs}

    def busy(self) -> float:
        """Requests that run or wait."""
        figures = self.figures()
        return figures["num_requests_running"] + figures["num_requests_waiting"]

    def resident_bytes(self) -> int:
        """Memory of the process; Linux only."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


@contextmanager
def serve(model: str, cache: str, *options: str) -> Iterator[Client]:
    """Start a server, and end it after the block."""
    command = [sys.executable, "-m", "mlxarch", "serve", model, "--port", "0", *options]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if found := re.search(r"listening on http://\S+:(\d+)$", line.strip()):
            port = int(found[1])
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    client = Client(port, process.pid)
    try:
        while True:
            try:
                client.ask("GET", "/health")
                break
            except RuntimeError:
                time.sleep(0.1)
        yield client
    finally:
        process.terminate()
        process.wait(30)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """Body of a chat completion."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def leave(client: Client, count: int) -> None:
    """Leave at random moments, streaming and not, and see when the place is free."""
    draw = random.Random(1)
    client.ask("POST", "/v1/chat/completions", chat("a", max_tokens=4))
    baseline = client.figures()
    waits: list[float] = []
    for number in range(count):
        body = chat(f"{number} " * 50, max_tokens=900, stream=number % 2 == 0)
        connection = client.connect("POST", "/v1/chat/completions", body)
        time.sleep(draw.uniform(0, 0.3))
        connection.close()
        left = time.perf_counter()
        while client.busy():
            time.sleep(0.005)
        waits.append(time.perf_counter() - left)
    waits.sort()
    rows = client.figures()["num_requests_running"] - baseline["num_requests_running"]
    print(f"{count} clients left: place free after {waits[count // 2] * 1000:.0f} ms (median), ")
    print(f"{waits[-1] * 1000:.0f} ms (longest); rows left {rows:.0f}")


def mixed(client: Client, number: int, turn: int) -> str:
    """Ask in one of four APIs; the answer depends on the numbers alone."""
    text = f"{number} {turn} " * (1 + number)
    kind = (number + turn) % 4
    if kind == 0:
        body = chat(text, max_tokens=12) | {"temperature": 1.0, "seed": number}
        answer = client.ask("POST", "/v1/chat/completions", body)["choices"][0]["message"]
        return json.dumps([answer["content"], answer.get("reasoning")])
    if kind == 1:
        body = chat(text, max_tokens=12)
        return json.dumps(
            [part.get("text") for part in client.ask("POST", "/v1/messages", body)["content"]]
        )
    if kind == 2:
        body = {"prompt": text, "max_tokens": 12, "temperature": 0}
        return client.ask("POST", "/v1/completions", body)["choices"][0]["text"]
    options = {"num_predict": 12, "seed": turn, "temperature": 1.0}
    body = {"model": "default", "stream": False, "options": options}
    answer = client.ask("POST", "/api/generate", {**body, "prompt": text, "raw": True})
    return answer["response"]


def mix(client: Client, clients: int, turns: int) -> None:
    """Compare the answers of many clients at once with those of one."""
    alone = {
        (number, turn): mixed(client, number, turn)
        for number in range(clients)
        for turn in range(turns)
    }
    equal: list[bool] = []

    def run(number: int) -> None:
        for turn in range(turns):
            equal.append(mixed(client, number, turn) == alone[number, turn])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{sum(equal)} of {len(alone)} answers equal; {len(set(alone.values()))} differ")


def first_token(client: Client, messages: list[dict[str, str]]) -> tuple[float, int, int, str]:
    """Seconds of an answer of one token, tokens of the prompt, cached ones, and the answer."""
    started = time.perf_counter()
    body = {"messages": messages, "max_tokens": 1, "temperature": 0}
    answer = client.ask("POST", "/v1/chat/completions", body)
    seconds = time.perf_counter() - started
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return seconds, usage["prompt_tokens"], cached, answer["choices"][0]["message"]["content"]


def long_text(client: Client, tokens: int) -> str:
    """Text of about so many tokens."""
    text = " ".join(f"fact {n}." for n in range(tokens))
    ids = client.ask("POST", "/tokenize", {"content": text})["tokens"][:tokens]
    return client.ask("POST", "/detokenize", {"tokens": ids})["content"]


def prefix(model: str, cache: str, tokens: int, options: list[str]) -> None:
    """Time the second turn of a conversation: from memory, and from the disk after a restart.

    Then change its first line, and print how the miss is explained.
    """
    warm_up = [{"role": "user", "content": "warm up"}]
    with serve(model, cache, *options) as client:
        system = {"role": "system", "content": long_text(client, tokens)}
        turns = [system, {"role": "user", "content": "hi"}]
        first_token(client, warm_up)
        cold, read, _, answer = first_token(client, turns)
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
        warm, _, cached, _ = first_token(client, turns)
        body = {"instructions": system["content"], "input": "hi", "max_output_tokens": 1}
        id = client.ask("POST", "/v1/responses", body)["id"]
        body["instructions"] = "Today. " + system["content"]
        compared = {"prompt_cache_options": {"comparison_response_id": id}}
        changed = client.ask("POST", "/v1/responses", body | compared)
        time.sleep(3)  # files are written in the background
    with serve(model, cache, *options) as client:
        first_token(client, warm_up)
        disk, _, from_disk, _ = first_token(client, turns)
    print(f"cold {cold:.2f} s for {read} tokens;")
    print(f"second turn {warm:.3f} s = {warm / cold:.1%} ({cached} tokens cached);")
    print(f"after a restart {disk:.3f} s = {disk / cold:.1%} ({from_disk} cached);")
    print("changed first line:", changed["prompt_cache_diagnostics"])


def soak(client: Client, minutes: float) -> None:
    """Ask for mixed answers, leave now and then, and print how the memory grows."""
    draw = random.Random(2)
    end = time.monotonic() + 60 * minutes
    points: list[tuple[float, int]] = []
    cached = 0.0
    asked = 0
    while time.monotonic() < end:
        for _ in range(20):
            mixed(client, draw.randrange(16), draw.randrange(10**6))
        client.connect("POST", "/v1/chat/completions", chat("x", max_tokens=500)).close()
        asked += 21
        points.append((time.monotonic(), client.resident_bytes()))
        cached = client.figures()["prefix_cache_bytes"]
    half = points[len(points) // 2 :]
    times = [at - half[0][0] for at, _ in half]
    sizes = [size for _, size in half]
    mean_time = sum(times) / len(times)
    mean_size = sum(sizes) / len(sizes)
    spread = sum((at - mean_time) ** 2 for at in times) or 1.0
    pairs = zip(times, sizes, strict=True)
    slope = sum((at - mean_time) * (size - mean_size) for at, size in pairs) / spread
    print(f"{asked} requests; RSS {points[0][1] / 1e6:.0f} to {points[-1][1] / 1e6:.0f} MB, ")
    print(f"slope of the second half {slope * 3600 / 1e6:.1f} MB/h; ", end="")
    print(f"the prefix cache holds {cached / 1e6:.1f} MB")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("leave", "mix", "prefix", "soak"))
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=50, help="Clients that leave (default: 50)")
    parser.add_argument("--clients", type=int, default=16, help="Clients at once (default: 16)")
    parser.add_argument("--turns", type=int, default=20, help="Requests of each (default: 20)")
    parser.add_argument("--tokens", type=int, default=2000, help="Prompt tokens (default: 2000)")
    parser.add_argument("--minutes", type=float, default=10, help="Time of the soak (default: 10)")
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as cache:
        if given.kind == "prefix":
            prefix(given.model, cache, given.tokens, options)
            return
        with serve(given.model, cache, *options) as client:
            if given.kind == "leave":
                leave(client, given.count)
            elif given.kind == "mix":
                mix(client, given.clients, given.turns)
            else:
                soak(client, given.minutes)


if __name__ == "__main__":
    main()
