"""A server that answers as the Hub does, and a process that talks to it.

huggingface_hub reads its environment when it is imported, so the code under test runs in a process of its own: as a
program, this file reads jobs from stdin, one JSON text of Python code a line, and answers each on stdout.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """``broken`` maps a file to the bytes after which the line drops, ``drops`` to how often it does."""

    files: dict[str, bytes]
    commit: str = ""
    gated: bool = False
    broken: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)  # SHA-256 stated instead of the right one
    status: int = 200
    ranges: bool = True

    def __post_init__(self) -> None:
        self.commit = self.commit or hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()

    def sha256(self, name: str) -> str:
        return self.claimed.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class FakeHub:
    """``requests`` holds what was asked for: (method, path, Range or None)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(
                self, request: object, client_address: object
            ) -> None: ...  # clients that go away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, repo: str) -> list[str]:
        """Names of the files of ``repo`` of which bytes were asked for, other than the first ones of a header."""
        paths = [
            path
            for method, path, span in self.requests
            if method == "GET" and not (span or "").startswith("bytes=0-")
        ]
        return [path.split("/", 5)[5] for path in paths if path.startswith(f"/{repo}/resolve/")]

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        span = request.headers.get("Range")
        self.requests.append((request.command, path, span))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if api else parts[:2])
        revision = parts[5] if api else parts[3] if len(parts) > 3 else ""
        repo = self.repos.get(repo_id)
        if repo is None:
            return self._send(
                request,
                404,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        if repo.status != 200:
            return self._send(request, repo.status, {})
        if revision not in ("main", repo.commit):
            return self._send(
                request, 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"}
            )
        if api:
            return self._send(
                request,
                200,
                {"Content-Type": "application/json"},
                json.dumps(self._info(repo_id, repo)).encode(),
            )
        name = "/".join(parts[4:])
        if repo.gated:
            return self._send(
                request, 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
            )
        if name not in repo.files:
            return self._send(
                request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit}
            )
        self._file(request, repo, name, span, body)

    def _info(self, repo_id: str, repo: Repo) -> dict[str, Any]:
        siblings = []
        for name, data in repo.files.items():
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
            }
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": repo.sha256(name), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": repo_id,
            "sha": repo.commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": siblings,
        }

    def _file(
        self, request: BaseHTTPRequestHandler, repo: Repo, name: str, span: str | None, body: bool
    ) -> None:
        data = repo.files[name]
        etag = (
            repo.sha256(name) if name.endswith(".safetensors") else hashlib.sha1(data).hexdigest()
        )
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        code, sent = 200, data
        if span and repo.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(data)) if last else len(data)
            code, sent = 206, data[int(first) : stop]
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
        drop = body and repo.drops.get(name, 0) > 0 and not (span or "").startswith("bytes=0-")
        if drop:
            repo.drops[name] -= 1
        self._send(
            request,
            code,
            headers,
            sent if body else b"",
            len(sent),
            repo.broken.get(name) if drop else None,
        )

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        code: int,
        headers: dict[str, str],
        body: bytes = b"",
        length: int | None = None,
        cut: int | None = None,
    ) -> None:
        request.send_response(code)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        try:
            request.wfile.write(body[:cut])
        except OSError:
            cut = 0
        if cut is not None:
            request.close_connection = True


class Refused(Exception):
    """Exception of the code under test; ``kind`` is the name of its class."""

    def __init__(self, kind: str, message: str, code: int | None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.code = kind, message, code


class Worker:
    """A Python that knows the fake Hub as the Hub; ``environment`` is added to this one's."""

    def __init__(self, environment: dict[str, str]) -> None:
        computing = ("MLXARCH_CPU_KERNELS", "MLXARCH_THREADS")  # as this process, for equal bits
        kept = {
            key: value
            for key, value in os.environ.items()
            if key in computing or not key.startswith(("HF_", "MLXARCH_", "PIP_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment,
            text=True,
        )

    def __call__(self, code: str, **values: Any) -> Any:
        """Run ``code`` as the body of a function in which ``values`` are names, and give what it returns."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(
            json.dumps({"code": textwrap.dedent(code), "values": values}, default=str) + "\n"
        )
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker died: {self.process.wait()}")
        answer = json.loads(line)
        if "kind" in answer:
            raise Refused(answer["kind"], answer["message"], answer["code"])
        return answer["result"]

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def environment(home: Path, url: str) -> dict[str, str]:
    return {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "MLXARCH_HOME": str(home / "mlxarch")}


def main() -> None:
    import time

    pause, time.sleep = (
        time.sleep,
        lambda seconds: pause(min(seconds, 0.01)),
    )  # between two attempts
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        scope: dict[str, Any] = dict(job["values"])
        try:
            exec("def job():\n" + textwrap.indent(job["code"], "    "), scope)
            answer = {"result": scope["job"]()}
        except Exception as error:
            code = getattr(error, "exit_code", None)
            answer = {"kind": type(error).__name__, "message": str(error), "code": code}
        print(json.dumps(answer, default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
