"""Peak memory of a conversion in a process of its own: a few chunks, however large the checkpoint or a tensor is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conversion_memory.py"


def measured(folder: Path, *arguments: str) -> dict[str, float]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_memory_does_not_grow_with_the_checkpoint_nor_with_a_tensor(
    tmp_path: Path, bits: str
) -> None:
    found = measured(tmp_path, "300", "--bits", bits)  # MB, most of it one tensor
    assert found["source_MB"] > 290
    assert found["above_import_MB"] < 100
    assert found["estimate_error"] < 0.02


def test_a_search_holds_the_activations_of_one_layer_besides(tmp_path: Path) -> None:
    found = measured(
        tmp_path, "20", "--method", "search"
    )  # 50 MB: a layer is never smaller than 32
    # states, norms, queries, keys, values, attention, what it adds; gate, up, their product, what it adds
    activations = 1024 * 4 * (9 * 1024 + 3 * 4096) / 1e6
    # The peak differs by 15 MB between runs on a busy machine and a quiet one.
    assert found["above_import_MB"] < 265 + activations


def test_the_measurement_notices_whole_tensors(tmp_path: Path) -> None:
    found = measured(tmp_path, "150", "--chunk", str(10**9))
    assert found["above_import_MB"] > 250
