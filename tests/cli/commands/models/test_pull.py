"""Memory check of ``pull`` before it downloads, with a server that answers as the Hub does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Repo, Worker, environment

from tiny_llama import make_llama

PULL = """
from click.testing import CliRunner
from mlxarch.system import machines
from mlxarch.cli import confirm
from mlxarch.cli.main import cli
machines.this_machine = lambda: machines.Machine("a test", memory, "cpu")
confirm.is_terminal = lambda stream: terminal
found = CliRunner().invoke(cli, ["pull", "org/tiny", *arguments], input=typed)
return [found.exit_code, found.stdout, found.stderr]
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "original"
    make_llama(folder)
    server = FakeHub()
    server.repos["org/tiny"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    yield server
    server.close()


@pytest.fixture
def worker(server: FakeHub, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(environment(tmp_path, server.url))
    yield worker
    worker.close()


def pull(
    worker: Worker, *arguments: str, memory: int, terminal: bool = True, typed: str = ""
) -> Any:
    return worker(PULL, arguments=arguments, memory=memory, terminal=terminal, typed=typed)


def weights(server: FakeHub) -> list[str]:
    return [name for name in server.fetched("org/tiny") if name.endswith(".safetensors")]


def test_the_verdict_is_told_before_a_weight_is_fetched(server: FakeHub, worker: Worker) -> None:
    [name] = [name for name in server.repos["org/tiny"].files if name.endswith(".safetensors")]
    server.repos["org/tiny"].claimed[name] = "0" * 64  # so that what was fetched is refused
    code, told, verdict = pull(worker, memory=10**10)
    assert code == 1 and told == "" and weights(server)
    first, second, *rest = verdict.splitlines()
    assert (
        "org/tiny: " in first
        and "org/tiny: resident; with " in second
        and "10.0 GB that it may use of a test" in second
    )
    assert "SHA-256" in " ".join(rest) and "does not fit" not in verdict, (
        "the download comes behind it"
    )


@pytest.mark.parametrize(
    ("typed", "agreed"), [("", False), ("n\n", False), ("\n", False), ("y\n", True)]
)
def test_what_does_not_fit_is_asked_about_however_small(
    server: FakeHub, worker: Worker, typed: str, agreed: bool
) -> None:
    code, folder, verdict = pull(worker, memory=10**6, typed=typed)
    assert "org/tiny: does not fit; with " in verdict and " that it may use of a test" in verdict
    assert "does not fit into the memory of this machine. Go on? [y/N]" in verdict
    assert (bool(weights(server)), bool(folder), code) == (agreed, agreed, 0 if agreed else 1)


@pytest.mark.parametrize(
    ("arguments", "memory", "terminal"),
    [((), 10**10, True), (("--yes",), 10**6, True), ((), 10**6, False)],
    ids=["it fits", "-y", "nobody there"],
)
def test_nobody_is_asked_where_it_fits_or_the_answer_is_known(
    server: FakeHub, worker: Worker, arguments: tuple[str, ...], memory: int, terminal: bool
) -> None:
    code, folder, verdict = pull(worker, *arguments, memory=memory, terminal=terminal)
    assert (code, bool(folder), bool(weights(server)), "Go on?" in verdict) == (
        0,
        True,
        True,
        False,
    )
    assert ("does not fit" in verdict) is (memory == 10**6)
