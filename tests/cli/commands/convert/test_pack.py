"""mlxarch pack, and quantize --experts packed."""

import json
from pathlib import Path

import pytest

from mlxarch.checkpoint.packed_experts import MANIFEST_FILE
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.resolve import resolve
from tiny_moe import make_moe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_moe(tmp_path / "moe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pack_writes_a_folder_beside_and_says_what_is_in_it(invoke, here):
    result = invoke("pack", "./moe")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{here / 'moe-packed'}: 24 experts in 2 layers, ")
    assert (here / "moe-packed" / MANIFEST_FILE).is_file()


def test_the_summary_as_json(invoke, here):
    report = json.loads(invoke("pack", "./moe", "-o", "out", "--json").stdout)
    assert report["output"] == str(here / "out") and (report["layers"], report["experts"]) == (
        2,
        24,
    )
    files = sum(path.stat().st_size for path in (here / "out").glob("experts.*.bin"))
    assert files == report["expert_bytes"] + report["filled_bytes"]


def test_a_second_time_needs_force(invoke, here):
    invoke("pack", "./moe")
    again = invoke("pack", "./moe")
    assert again.exit_code == 1 and "--force" in again.stderr
    assert invoke("pack", "./moe", "--force").exit_code == 0


def test_quantize_packs_what_it_wrote(invoke, here):
    result = invoke("quantize", "./moe", "--bits", "8", "--method", "round", "--experts", "packed")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in here.iterdir()} == {"moe", "moe-8bit"}
    assert (here / "moe-8bit" / MANIFEST_FILE).is_file()
    invoke("quantize", "./moe", "--bits", "8", "--method", "round", "-o", "ordinary")
    packed, ordinary = (
        resolve(open_checkpoint(here / name)).tensors for name in ("moe-8bit", "ordinary")
    )
    assert {n: t.shape for n, t in packed.items()} == {n: t.shape for n, t in ordinary.items()}


def test_quantize_refuses_to_pack_a_model_without_experts(invoke, here, tiny):
    result = invoke("quantize", tiny, "--experts", "packed")
    assert result.exit_code == 2 and "has no experts" in result.stderr
