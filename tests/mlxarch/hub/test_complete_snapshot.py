"""Snapshots that another program left with less than all files are completed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, Refused, Repo, Worker, environment

WEIGHTS = ("config.json", "model.safetensors")
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"eos_token_id": [3, 4]}',
    "README.md": b"# about",
}
COMPLETE = """
import logging
from pathlib import Path
from mlxarch.hub.complete_snapshot import complete_snapshot
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("mlxarch").addHandler(handler)
try:
    complete_snapshot(Path(folder))
finally:
    logging.getLogger("mlxarch").removeHandler(handler)
return said
"""


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


@pytest.fixture(scope="module")
def offline(home: Path) -> Iterator[Worker]:
    worker = Worker(environment(home, "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": "1"})
    yield worker
    worker.close()


def put_snapshot(server: FakeHub, home: Path, repo: str, names: tuple[str, ...]) -> Path:
    """A repository at the server, and a snapshot in the cache that has some of its files."""
    server.repos[repo] = found = Repo(dict(FILES))
    server.requests.clear()
    folder = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / found.commit
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_bytes(FILES[name])
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(found.commit)
    return snapshot


@pytest.mark.parametrize("lacking", [name for name in FILES if name not in (*WEIGHTS, "README.md")])
def test_each_file_beside_the_weights_is_fetched_when_it_is_lacking(
    server: FakeHub, home: Path, worker: Worker, lacking: str
) -> None:
    names = tuple(name for name in FILES if name not in (lacking, "README.md"))
    snapshot = put_snapshot(server, home, f"org/no-{lacking}", names)
    assert worker(COMPLETE, folder=snapshot) == []
    assert {path.name for path in snapshot.iterdir()} == FILES.keys() - {"README.md"}
    assert (snapshot / lacking).read_bytes() == FILES[lacking]
    server.requests.clear()
    assert worker(COMPLETE, folder=snapshot) == [] and server.requests == [], "asked once only"


def test_named_chat_templates_are_fetched_too(server: FakeHub, home: Path, worker: Worker) -> None:
    present = tuple(name for name in FILES if name != "README.md")
    snapshot = put_snapshot(server, home, "org/templates", present)
    name = "additional_chat_templates/tool_use.jinja"
    server.repos["org/templates"].files |= {name: b"{{ tools }}", "additional/x.jinja": b""}
    assert worker(COMPLETE, folder=snapshot) == []
    assert (snapshot / name).read_bytes() == b"{{ tools }}"
    assert not (snapshot / "additional").exists()
    server.requests.clear()
    assert worker(COMPLETE, folder=snapshot) == [] and server.requests == []


def test_what_mlxarch_downloaded_is_not_asked_about(
    server: FakeHub, home: Path, worker: Worker
) -> None:
    named = "additional_chat_templates/rag.jinja"
    server.repos["org/own"] = Repo(FILES | {named: b"{{ documents }}"})
    download = "from mlxarch.hub import hub_client\n"
    download += "return hub_client.download(hub_client.fetch_repository_info('org/own'))"
    folder = worker(download)
    assert (Path(folder) / named).is_file()
    server.requests.clear()
    assert worker(COMPLETE, folder=folder) == [] and server.requests == []


def test_without_a_network_it_is_said_what_may_be_lacking(
    server: FakeHub, home: Path, offline: Worker
) -> None:
    snapshot = put_snapshot(server, home, "org/offline", (*WEIGHTS, "tokenizer.json"))
    [warning] = offline(COMPLETE, folder=snapshot)
    assert "no chat template and no generation_config.json" in warning
    assert "HF_HUB_OFFLINE" in warning and "org/offline" in warning
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (snapshot / "generation_config.json").write_text("{}")
    assert offline(COMPLETE, folder=snapshot) == []


def test_without_a_network_a_missing_tokenizer_is_an_error(
    server: FakeHub, home: Path, offline: Worker
) -> None:
    snapshot = put_snapshot(server, home, "org/bare", WEIGHTS)
    with pytest.raises(Refused, match="org/bare .* has no tokenizer") as caught:
        offline(COMPLETE, folder=snapshot)
    assert (caught.value.kind, caught.value.code) == ("OfflineError", 5)


def test_folders_outside_of_the_cache_are_left_alone(
    server: FakeHub, tmp_path: Path, worker: Worker
) -> None:
    server.requests.clear()
    for folder in (tmp_path, tmp_path / "models--org--name" / "snapshots" / ("0" * 40)):
        folder.mkdir(parents=True, exist_ok=True)
        assert worker(COMPLETE, folder=folder) == []
    assert server.requests == []
