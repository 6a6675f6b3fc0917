"""Names of models: whatever a command prints is known to every command, and what is here is used."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf
from fake_hub import FakeHub, Repo, Worker, environment
from tiny_chat import make_chat_model

from mlxarch.errors import InvalidInput, ModelNotFound
from mlxarch.quantize import convert
from mlxarch.store.describe import describe
from mlxarch.store.names import is_name, resolve_name
from mlxarch.store.obtain import obtain

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba98765432100123456789abcdef01234567"
RUN = """
import json
from click.testing import CliRunner
from mlxarch.cli.main import cli
found = CliRunner().invoke(cli, arguments, input="hi\\n")
return [found.exit_code, found.stdout, found.stderr]
"""
# Arguments around the name, and what a command may say of a model that it knows and cannot work on
COMMANDS: dict[str, tuple[list[str], str]] = {
    "run": (["hi", "-n", "2"], ""),
    "chat": (["-n", "2"], ""),
    "pull": ([], ""),
    "show": ([], ""),
    "fit": (["--machine", "m4-16gb"], ""),
    "compare": ([], ""),
    "eval": (["--tokens", "16", "--context", "16"], ""),
    "verify": ([], "has no receipt.json"),
    "tune": ([], "nothing to tune"),
    "quantize": (["--method", "round", "--no-eval", "--bits", "8"], "quantized already"),
    "pack": ([], "nothing to pack"),
    "slice": (["--to", "e2b"], "Gemma 3n"),
}


def put_snapshot(home: Path, repo: str, commit: str, model: Path, ref: str = "") -> None:
    """A snapshot in the Hub's cache, with a branch that names it."""
    folder = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    if ref:
        (folder / "refs" / ref).write_text(commit)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_chat_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    return convert(model, model.with_name("quantized"), bits=8, method="round").output


@pytest.fixture(scope="module")
def worker(
    model: Path, quantized: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A process in which six models are installed, and no Hub can be reached."""
    home = tmp_path_factory.mktemp("home")
    own = home / "mlxarch" / "data" / "models"
    for name in ("big--ft-8bit", "smollm2-135m-8bit", "file.Q4_1-0123abcd-original"):
        shutil.copytree(quantized, own / name)
    shutil.copytree(model, home / "extra" / "My-Model")
    shutil.copytree(model, home / "extra" / "publisher" / "Other-7B")
    put_snapshot(home, "org/cached", COMMIT, model, ref="main")
    put_snapshot(home, "org/cached", OLD_COMMIT, model)
    (home / "mlxarch" / "config").mkdir()
    (home / "mlxarch" / "config" / "config.toml").write_text('[aliases]\nwork = "big--ft-8bit"\n')
    work = home / "work"
    work.mkdir()
    places = environment(home, "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    worker = Worker(places | {"MLXARCH_MODELS": str(home / "extra")})
    worker("import os; os.chdir(folder)", folder=work)
    yield worker
    worker.close()


PRINTED = (
    "big--ft-8bit",
    "file.Q4_1-0123abcd-original",
    "My-Model",
    "org/cached",
    f"org/cached@{OLD_COMMIT[:12]}",
    "Other-7B",
    "smollm2-135m-8bit",
)


def test_the_installed_models_are_listed_by_these_names(worker: Worker) -> None:
    code, out, _ = worker(RUN, arguments=["list", "--installed"])
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(PRINTED)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_that_is_printed_works_in_every_command(worker: Worker, command: str) -> None:
    options, allowed = COMMANDS[command]
    names = (*PRINTED, "publisher/Other-7B", "work")
    if command != "quantize":  # which needs the originals of these
        names += ("big/ft", "smollm2-135m")
    for name in names:
        code, out, err = worker(RUN, arguments=[command, name, *options])
        refused = code and not (allowed and allowed in err)
        assert not refused, f"{command} {name}: {out}{err}"
        worker("import glob, shutil; [shutil.rmtree(path) for path in glob.glob('*')]")


def test_a_copy_that_is_here_is_used_before_the_original_is_fetched(
    quantized: Path, model: Path, tmp_path: Path
) -> None:
    server = FakeHub()
    server.repos["big/ft"] = Repo({path.name: path.read_bytes() for path in model.iterdir()})
    worker = Worker(environment(tmp_path, server.url))
    get = "from mlxarch.store.obtain import obtain; return str(obtain(name, bits=bits))"
    try:
        shutil.copytree(quantized, tmp_path / "mlxarch" / "data" / "models" / "big--ft-8bit")
        assert worker(get, name="big/ft", bits=None).endswith("big--ft-8bit")
        assert server.requests == []
        assert "models--big--ft" in worker(get, name="big/ft", bits="original")
        assert "models--big--ft" in worker(get, name="big/ft", bits=None), "the exact one is here"
    finally:
        worker.close()
        server.close()


def test_of_several_copies_the_largest_that_fits_is_used(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path))
    own = tmp_path / "data" / "models"
    for bits in (6, 3):
        shutil.copytree(quantized, own / f"smollm3-3b-{bits}bit")
    verdicts = {"6bit": "does not fit", "3bit": "resident"}
    monkeypatch.setattr(
        "mlxarch.store.names._verdict", lambda folder, _: verdicts[folder.name[-4:]]
    )
    monkeypatch.setattr("mlxarch.store.names._SAFE_WEIGHT_FRACTION", 0)
    assert obtain("smollm3-3b") == own / "smollm3-3b-3bit"
    verdicts["6bit"] = "streamed"
    assert obtain("smollm3-3b") == own / "smollm3-3b-3bit"
    verdicts["6bit"] = "resident"
    assert obtain("smollm3-3b") == own / "smollm3-3b-6bit"


def test_a_name_that_two_folders_have_is_not_guessed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for publisher in ("one", "two"):
        shutil.copytree(model, tmp_path / publisher / "Model-7B")
    monkeypatch.setenv("MLXARCH_MODELS", str(tmp_path))
    with pytest.raises(InvalidInput, match="one/Model-7B, .*two/Model-7B; give the path"):
        resolve_name("model-7b")
    assert resolve_name("two/Model-7B").path == tmp_path / "two" / "Model-7B"


@pytest.mark.parametrize(
    ("name", "repo", "bits"),
    [
        ("big--ft-8bit", "big/ft", 8),
        ("big--ft@0123456789ab-4bit", "big/ft", 4),
        ("a--b--c-original", "a/b--c", "original"),
    ],
)
def test_the_name_of_a_conversion_says_what_to_convert(
    name: str, repo: str, bits: int | str
) -> None:
    found = resolve_name(name)
    assert (found.repo, found.bits) == (repo, bits)


@pytest.mark.parametrize("name", ["qwen3", "Qwen-3", "gemma3:latest", "gpt-oss", "llama3.2"])
def test_a_family_is_answered_with_the_largest_that_fits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxarch.system import machines

    monkeypatch.setattr(
        machines, "this_machine", lambda: machines.Machine("a test", 4 * 10**9, "cpu")
    )
    with pytest.raises(ModelNotFound) as caught:
        resolve_name(name)
    largest = {"qwen3": "qwen3-4b-4bit", "qwen-3": "qwen3-4b-4bit", "llama3.2": "llama3.2-3b-4bit"}
    wanted = largest.get(name.lower()) or {"gpt-oss": "None of them fits"}.get(
        name, "gemma3-4b-4bit"
    )
    assert wanted in str(caught.value) and "family" in str(caught.value)


def test_a_misspelt_installed_name_is_answered_with_the_right_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "My-Finetune-8bit")
    monkeypatch.setenv("MLXARCH_MODELS", str(tmp_path))
    with pytest.raises(ModelNotFound, match="there is My-Finetune-8bit"):
        resolve_name("my-fintune-8bit")


def test_a_weight_file_stands_for_its_folder(model: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        assert obtain(str(model / name)) == model
        assert obtain(os.path.relpath(model / name)) == Path(os.path.relpath(model))
    alone = tmp_path / "model.safetensors"
    alone.write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="weight file alone"):
        resolve_name(str(alone))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="is a file, and no model"):
        resolve_name(str(tmp_path / "model.bin"))


def test_a_gguf_file_is_described(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.GGUF", tiny_gguf.weights())
    found = describe(str(file))
    assert found["architecture"] == "llama" and found["source_bytes"] == file.stat().st_size
    assert "F32" in found["tensors"] and str(file) in found["use"]
    with pytest.raises(ModelNotFound, match="no such file"):
        describe(tmp_path / "gone.gguf")


def test_words_of_a_prompt_are_no_names() -> None:
    assert is_name("qwen3-8b") and is_name("org/name") and is_name("./x")
    assert not any(map(is_name, ("why", "qwen3", "a/b/c", "hello world", "")))
