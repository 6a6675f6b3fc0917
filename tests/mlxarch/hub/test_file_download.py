"""Downloads go on where they stopped: after Ctrl-C, SIGTERM, kill -9, a lost connection or a full disk."""

import contextlib
import hashlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, Refused, Repo, Worker, environment

NAME = "model.safetensors"
DATA = bytes(range(251)) * 12_000  # 3 MB
DIGEST = hashlib.sha256(DATA).hexdigest()
DOWNLOAD = """
from pathlib import Path
from mlxarch.hub import file_download, hub_client
repository = hub_client.fetch_repository_info(repo)
if into:
    file = repository.weights["model.safetensors"]
    commit = repository.revision
    return file_download.fetch_file(repo, commit, file.name, into=Path(into), expected=file)
return hub_client.download(repository) / "model.safetensors"
"""
# The download is stopped once ``stop_at`` bytes have arrived; the notes of an interrupt are returned
STOPPED = """
from pathlib import Path
from mlxarch.hub import file_download, hub_client
honest = file_download._write
left = [stop_at]
def write(output, data):
    data = data[: left[0]]
    honest(output, data)
    left[0] -= len(data)
    if not left[0]:
        exec(stop)
file_download._write = write
repository = hub_client.fetch_repository_info(repo)
file = repository.weights["model.safetensors"]
folder = Path(into) if into else None
try:
    file_download.fetch_file(repo, repository.revision, file.name, into=folder, expected=file)
except KeyboardInterrupt as interrupt:
    return interrupt.__notes__
finally:
    file_download._write = honest
"""
STOPS = {
    "Ctrl-C": "raise KeyboardInterrupt",
    "SIGTERM": "from mlxarch.cli.signals import Terminated; raise Terminated(15)",
    "kill -9": "import os; os.kill(os.getpid(), 9)",
}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def worker(server: FakeHub, home: Path) -> Iterator[Worker]:
    worker = Worker(environment(home, server.url))
    yield worker
    worker.close()


@pytest.fixture
def repo(server: FakeHub, tmp_path: Path) -> str:
    """A repository of its own for each test: the cache is shared."""
    name = f"org/{tmp_path.name}"
    server.repos[name] = Repo({"config.json": b'{"model_type": "llama"}', NAME: DATA})
    server.requests.clear()
    return name


def ranges(server: FakeHub) -> list[str | None]:
    """Ranges of the requests for the weight file."""
    return [
        span for method, path, span in server.requests if method == "GET" and path.endswith(NAME)
    ]


def find_partials(home: Path, repo: str) -> list[Path]:
    folders = (home / "hf" / "hub" / f"models--{repo.replace('/', '--')}", home / repo)
    return [path for folder in folders for path in folder.rglob("*.incomplete") if path.is_file()]


@pytest.mark.parametrize("into", [False, True], ids=["cache", "folder"])
@pytest.mark.parametrize("stop", STOPS)
def test_what_arrived_before_a_stop_is_not_fetched_again(
    server: FakeHub, worker: Worker, home: Path, repo: str, stop: str, into: bool
) -> None:
    folder = str(home / repo) if into else ""
    for stop_at in (1, 1_234_567, len(DATA)) if stop == "Ctrl-C" else (1_234_567,):
        values = {"stop": STOPS[stop], "stop_at": stop_at, "repo": repo, "into": folder}
        if stop == "kill -9":
            killed = Worker(environment(home, server.url))
            with pytest.raises(RuntimeError, match="-9"):
                killed(STOPPED, **values)
            assert killed.process.stdin and killed.process.stdout
            killed.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                killed.process.stdin.close()
        else:
            assert any("goes on from there" in note for note in worker(STOPPED, **values))
        [partial] = find_partials(home, repo)
        assert partial.stat().st_size == stop_at
        server.requests.clear()
        path = Path(worker(DOWNLOAD, repo=repo, into=folder))
        assert path.read_bytes() == DATA
        assert ranges(server) == ([f"bytes={stop_at}-"] if stop_at < len(DATA) else [])
        assert find_partials(home, repo) == []
        path.resolve().unlink()
        path.unlink(missing_ok=True)


def leave_partial(home: Path, repo: str, content: bytes) -> Path:
    """Leave a partial file as an earlier attempt might have."""
    folder = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}" / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{DIGEST}.incomplete"
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize(
    ("content", "ranges_sent"),
    [
        (DATA[:1000], ["bytes=1000-"]),
        (DATA + b"x", [None]),
        (DATA, []),
        (b"?" * 1000, ["bytes=1000-", None]),
        (b"?" * len(DATA), [None]),
    ],
    ids=["good", "too long", "complete", "damaged", "complete and damaged"],
)
def test_a_partial_file_is_used_as_far_as_it_is_right(
    server: FakeHub,
    worker: Worker,
    home: Path,
    repo: str,
    content: bytes,
    ranges_sent: list[str | None],
) -> None:
    leave_partial(home, repo, content)
    assert Path(worker(DOWNLOAD, repo=repo, into="")).read_bytes() == DATA
    assert ranges(server) == ranges_sent


def test_a_file_above_the_limit_of_one_response_comes_in_parts_and_goes_on(
    server: FakeHub, worker: Worker, home: Path, repo: str
) -> None:
    leave_partial(home, repo, DATA[:1000])
    limit = len(DATA) // 2
    limited = (
        "from unittest.mock import patch\n"
        "from huggingface_hub import constants\n"
        f"with patch.object(constants, 'MAX_HTTP_DOWNLOAD_SIZE', {limit}):\n"
        + textwrap.indent(DOWNLOAD, "    ")
    )
    assert Path(worker(limited, repo=repo, into="")).read_bytes() == DATA
    end = 1000 + limit
    assert ranges(server) == [f"bytes=1000-{end - 1}", f"bytes={end}-"]


def test_a_server_that_ignores_ranges_sends_the_whole_file(
    server: FakeHub, worker: Worker, home: Path, repo: str
) -> None:
    leave_partial(home, repo, DATA[:1000])
    server.repos[repo].ranges = False
    assert Path(worker(DOWNLOAD, repo=repo, into="")).read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-"]


def test_a_file_that_changed_at_the_hub_is_fetched_from_its_beginning(
    server: FakeHub, worker: Worker, home: Path, repo: str
) -> None:
    old = leave_partial(home, repo, DATA[:1000])
    changed = DATA[::-1]
    server.repos[repo] = Repo(server.repos[repo].files | {NAME: changed})
    server.repos[repo].commit = "e" * 40
    assert Path(worker(DOWNLOAD, repo=repo, into="")).read_bytes() == changed
    assert ranges(server) == [None] and old.exists()


def test_a_size_that_is_not_the_announced_one_is_named(worker: Worker, repo: str) -> None:
    code = DOWNLOAD.replace(
        "if into:",
        "file = repository.weights['model.safetensors']\n"
        "object.__setattr__(file, 'size', file.size - 1)\nif into:",
    )
    with pytest.raises(Refused, match="it changed meanwhile") as caught:
        worker(code, repo=repo, into="")
    assert caught.value.kind == "DownloadError"


def test_a_full_disk_is_named_and_what_arrived_is_kept(
    server: FakeHub, worker: Worker, home: Path, repo: str
) -> None:
    with pytest.raises(Refused) as caught:
        full = "import errno; raise OSError(errno.ENOSPC, 'full')"
        worker(STOPPED, stop=full, stop_at=70_000, repo=repo, into="")
    assert caught.value.kind == "DiskSpaceError" and "disk is full" in caught.value.message
    assert Path(worker(DOWNLOAD, repo=repo, into="")).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=70000-"]


def test_the_size_of_a_download_is_what_is_missing(worker: Worker, home: Path, repo: str) -> None:
    code = "from mlxarch.hub import hub_client\n"
    code += "return hub_client.missing_bytes(hub_client.fetch_repository_info(repo))"
    whole = worker(code, repo=repo)
    leave_partial(home, repo, DATA[:1000])
    assert worker(code, repo=repo) == whole - 1000


def test_an_interrupted_download_is_listed_and_removed(
    worker: Worker, home: Path, repo: str
) -> None:
    partial = leave_partial(home, repo, DATA[:1000])
    running = partial.with_name(f"{DIGEST}.0123abcd.incomplete")  # of huggingface_hub
    running.write_bytes(b"x")
    unfinished = "from mlxarch.store import obtain as store; return store.list_unfinished()"
    assert worker(unfinished)[repo] == 1000
    remove = "from mlxarch.store import obtain as store; return store.remove(repo)"
    assert worker(remove, repo=repo) == 1000
    assert not partial.exists() and running.exists()
    assert repo not in worker(unfinished)
