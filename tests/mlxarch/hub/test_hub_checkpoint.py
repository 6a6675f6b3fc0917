"""A repository of slices is quantized while it downloads: all slices of a tensor are here at once, and no more."""

from pathlib import Path

import sliced_grok2
from fake_hub import FakeHub, Repo, Worker, environment

from mlxarch.quantize import convert

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
