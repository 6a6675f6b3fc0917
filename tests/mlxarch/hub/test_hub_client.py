import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, Refused, Repo, Worker, environment

from mlxarch.hub import hub_cache

CONFIG = b'{"model_type": "llama"}'
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
IMPORT = "from mlxarch.hub import hub_cache, hub_client\n"
CACHED = IMPORT + "return hub_cache.find_cached_snapshot(repo)"
LOOK_UP = IMPORT + "return hub_client.fetch_repository_info(repo, revision)"
DOWNLOAD = IMPORT + "return hub_client.download(hub_client.fetch_repository_info(repo))"


def files(size: int = 3000) -> dict[str, bytes]:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "README.md": b"# about",
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"x" * 9000,
        "consolidated.safetensors": b"x" * 9000,
        "original/params.json": b"{}",
        INDEX: json.dumps(index).encode(),
        SHARDS[0]: b"1" * size,
        SHARDS[1]: b"2" * (size + 500),
        "stray.safetensors": b"x" * 100,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def worker(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(environment(tmp_path_factory.mktemp("home"), server.url))
    yield worker
    worker.close()


def put(server: FakeHub, name: str, **repo: object) -> Repo:
    """A repository of its own for each test: the cache is shared."""
    server.repos[name] = found = Repo(files(), **repo)  # type: ignore[arg-type]
    server.requests.clear()
    return found


def test_a_look_up_counts_what_a_model_needs_and_nothing_else(
    server: FakeHub, worker: Worker
) -> None:
    repo = put(server, "org/look")
    found = worker(
        IMPORT + "r = hub_client.fetch_repository_info('org/look')\n"
        "return r.revision, list(r.sidecars), {f.name: [f.size, f.sha256] for f in r.weights.values()}, r.config"
    )
    assert found == [
        repo.commit,
        ["config.json", "tokenizer.json", INDEX],
        {name: [len(repo.files[name]), repo.sha256(name)] for name in SHARDS},
        {"model_type": "llama"},
    ]
    assert sorted(server.fetched("org/look")) == ["config.json", INDEX]


def test_a_download_lands_in_the_hubs_cache_and_is_not_fetched_twice(
    server: FakeHub, worker: Worker
) -> None:
    repo = put(server, "org/twice")
    folder = Path(worker(DOWNLOAD, repo="org/twice"))
    assert folder.name == repo.commit and folder.parent.name == "snapshots"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        INDEX,
        *SHARDS,
    }
    assert all((folder / name).read_bytes() == repo.files[name] for name in SHARDS)
    server.requests.clear()
    assert worker(DOWNLOAD, repo="org/twice") == str(folder)
    assert server.fetched("org/twice") == []
    assert worker(CACHED, repo="org/twice") == str(folder)
    assert worker(CACHED, repo="org/other") is None


def test_progress_counts_the_bytes_of_all_files_and_ends_at_the_total(
    server: FakeHub, worker: Worker
) -> None:
    repo = put(server, "org/progress")
    seen = worker(
        IMPORT + "seen = []\n"
        "repository = hub_client.fetch_repository_info('org/progress')\n"
        "hub_client.download(repository, lambda *step: seen.append(step)); return seen"
    )
    total = sum(len(repo.files[name]) for name in ("config.json", "tokenizer.json", INDEX, *SHARDS))
    assert {step[2] for step in seen} == {total}
    counts = [done for label, done, _ in seen if label.startswith("downloading")]
    assert counts == sorted(counts) and counts[-1] == total and len(set(counts)) > 3


def test_a_line_that_drops_once_is_taken_up_where_it_broke(server: FakeHub, worker: Worker) -> None:
    repo = put(server, "org/drop", broken={SHARDS[0]: 11 << 20}, drops={SHARDS[0]: 1})
    repo.files[SHARDS[0]] = bytes(range(256)) * (12 << 12)
    folder = Path(worker(DOWNLOAD, repo="org/drop"))
    assert (folder / SHARDS[0]).read_bytes() == repo.files[SHARDS[0]]
    path = f"/org/drop/resolve/{repo.commit}/{SHARDS[0]}"
    assert [
        span for method, asked, span in server.requests if (method, asked) == ("GET", path)
    ] == [
        None,
        f"bytes={11 << 20}-",
    ]


def test_a_line_that_stays_broken_is_an_error_and_the_next_attempt_fetches_the_rest(
    server: FakeHub, worker: Worker
) -> None:
    repo = put(server, "org/broken", broken={SHARDS[1]: 0}, drops={SHARDS[1]: 99})
    with pytest.raises(Refused) as caught:
        worker(DOWNLOAD, repo="org/broken")
    assert (caught.value.kind, caught.value.code) == ("DownloadError", 1)
    assert (
        SHARDS[1] in caught.value.message and "run the same command again" in caught.value.message
    )
    assert worker(CACHED, repo="org/broken") is None
    repo.drops.clear()
    server.requests.clear()
    worker(DOWNLOAD, repo="org/broken")
    assert server.fetched("org/broken") == [SHARDS[1]]


def test_bytes_that_the_hub_did_not_promise_are_refused_and_removed(
    server: FakeHub, worker: Worker
) -> None:
    repo = put(server, "org/damaged", claimed={SHARDS[0]: hashlib.sha256(b"other").hexdigest()})
    with pytest.raises(Refused) as caught:
        worker(DOWNLOAD, repo="org/damaged")
    assert caught.value.kind == "DownloadError"
    assert (
        repo.claimed[SHARDS[0]] in caught.value.message
        and repo.sha256(SHARDS[1]) not in caught.value.message
    )
    repo.claimed.clear()
    folder = Path(worker(DOWNLOAD, repo="org/damaged"))
    assert (folder / SHARDS[0]).read_bytes() == repo.files[SHARDS[0]]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble_is_a_download_error(server: FakeHub, worker: Worker, status: int) -> None:
    put(server, f"org/status{status}", status=status)
    with pytest.raises(Refused) as caught:
        worker(DOWNLOAD, repo=f"org/status{status}")
    assert (caught.value.kind, caught.value.code) == ("DownloadError", 1)
    assert str(status) in caught.value.message


def test_a_gated_repository_says_where_to_accept_and_what_to_set(
    server: FakeHub, worker: Worker
) -> None:
    put(server, "org/gated", gated=True)
    with pytest.raises(Refused) as caught:
        worker(DOWNLOAD, repo="org/gated")
    assert (caught.value.kind, caught.value.code) == ("GatedModel", 3)
    assert f"{server.url}/org/gated" in caught.value.message and "HF_TOKEN" in caught.value.message


@pytest.mark.parametrize(
    ("repo", "revision", "word"),
    [
        ("org/nowhere", "main", "no such repository"),
        ("org/known", "v9", "no such revision"),
        ("a b/c", "main", "no name of a repository"),
        ("org/bare", "main", "no weights in safetensors"),
        ("org/empty", "main", "no config.json"),
    ],
)
def test_what_is_not_there_is_not_found(
    server: FakeHub, worker: Worker, repo: str, revision: str, word: str
) -> None:
    put(server, "org/known")
    server.repos["org/bare"] = Repo(
        {"config.json": CONFIG, "model.gguf": b"GGUF", "pytorch_model.bin": b"x"}
    )
    server.repos["org/empty"] = Repo({"model.safetensors": b"x"})
    with pytest.raises(Refused) as caught:
        worker(
            LOOK_UP,
            repo=repo,
            revision=revision,
        )
    assert (caught.value.kind, caught.value.code) == ("ModelNotFound", 3)
    assert word in caught.value.message and repo in caught.value.message


def test_an_index_cannot_lead_out_of_the_folder(server: FakeHub, worker: Worker) -> None:
    repo = put(server, "org/evil")
    for name in ("../../../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors", 5):
        repo.files[INDEX] = json.dumps({"weight_map": {"a": name}}).encode()
        repo.commit = hashlib.sha1(repo.files[INDEX]).hexdigest()
        with pytest.raises(Refused) as caught:
            worker(DOWNLOAD, repo="org/evil")
        assert caught.value.kind == "CheckpointError"
    assert not [
        name for name in server.fetched("org/evil") if "safetensors" in name.removesuffix(INDEX)
    ]


def test_a_header_is_read_without_the_weights(server: FakeHub, worker: Worker) -> None:
    header = b'{"a":{"dtype":"U8","shape":[400000],"data_offsets":[0,400000]}}' + b" " * 110_000
    data = len(header).to_bytes(8, "little") + header + b"7" * 400_000
    repo = put(server, "org/header")
    repo.files["model.safetensors"] = data
    code = (
        IMPORT + "f = hub_client.RemoteFile('model.safetensors', size, None)\n"
        "return hub_client.fetch_safetensors_header('org/header', commit, f).decode('latin-1')"
    )
    for repo.ranges in (True, False):
        server.requests.clear()
        assert (
            worker(code, size=len(data), commit=repo.commit).encode("latin-1")
            == data[: 8 + len(header)]
        )
        assert [span for _, _, span in server.requests] == [
            "bytes=0-99999",
            f"bytes=0-{7 + len(header)}",
        ]


def test_without_a_network_what_is_cached_is_found_and_the_rest_is_an_offline_error(
    server: FakeHub, worker: Worker, tmp_path: Path
) -> None:
    put(server, "org/offline")
    folder = worker(DOWNLOAD, repo="org/offline")
    places = environment(Path(folder).parents[4], "http://127.0.0.1:9")
    for more, word in (({}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE")):
        offline = Worker(places | more)
        try:
            assert offline(CACHED, repo="org/offline") == folder
            with pytest.raises(Refused) as caught:
                offline(LOOK_UP, repo="org/new", revision="main")
        finally:
            offline.close()
        assert (caught.value.kind, caught.value.code) == ("OfflineError", 5)
        assert word in caught.value.message


def sliced(*missing: str) -> dict[str, bytes]:
    names = ["pytorch_model-00000-TP-common.safetensors"]
    names += [f"pytorch_model-00001-TP-{rank:03}.safetensors" for rank in range(3)]
    kept = {name: b"x" * 3000 for name in names if name not in missing}
    others = ("config.json", "tokenizer.tok.json", "tekken.json", "stray.safetensors")
    return {name: CONFIG for name in others} | kept


def test_slices_for_tensor_parallelism_count_as_weights(server: FakeHub, worker: Worker) -> None:
    server.repos["org/sliced"] = Repo(sliced())
    code = IMPORT + "r = hub_client.fetch_repository_info('org/sliced'); "
    code += "return list(r.sidecars), list(r.weights), "
    sidecars, weights, at_once = worker(code + "r.largest_group_bytes")
    assert sidecars == ["config.json", "tekken.json", "tokenizer.tok.json"]
    assert (
        weights == [name for name in sliced() if name.startswith("pytorch_model")]
        and at_once == 9000
    )
    assert len(list(Path(worker(DOWNLOAD, repo="org/sliced")).iterdir())) == 7


def test_a_repository_without_one_of_its_slices_is_refused(server: FakeHub, worker: Worker) -> None:
    gone = "pytorch_model-00001-TP-001.safetensors"
    server.repos["org/gap"] = Repo(sliced(gone))
    with pytest.raises(Refused, match=gone):
        worker(LOOK_UP, repo="org/gap", revision="main")


def test_a_folder_without_one_of_its_slices_is_not_complete(tmp_path: Path) -> None:
    for name, content in sliced().items():
        (tmp_path / name).write_bytes(content)
    assert hub_cache.is_complete(tmp_path)
    (tmp_path / "pytorch_model-00001-TP-001.safetensors").unlink()
    assert not hub_cache.is_complete(tmp_path)
