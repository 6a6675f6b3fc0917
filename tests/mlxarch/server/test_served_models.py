"""Several models of one server: loaded on demand, unloaded when idle."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, running_server
from tiny_chat import make_chat_model

from mlxarch.server.http.errors import ApiError
from mlxarch.server.served_models import ServedModels
from mlxarch.server.settings import Settings


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of two models."""
    other = make_chat_model(tmp_path_factory.mktemp("served") / "other", seed=1)
    with running_server([tiny, other]) as live:
        live.wait_until_ready()
        yield live


def loaded(server: LiveServer) -> list[str]:
    return [model["name"] for model in server.get("/api/ps").json["models"]]


def test_a_model_is_loaded_when_it_is_named_and_unloaded_when_told(two: LiveServer):
    assert loaded(two) == ["tiny"]
    assert [model["id"] for model in two.get("/v1/models").json["data"]] == ["tiny", "other"]
    first = two.chat(model="tiny").json["choices"][0]["message"]["content"]
    second = two.chat(model="other").json["choices"][0]["message"]["content"]
    assert first != second
    assert loaded(two) == ["tiny", "other"]
    done = two.post("/api/generate", {"model": "other", "keep_alive": 0}).json
    assert done["done_reason"] == "unload"
    assert loaded(two) == ["tiny"]
    assert two.chat(model="other").json["choices"][0]["message"]["content"] == second


def test_a_model_in_use_is_unloaded_when_its_requests_have_ended(two: LiveServer):
    replies = []

    def ask():
        replies.append(two.chat(model="other", max_tokens=200))

    asking = threading.Thread(target=ask)
    asking.start()
    while not [m for m in two.get("/api/ps").json["models"] if m["name"] == "other" and m["users"]]:
        time.sleep(0.01)
    two.post("/api/generate", {"model": "other", "keep_alive": 0})
    asking.join()
    assert replies[0].json["usage"]["completion_tokens"] == 200
    deadline = time.monotonic() + 10
    while "other" in loaded(two):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_short_keep_alive_unloads_an_idle_model(two: LiveServer):
    assert two.chat(model="other", keep_alive=0).status == 200
    deadline = time.monotonic() + 10
    while "other" in loaded(two):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_models_answer_side_by_side(two: LiveServer):
    expected = {
        name: two.chat(model=name).json["choices"][0]["message"] for name in ("tiny", "other")
    }
    wrong = []

    def ask(name: str):
        for _ in range(3):
            if two.chat(model=name).json["choices"][0]["message"] != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("tiny", "other") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ps_and_stop_speak_with_a_server(two: LiveServer):
    from click.testing import CliRunner

    from mlxarch.cli.main import cli

    address = f"http://127.0.0.1:{two.port}"
    two.chat(model="other")
    run = CliRunner().invoke
    listed = run(cli, ["ps", "--server", address])
    assert listed.exit_code == 0
    assert "other" in listed.stdout
    assert run(cli, ["stop", "other", "--server", address]).exit_code == 0
    assert "other" not in run(cli, ["ps", "--server", address]).stdout
    refused = run(cli, ["stop", "third", "--server", address])
    assert refused.exit_code == 1
    assert "tiny, other" in refused.stderr
    nobody = run(cli, ["ps", "--server", "http://127.0.0.1:9"])
    assert "mlxarch serve" in nobody.stderr


def test_names_are_found_in_every_spelling_and_never_as_paths():
    async def make() -> ServedModels:
        def load(name, progress):
            raise AssertionError

        names = ["qwen3-8b-4bit", "org/repo", "smollm2-135m"]
        aliases = {"work": "qwen3-8b-4bit"}
        return ServedModels(names, load, Settings(), lambda error: None, aliases)

    import asyncio

    models = asyncio.run(make())
    for name in ("qwen3-8b-4bit", "Qwen3:8B", "qwen3-8b", "work", "Work:latest", None, "default"):
        assert models.find(name).name == "qwen3-8b-4bit"
    assert models.find("org/repo").name == "org/repo"
    assert models.find("smollm2-135m:latest").name == "smollm2-135m"
    for name in (
        "qwen3-8b-8bit",
        "/etc",
        "../org/repo",
        "./qwen3-8b",
        "org/repo@main",
        "a" * 10_000,
    ):
        with pytest.raises(ApiError):
            models.find(name)
