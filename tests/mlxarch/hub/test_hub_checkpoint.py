"""A repository of slices is quantized while it downloads: all slices of a tensor are here at once, and no more."""

import json
from pathlib import Path

import pytest
import sliced_grok2
from fake_hub import FakeHub, Repo, Worker, environment
from safetensors.numpy import load_file

from mlxarch.quantize import convert
from tiny_llama import INDEX, make_llama

CODE = """
from pathlib import Path
from mlxarch.hub import hub_checkpoint, hub_client
from mlxarch.quantize import convert
held = []
fetch = hub_checkpoint.ShardFetcher.fetch
def counting(self, name):
    path = fetch(self, name)
    held.append(sorted(p.name for p in path.parent.glob("*.safetensors")))
    return path
hub_checkpoint.ShardFetcher.fetch = counting
with hub_checkpoint.open_remote_checkpoint(hub_client.fetch_repository_info("org/grok")) as source:
    convert(source, out, bits=4, group_size=32, method="round")
return held
"""


def test_slices_are_fetched_once_and_held_no_longer_than_their_tensors(tmp_path: Path) -> None:
    local = sliced_grok2.make(tmp_path / "sliced")
    server = FakeHub()
    server.repos["org/grok"] = Repo({path.name: path.read_bytes() for path in local.iterdir()})
    worker = Worker(environment(tmp_path, server.url))
    try:
        held = worker(CODE, out=str(tmp_path / "remote"))
    finally:
        worker.close()
        server.close()
    expected = (
        convert(local, tmp_path / "local", bits=4, group_size=32, method="round").output
        / "model.safetensors"
    )
    assert (tmp_path / "remote" / "model.safetensors").read_bytes() == expected.read_bytes()
    assert len(held) == len(list(local.glob("*.safetensors")))  # each file once
    numbers = [{name.split("-")[1] for name in names} for names in held]
    assert all(len(files) == 1 for files in numbers)
    assert max(map(len, held)) == sliced_grok2.RANKS


STALE = """
from pathlib import Path
from mlxarch.hub import hub_checkpoint, hub_client
from mlxarch.quantize import convert
repository = hub_client.fetch_repository_info("org/model")
names = sorted(hub_checkpoint.read_remote_headers(repository).tensors)
with hub_checkpoint.open_remote_checkpoint(repository) as source:
    convert(source, out, bits=None)
return [sorted(repository.weights), names]
"""


@pytest.mark.parametrize("index", ["none", "of three files", "of other places"])
def test_a_whole_set_is_read_without_its_index(index: str, tmp_path: Path) -> None:
    weights = make_llama(tmp_path / "local", shards=2)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (tmp_path / "local" / INDEX).unlink()
    stale = {
        "of three files": {
            name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(weights)
        },
        "of other places": dict.fromkeys(weights, files[0]),
    }
    if index in stale:
        (tmp_path / "local" / INDEX).write_text(json.dumps({"weight_map": stale[index]}))
    server = FakeHub()
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    server.repos["org/model"] = Repo(local)
    worker = Worker(environment(tmp_path, server.url))
    try:
        found = worker(STALE, out=str(tmp_path / "remote"))
    finally:
        worker.close()
        server.close()
    assert found == [files, sorted(weights)]
    assert load_file(tmp_path / "remote" / "model.safetensors").keys() == weights.keys()
