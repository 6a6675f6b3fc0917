"""Fixtures shared by the tests of generation and loading."""

import shutil
from pathlib import Path

import pytest
from talker import make_talker


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny chat model."""
    return make_talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture
def talker_copy(talker: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(talker, tmp_path / "talker"))
