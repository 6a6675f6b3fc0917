"""pull, list, show, rm, paths."""

import fcntl
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxarch.cli import confirm as confirm_module
from mlxarch.errors import Declined
from mlxarch.hub import catalog
from mlxarch.progress import silent
from mlxarch.store import obtain as store
from mlxarch.store.obtain import Acquisition


@pytest.fixture
def home_with_models(home: Path, tiny: str) -> Path:
    for name in ("smollm2-135m-8bit", "smollm2-135m-original", "my-model-4bit"):
        shutil.copytree(tiny, home / "data" / "models" / name)
    return home


def test_list_shows_the_catalog_and_marks_what_is_here(execute, home_with_models):
    result = execute("list")
    lines = result.stdout.splitlines()
    assert all(any(name in line.split() for line in lines) for name in catalog.entries())
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1 and marked[0].split()[1] == "smollm2-135m" and "original" in marked[0]
    assert any(
        line.startswith("my-model-4bit") for line in lines[lines.index("Also on this machine:") :]
    )
    assert execute("ls", "--all").stdout == result.stdout


def test_list_fits_into_80_columns_and_ends_with_the_status(invoke, home_with_models):
    lines = invoke("list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    status = {line.lstrip("* ").split()[0]: line for line in lines[1 : 1 + len(catalog.entries())]}
    assert status["smollm2-135m"].endswith("here: original, original")
    assert status["qwen3-8b"].endswith("ready: 8, 4")
    assert status["gemma3-27b"].endswith("to quantize, gated")
    assert status["gpt2-xl"].endswith("to quantize")


def test_list_without_models_marks_nothing(execute):
    result = execute("list")
    assert result.returncode == 0 and "smollm2-135m" in result.stdout
    assert not any(line.startswith("*") for line in result.stdout.splitlines())
    assert "mlxarch pull" in execute("list", "--installed").stdout
    assert json.loads(execute("list", "--installed", "--json").stdout) == []


def test_list_installed_shows_what_is_here_alone(execute, home_with_models):
    lines = execute("list", "--installed").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "my-model-4bit",
        "smollm2-135m-8bit",
        "smollm2-135m-original",
    ]
    report = json.loads(execute("list", "--installed", "--json").stdout)
    assert [model["name"] for model in report] == [line.split()[0] for line in lines[1:]]
    assert set(report[0]) == {"name", "bits", "bytes", "architecture", "origin", "path"}


def test_list_json_has_every_entry_with_its_copies(execute, home_with_models):
    report = json.loads(execute("list", "--json").stdout)
    here = {entry["name"]: len(entry["installed"]) for entry in report["catalog"]}
    assert list(here) == list(catalog.entries())
    assert here["smollm2-135m"] == 2 and sum(here.values()) == 2
    assert [model["name"] for model in report["others"]] == ["my-model-4bit"]


def test_show_says_what_is_known(invoke, home, tiny):
    text = invoke("show", "Qwen-3:8b").stdout
    assert "Qwen3 8B" in text and "apache-2.0" in text and "Qwen/Qwen3-8B@" in text
    assert json.loads(invoke("show", "qwen3-8b", "--json").stdout)["parameters"] > 8e9
    folder = invoke("show", tiny).stdout
    assert "llama" in folder and "here:" not in folder and "here:" in text
    unknown = invoke("show", "qwen3-9b")
    assert unknown.exit_code == 3 and "qwen3-8b" in unknown.stderr


def test_paths_prints_places_of_its_own(invoke, home):
    report = json.loads(invoke("paths", "--json").stdout)
    assert {report[name] for name in ("models", "state")} == {
        str(home / "data" / "models"),
        str(home / "state"),
    }
    assert str(home / "cache") in invoke("paths").stdout


def test_rm_asks_first_and_removes_only_its_own(
    invoke, execute, home_with_models, tiny, monkeypatch
):
    models = home_with_models / "data" / "models"
    refused = invoke("rm", "smollm2-135m-8bit")
    assert (
        refused.exit_code == 2
        and "--yes" in refused.stderr
        and (models / "smollm2-135m-8bit").exists()
    )
    monkeypatch.setattr("mlxarch.cli.commands.models.rm.is_terminal", lambda stream: True)
    assert "stays" in invoke("rm", "smollm2-135m-8bit", input="n\n").stderr
    assert (models / "smollm2-135m-8bit").exists()
    assert invoke("rm", "smollm2-135m-8bit", input="y\n").exit_code == 0
    assert not (models / "smollm2-135m-8bit").exists()
    assert invoke("rm", "my-model-4bit", "smollm2-135m", "-y").exit_code == 0
    assert list(models.iterdir()) == []
    assert invoke("rm", "-y", "my-model-4bit").exit_code == 3
    assert invoke("rm", "-y", tiny).exit_code == 3 and Path(tiny).exists()


def test_rm_asks_only_about_what_it_can_remove(invoke, home_with_models, tiny, monkeypatch):
    """And says how much it is, so that a person knows what is decided."""
    monkeypatch.setattr("mlxarch.cli.commands.models.rm.is_terminal", lambda stream: True)
    for name, code in (("smollm2-360m", 3), ("smollm3-3b-4bit", 3), (tiny, 3), ("smollm2-135m", 2)):
        refused = invoke("rm", name, input="y\n")
        assert refused.exit_code == code and "Remove" not in refused.stderr, refused.stderr
    asked = invoke("rm", "my-model-4bit", input="n\n")
    assert "Remove my-model-4bit, " in asked.stderr and " MB? [y/N]" in asked.stderr
    assert len(list((home_with_models / "data" / "models").iterdir())) == 3


def test_rm_asks_about_what_a_killed_run_left_unless_somebody_works_on_it(
    invoke, home, monkeypatch
):
    monkeypatch.setattr("mlxarch.cli.commands.models.rm.is_terminal", lambda stream: True)
    left = home / "data" / "models" / "qwen3-8b-4bit.partial"
    (left / "model").mkdir(parents=True)
    (left / "model" / "model.safetensors").write_bytes(bytes(2_500_000))
    (left / "lock").touch()
    with open(left / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Remove" not in invoke("rm", "qwen3-8b-4bit", input="y\n").stderr
    declined = invoke("rm", "qwen3-8b-4bit", input="n\n")
    assert "Remove qwen3-8b-4bit, 2.5 MB?" in declined.stderr and "stays" in declined.stderr
    assert (left / "model" / "model.safetensors").exists()
    assert invoke("rm", "qwen3-8b-4bit", input="y\n").exit_code == 0 and not left.exists()


def test_list_does_not_stumble_over_what_vanishes_meanwhile(invoke, home, monkeypatch):
    """A file of a model that another process is just completing."""
    left = home / "data" / "models" / "qwen3-8b-4bit.partial"
    left.mkdir(parents=True)
    (left / "stays").write_bytes(bytes(1_000_000))

    def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        yield str(folder), [], ["gone before it is looked at", "stays"]

    monkeypatch.setattr("mlxarch.store.installed.os.walk", walk)
    assert "qwen3-8b-4bit  1.0 MB" in invoke("list").stdout


def test_what_a_killed_run_left_is_listed_and_removed(invoke, home_with_models):
    models = home_with_models / "data" / "models"
    assert "Unfinished" not in invoke("list").stdout
    left = models / "qwen3-8b-4bit.partial"
    (left / "model").mkdir(parents=True)
    (left / "model" / "model.safetensors").write_bytes(bytes(2_500_000))
    (left / "lock").touch()
    before = sorted(path.name for path in models.iterdir())
    assert "qwen3-8b-4bit  2.5 MB" in invoke("list").stdout.split("Unfinished")[1]
    with open(left / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = invoke("rm", "-y", "qwen3-8b-4bit")
        assert busy.exit_code == 1 and "another process is writing" in busy.stderr
    assert sorted(path.name for path in models.iterdir()) == before
    assert invoke("rm", "-y", "qwen3-8b-4bit").stderr == "qwen3-8b-4bit: 2.5 MB freed\n"
    assert sorted(path.name for path in models.iterdir()) == [
        name for name in before if name != left.name
    ]
    assert invoke("rm", "-y", "qwen3-8b-4bit").exit_code == 3


def test_pull_prints_the_folder_and_get_is_the_same(invoke, tiny):
    result = invoke("pull", tiny)
    assert (result.exit_code, result.stdout) == (0, f"{tiny}\n")
    assert invoke("get", "-m", tiny).stdout == result.stdout
    assert invoke("pull").exit_code == 2


def test_pull_without_a_network_says_so(execute):
    result = execute(
        "pull", "org/model"
    )  # the Hub's library reads its environment once, when it is imported
    assert result.returncode == 5 and "HF_HUB_OFFLINE" in result.stderr


@pytest.mark.parametrize(
    ("gigabytes", "yes", "terminal", "typed", "asked", "agreed"),
    [
        (1, False, True, "", False, True),
        (6, False, True, "y\n", True, True),
        (6, False, True, "n\n", True, False),
        (6, True, True, "", False, True),
        (6, False, False, "", False, False),
        (1, False, False, "", False, True),
    ],
    ids=["small", "large, yes", "large, no", "large, -y", "large, nobody", "small, nobody"],
)
def test_a_large_download_is_asked_about(
    invoke, home, monkeypatch, capsys, gigabytes, yes, terminal, typed, asked, agreed
):
    plan = Acquisition(
        "big-8bit", "download org/big", gigabytes * 10**9, gigabytes * 10**9, home / "big"
    )

    def obtain(name: str, *, confirm, **_: object) -> Path:
        if not confirm(plan):
            raise Declined("not agreed to")
        return plan.target

    monkeypatch.setattr(store, "obtain", obtain)
    monkeypatch.setattr(confirm_module, "is_terminal", lambda stream: terminal)
    result = invoke("pull", "big", *(["-y"] if yes else []), input=typed)
    assert "big-8bit: download org/big" in result.stderr
    assert ("Go on?" in result.stderr) is asked
    refused = 1 if terminal else 2
    assert result.exit_code == (0 if agreed else refused)
    assert ("--yes agrees" in result.stderr) is (result.exit_code == 2)
    assert result.stdout == (f"{plan.target}\n" if agreed else "")


@pytest.mark.parametrize(
    ("seconds", "terminal", "code"), [(30, False, 0), (25_000, True, 1), (25_000, False, 2)]
)
def test_a_start_that_takes_hours_is_asked_about(
    invoke, home, monkeypatch, seconds, terminal, code
):
    plan = Acquisition(
        "big-4bit", "org/big", 0, 10**9, home / "big", seconds=seconds, quicker="`big-8bit`"
    )

    def obtain(name: str, *, confirm, **_: object) -> Path:
        if not confirm(plan):
            raise Declined("not agreed to")
        return plan.target

    monkeypatch.setattr(store, "obtain", obtain)
    monkeypatch.setattr(confirm_module, "is_terminal", lambda stream: terminal)
    result = invoke("pull", "big", input="n\n")
    assert result.exit_code == code
    assert ("about 7 hours" in result.stderr) is (seconds > 60)
    assert ("quicker: `big-8bit`" in result.stderr) is (seconds > 60)
    assert invoke("pull", "big", "--yes").exit_code == 0


def test_bits_reach_the_store_as_it_takes_them(invoke, home, monkeypatch):
    seen = []

    def obtain(name: str, *, bits: object, **_: object) -> Path:
        seen.append(bits)
        return home

    monkeypatch.setattr(store, "obtain", obtain)
    for arguments in ([], ["--bits", "4"], ["--bits", "original"]):
        invoke("pull", "smollm2-135m", *arguments)
    assert seen == [None, 4, "original"]


def test_a_stream_that_is_closed_is_no_terminal():
    from mlxarch.cli.output import is_terminal

    stream = io.StringIO()
    stream.close()
    assert not is_terminal(stream) and not is_terminal(None)


def test_pull_measures_what_it_quantized_unless_told_otherwise(invoke, home, monkeypatch):
    seen = []

    def obtain(name: str, *, evaluate: bool, **_: object) -> Path:
        seen.append(evaluate)
        return home

    monkeypatch.setattr(store, "obtain", obtain)
    for arguments in ([], ["--no-eval"]):
        invoke("pull", "smollm2-135m", *arguments)
    assert seen == [True, False]


@pytest.mark.parametrize(("bits", "measured"), [(4, True), ("original", False)])
def test_what_is_quantized_from_a_source_that_stays_is_measured(
    home, tmp_path, monkeypatch, bits, measured
):
    from mlxarch.hub.catalog import HubSource
    from mlxarch.store import acquire as candidates

    seen = []
    monkeypatch.setattr(
        "mlxarch.quantize.convert", lambda *_, evaluate, **__: seen.append(evaluate)
    )
    way = candidates.DownloadAndQuantize("org/model", bits, HubSource("org/model", "main"))
    way._cached = tmp_path
    way.run(silent, True)
    way.run(silent)
    assert seen == [measured, False]
