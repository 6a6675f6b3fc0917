"""A server that the tests of the server share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import THINKING, LiveServer, running_server
from tiny_chat import make_chat_model

MARKS = {"<think>": False, "</think>": False}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that has a switch for thinking."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    return make_chat_model(folder, template=THINKING, context=1280, marks=MARKS)


@pytest.fixture(scope="session")
def server(tiny: Path) -> Iterator[LiveServer]:
    """A server of the tiny model."""
    with running_server([tiny]) as live:
        live.wait_until_ready()
        yield live
