"""Which model of the catalog a folder holds, and which architectures count as ones that run."""

import json
import shutil
from pathlib import Path

import pytest

import mlxarch
from mlxarch.generation.sampling import Sampling
from mlxarch.hub import catalog
from mlxarch.loading.model_types import RUNNABLE
from mlxarch.store.describe import describe
from mlxarch.store.installed import find_catalog_entry
from mlxarch.system import paths
from parity import GOLDEN


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "home"))
    return tmp_path


def test_every_model_of_the_catalog_has_a_model_type_that_runs():
    assert {entry.architecture for entry in catalog.entries().values()} <= RUNNABLE
    assert "no_such_architecture" not in RUNNABLE


def test_a_folder_is_known_by_where_it_lies(home):
    def name(folder: Path) -> str | None:
        entry = find_catalog_entry(folder)
        return entry.name if entry else None

    assert name(paths.models() / "kimi-k2-4bit") == "kimi-k2"
    assert name(paths.models() / "org--model-4bit") is None
    cached = home / "hub" / "models--mlx-community--Qwen3-30B-A3B-4bit" / "snapshots" / "0123"
    assert name(cached) == "qwen3-30b-a3b"
    assert name(cached.parent.with_name("refs") / "0123") is None
    assert name(home / "kimi-k2-4bit") is None, "a folder of the user's may hold anything"


YARN = json.loads((GOLDEN / "qwen3_yarn" / "config.json").read_text()) | {
    "max_position_embeddings": 128,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 2048}}, 2048),
        ({"text_config": "none"}, None),
        (YARN, 512),
    ],
)
def test_the_context_of_a_folder_is_found_wherever_it_is_written(tmp_path, config, context):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path)["context"] == context


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (None, Sampling(temperature=0.6)),
        ('{"eos_token_id": 461}', Sampling(temperature=0.6)),
        ('{"do_sample": false}', Sampling()),
        ('{"do_sample": true}', Sampling(temperature=1.0)),
        ('{"do_sample": true, "top_k": 3}', Sampling(temperature=1.0, top_k=3)),
    ],
)
def test_advice_of_the_model_card_counts_where_the_folder_has_none(written, wanted, talker):
    folder = Path(shutil.copytree(talker, paths.models() / "kimi-k2-8bit"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if written:
        (folder / "generation_config.json").write_text(written)
    assert mlxarch.load(folder).recommended_sampling == wanted
    elsewhere = mlxarch.load(
        shutil.copytree(folder, paths.models().parent / "kimi-k2-8bit")
    ).recommended_sampling
    assert elsewhere == (Sampling() if wanted == Sampling(temperature=0.6) else wanted)
