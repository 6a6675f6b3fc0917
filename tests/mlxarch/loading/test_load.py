"""From a folder to a model: values, memory, files that change meanwhile, and traps."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from raw_safetensors import all_closed, open_in
from safetensors.numpy import load_file, save_file

import mlxarch
from mlxarch.errors import CheckpointError
from mlxarch.loading import load as loading
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.scheme import Quantization
from tiny_llama import make_llama

TOKENS = mx.array([[1, 90, 33, 7, 60]])
COMMON = Quantization(4, 64)

# Quantized folders


def packed_and_plain(
    folder: Path, choose: Callable[[str], Quantization | None], common: Quantization
) -> list[Path]:
    """A folder as MLX's own tools write it, and one with the values that its packed matrices stand for."""
    make_llama(folder / "source", hidden=128)
    config = json.loads((folder / "source" / "config.json").read_text())
    weights = {
        name: mx.array(array)
        for name, array in load_file(folder / "source" / "model.safetensors").items()
    }
    packed: dict[str, mx.array] = {}
    table: dict[str, Any] = {
        "bits": common.bits,
        "group_size": common.group_size,
        "mode": common.mode,
    }
    for name, weight in list(weights.items()):
        path, settings = name.removesuffix(".weight"), choose(name)
        if weight.ndim < 2 or settings is None:
            packed[name] = weight
            table |= {path: False} if weight.ndim > 1 else {}
            continue
        if settings != common:
            table[path] = {"bits": settings.bits, "group_size": settings.group_size}
            table[path] |= {"mode": settings.mode} if settings.mode != "affine" else {}
        parts = mx.quantize(weight, settings.group_size, settings.bits, settings.mode)
        packed |= {
            f"{path}.{part}": array
            for part, array in zip(("weight", "scales", "biases"), parts, strict=False)
        }
        weights[name] = settings.dequantize(
            *parts[:2], parts[2] if len(parts) > 2 else None, mx.float32
        )
    for kind, arrays in {"packed": packed, "plain": weights}.items():
        (folder / kind).mkdir()
        settings_of_kind = (
            {"quantization": table, "quantization_config": table} if kind == "packed" else {}
        )
        (folder / kind / "config.json").write_text(json.dumps(config | settings_of_kind))
        mx.save_safetensors(str(folder / kind / "model.safetensors"), arrays)
    return [folder / kind for kind in ("packed", "plain", "source")]


def by_name(name: str) -> Quantization | None:
    """Two kinds in one q/k/v, unquantized matrices, a mode of its own."""
    table = {
        "q_proj": Quantization(8, 32),
        "up_proj": None,
        "lm_head": Quantization(6, 64),
        "embed_tokens": None,
    }
    table |= {"down_proj": Quantization(4, 32, "mxfp4")}
    return next((settings for key, settings in table.items() if key in name), COMMON)


def alike(settings: Quantization) -> tuple[Callable[[str], Quantization | None], Quantization]:
    return lambda name: settings, settings


KINDS = {
    "8 bits": alike(Quantization(8, 64)),
    "3 bits": alike(Quantization(3, 128)),
    "2 bits": alike(Quantization(2, 32)),
    "mxfp4": alike(Quantization(4, 32, "mxfp4")),
    "nvfp4": alike(Quantization(4, 16, "nvfp4")),
    "mxfp8": alike(Quantization(8, 32, "mxfp8")),
    "by tensor": (by_name, COMMON),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_computes_what_its_packed_values_say(kind: str, tmp_path: Path) -> None:
    packed, plain, source = packed_and_plain(tmp_path, *KINDS[kind])
    found, wanted, original = (
        load_model(path, dtype="float32")[0](TOKENS) for path in (packed, plain, source)
    )
    assert float(mx.abs(found - wanted).max()) <= 1e-4
    assert float(mx.abs(found - original).max()) > 1e-3  # so the packed values were used


def test_each_matrix_is_packed_as_its_own_settings_say(tmp_path: Path) -> None:
    model: Any = load_model(packed_and_plain(tmp_path, by_name, COMMON)[0])[0]
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.quantization == Quantization(8, 32)
    assert layer.self_attn.k_proj.quantization == COMMON
    assert layer.mlp.up_proj.quantization is model.model.embed_tokens.quantization is None
    assert layer.mlp.down_proj.quantization == Quantization(4, 32, "mxfp4")
    assert layer.mlp.down_proj["scales"].dtype == mx.uint8


# Memory


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_loading_holds_at_most_one_layer_twice(stored: type, shards: int, tmp_path: Path) -> None:
    weights = make_llama(
        tmp_path / "model", layers=8, hidden=256, inner=768, dtype=stored, shards=shards
    )
    size = 4 * sum(array.size for array in weights.values())
    layer = 4 * sum(array.size for name, array in weights.items() if ".layers.0." in name)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(tmp_path / "model", dtype="float32")
    assert size <= mx.get_active_memory() - before <= 1.01 * size
    assert mx.get_peak_memory() - before <= size + 1.1 * layer
    assert 1.1 * layer < size / 7  # the bound tells one layer from two
    mx.eval(model(TOKENS))


# Files that change


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    """Other values in the same place, as a download that starts anew would."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(status.st_size // 2)
        stream.write(bytes(1000))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def replaced(file: Path) -> None:
    other = file.with_suffix(".new")
    save_file({name: array + 1 for name, array in load_file(file).items()}, other)
    other.replace(file)


def replaced_by_another_model(file: Path) -> None:
    other = file.with_suffix(".new")
    save_file({"w": np.zeros(3, np.float32)}, other)
    other.replace(file)


def replaced_by_a_crash(file: Path) -> None:
    """A header that MLX 0.32 reads memory out of bounds for."""
    name = next(iter(load_file(file)))
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [65536] * 4, "data_offsets": [0, 0]}}
    ).encode()
    file.with_suffix(".new").write_bytes(len(header).to_bytes(8, "little") + header)
    file.with_suffix(".new").replace(file)


def removed(file: Path) -> None:
    file.unlink()


CHANGES = [
    truncated,
    emptied,
    overwritten,
    replaced,
    replaced_by_another_model,
    replaced_by_a_crash,
    removed,
]


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_llama(tmp_path / "model", shards=request.param)
    return tmp_path / "model"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_changed_between_its_check_and_its_reading_is_never_read(
    change: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, opened, load = sorted(folder.glob("*.safetensors")), [], mx.load

    def changing(source: Any) -> Any:
        change(files[0])
        return resolve(source)

    def recorded(file: str, **settings: Any) -> Any:
        opened.append(file)
        return load(file, **settings)

    monkeypatch.setattr(mx, "load", recorded)
    load_model(folder)
    assert opened == [str(file) for file in files]
    opened.clear()
    monkeypatch.setattr(loading, "resolve", changing)
    with pytest.raises(CheckpointError, match=rf"{files[0].name}.*changed, replaced or removed"):
        load_model(folder)
    assert str(files[0]) not in opened


@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_changed_while_it_is_read_gives_an_error_and_no_model(
    change: Callable[[Path], None], moment: int, folder: Path
) -> None:
    file, calls = sorted(folder.glob("*.safetensors"))[0], 0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal calls
        if calls == moment:
            change(file)
        calls += 1

    with pytest.raises(CheckpointError, match=rf"{file.name}.*changed, replaced or removed"):
        load_model(folder, progress=progress)
    assert calls > moment


def test_a_file_put_in_the_place_of_one_that_was_loaded_is_read_anew(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    first = load_model(tmp_path / "model")[0](TOKENS)
    replaced(tmp_path / "model" / "model.safetensors")
    assert not mx.allclose(load_model(tmp_path / "model")[0](TOKENS), first, atol=1e-2)


def test_no_file_stays_open(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", shards=3)
    models = [load_model(tmp_path / "model") for _ in range(3)]
    assert all_closed(tmp_path / "model")
    assert len(models) == 3
    with open(next((tmp_path / "model").glob("*.safetensors"))):
        assert open_in(tmp_path / "model") == 1


# Traps


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def trapped(talker_copy: Path) -> Path:
    """A sound model among files that touch ``fired-…`` beside the folder when they are run."""

    def code(name: str) -> str:
        return f"import pathlib\npathlib.Path({str(talker_copy.parent)!r}, 'fired-{name}').touch()\nclass Model: pass\n"

    for module in (
        "modeling_trap",
        "tokenization_trap",
        "sitecustomize",
        "usercustomize",
        "json",
        "mlx",
        "__init__",
    ):
        (talker_copy / f"{module}.py").write_text(code(module))
    (talker_copy / "trap.pth").write_text(code("pth").replace("\n", ";"))
    for name in ("pytorch_model.bin", "tokenizer.pkl", "model.pt"):
        (talker_copy / name).write_bytes(pickle.dumps(Bomb(talker_copy.parent / f"fired-{name}")))
    auto = {
        "AutoModelForCausalLM": "modeling_trap.Model",
        "AutoTokenizer": ["tokenization_trap.Model", None],
    }
    for name, settings in {
        "config.json": {
            "model_file": "modeling_trap.py",
            "auto_map": auto,
            "architectures": ["modeling_trap.Model"],
        },
        "tokenizer_config.json": {"auto_map": auto, "tokenizer_class": "tokenization_trap.Model"},
        "generation_config.json": {
            "custom_generate": "modeling_trap.py",
            "trust_remote_code": True,
        },
    }.items():
        path = talker_copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return talker_copy


CHILD = """
import sys
import mlxarch
clean, trapped = sys.argv[1:]
def use(folder):
    model = mlxarch.load(folder)
    model.generate([{"role": "user", "content": "hello"}], max_tokens=2, sampling=model.recommended_sampling)
use(clean)  # imports what it needs
events = []
watched = ("open", "import", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
sys.addaudithook(lambda event, arguments: events.append((event, str(arguments[0]))) if event in watched else None)
def outside(folder):
    del events[:]
    use(folder)
    return [event for event in events if event[0] != "open" or not event[1].startswith(folder)]
expected, foreign = outside(clean), outside(trapped)
opened = sorted({name[len(trapped) + 1:] for event, name in events if event == "open" and name.startswith(trapped)})
del events[:]
open("/dev/null").close()
assert {event for event, _ in expected} <= {"open"}, expected  # of the user's own settings
print(foreign == expected, opened, events)
"""


def test_a_model_among_traps_loads_and_none_fires(talker: Path, trapped: Path) -> None:
    command = [sys.executable, "-P", "-c", CHILD, str(talker), str(trapped)]
    done = subprocess.run(command, cwd=trapped, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    same, _, rest = done.stdout.partition(" ")
    assert same == "True", (
        done.stdout
    )  # nothing else outside of the folder was opened, nothing imported or started
    assert "'config.json', 'generation_config.json', 'model.safetensors'" in rest
    assert not any(name in rest for name in (".py", ".pth", ".pkl", ".bin", ".pt'"))
    assert rest.rstrip().endswith("[('open', '/dev/null')]")  # it would have been seen
    assert not list(trapped.parent.glob("fired-*"))


def test_the_traps_do_fire_when_they_are_run(trapped: Path) -> None:
    run = "import modeling_trap, pickle; pickle.load(open('tokenizer.pkl', 'rb'))"
    subprocess.run(
        [sys.executable, "-c", run], cwd=trapped, capture_output=True, timeout=60, check=False
    )
    assert {path.name for path in trapped.parent.glob("fired-*")} >= {
        "fired-modeling_trap",
        "fired-tokenizer.pkl",
    }


def test_a_model_loads_from_the_link_farm_of_the_hubs_cache(talker: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(talker.iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    answer = mlxarch.load(snapshot).generate("hello", max_tokens=4).tokens
    assert answer == mlxarch.load(talker).generate("hello", max_tokens=4).tokens
