"""Fixtures of the command-line tests: a model that loads in a moment, and ways to run the command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_chat import make_chat_model

from mlxarch.cli.main import cli

Invoke = Callable[..., Result]
Execute = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny chat model."""
    return str(make_chat_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of one whose context has room for minutes of an answer: whoever interrupts it is in time."""
    return str(make_chat_model(tmp_path_factory.mktemp("models") / "endless", context=100_000))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny model without a chat template."""
    return str(make_chat_model(tmp_path_factory.mktemp("models") / "base", template=None))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for all files, and none of the user's settings."""
    for name in ("MLXARCH_MODEL", "MLXARCH_CONTEXT", "MLXARCH_MODELS", "MLXARCH_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    places = {"MLXARCH_HOME": tmp_path / "home", "HF_HOME": tmp_path / "hub", "HF_HUB_OFFLINE": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "home"


@pytest.fixture
def invoke(home: Path) -> Invoke:
    """Run the command in this process: ``invoke("run", model, input=...)``."""

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, arguments, input=input)

    return run


@pytest.fixture
def execute(home: Path) -> Execute:
    """Run the command in a process of its own."""

    def run(
        *arguments: str, input: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlxarch", *arguments]
        return subprocess.run(
            command,
            input=input,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
