"""Cached prompts on the disk: they outlive the process, keep to their limits, and are not trusted."""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import parity
from mlxarch.blocks import CausalLM
from mlxarch.engine import Engine, GenerationRequest
from mlxarch.engine.prefix.files import DiskLimits
from mlxarch.generation.sampling import Sampling
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization

KINDS = {
    "full": ("qwen3", None),
    "full, 8 bits": ("qwen3", 8),
    "latent": ("deepseek_v3", None),
    "chosen keys": ("deepseek_v32", None),
    "sliding": ("gemma3_text", None),
    "recurrent states": ("qwen3_5", None),
}
FIRST = tuple(np.random.default_rng(0).integers(0, 48, 45).tolist())


def load(name: str) -> CausalLM:
    model = load_model(parity.GOLDEN / name)[0]
    mx.eval(model.parameters())
    return model


def run(engine: Engine, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The answer, and the number of cached tokens."""
    sampling = Sampling(temperature=1.0, seed=1)
    outputs = list(engine.stream(GenerationRequest(prompt=prompt, max_tokens=8, sampling=sampling)))
    report = next(output.prompt for output in outputs if output.prompt is not None)
    return tuple(t for output in outputs for t in output.tokens), report.cached_tokens


def cold(model: CausalLM, prompt: tuple[int, ...]) -> tuple[int, ...]:
    with Engine(model, chunk=16, prefix_cache_bytes=0, probe=False) as engine:
        return run(engine, prompt)[0]


def engine(model: CausalLM, folder: Path, key: str = "a", **settings: object) -> Engine:
    return Engine(
        model,
        chunk=16,
        prefix_cache_dir=folder,
        prefix_key=key,
        probe=False,
        **settings,  # pyright: ignore[reportArgumentType]
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_continues_after_a_restart(kind: str, tmp_path: Path) -> None:
    name, bits = KINDS[kind]
    kv = None if bits is None else Quantization(bits, 64)
    model = load(name)
    with engine(model, tmp_path, kv=kv) as first:
        answer, _ = run(first, FIRST)
        longer = FIRST + answer + (1, 2, 3)
        run(first, longer)
    second = longer + (4, 5, 6, 7)
    with (
        engine(model, tmp_path, kv=kv) as again,
        Engine(model, chunk=16, kv=kv, prefix_cache_bytes=0) as without,
    ):
        got, cached = run(again, second)
        assert cached >= len(longer)
        assert got == run(without, second)[0]
    with engine(model, tmp_path, key="other weights", kv=kv) as other:
        assert run(other, second)[1] == 0


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    with engine(load("qwen3"), tmp_path) as first:
        run(first, FIRST)
    found = files(tmp_path)
    assert found and list(tmp_path.glob("*/*.part")) == []
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
    assert stat.S_IMODE(found[0].parent.stat().st_mode) == 0o700


def change(edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        arrays = load_file(path)
        edit(arrays)
        save_file(arrays, path)

    return apply


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "garbage": lambda path: path.write_bytes(os.urandom(3000)),
    "empty": lambda path: path.write_bytes(b""),
    "pipe": to_pipe,
    "no ids": change(lambda arrays: arrays.pop("ids")),
    "ids out of range": change(lambda arrays: arrays["ids"].__setitem__(3, 10**6)),
    "negative ids": change(lambda arrays: arrays["ids"].__setitem__(3, -1)),
    "other length": change(
        lambda arrays: arrays.update({"part.0.0": arrays["part.0.0"][:, :, :-1].copy()})
    ),
    "other heads": change(lambda arrays: arrays.update({"part.1.0": arrays["part.1.0"][:, :1]})),
    "other type": change(
        lambda arrays: arrays.update({"part.0.0": arrays["part.0.0"].astype(np.float16)})
    ),
    "a layer is missing": change(lambda arrays: arrays.pop("part.1.1")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_deleted_and_the_prompt_is_read(damage: str, tmp_path: Path) -> None:
    model = load("qwen3")
    with engine(model, tmp_path) as first:
        run(first, FIRST)
    longest = max(files(tmp_path), key=lambda path: path.stat().st_size)
    DAMAGES[damage](longest)
    with engine(model, tmp_path) as again:
        got, cached = run(again, (*FIRST, 1, 2))
    assert cached == 0 and got == cold(model, (*FIRST, 1, 2))
    assert not longest.is_fifo()


def test_the_control_for_damages_finds_the_file(tmp_path: Path) -> None:
    model = load("qwen3")
    with engine(model, tmp_path) as first:
        run(first, FIRST)
    with engine(model, tmp_path) as again:
        assert run(again, (*FIRST, 1, 2))[1] == len(FIRST)


@pytest.mark.parametrize(
    "limits",
    [DiskLimits(written_bytes=1000), DiskLimits(free_share=1.0, free_bytes=2**62)],
)
def test_nothing_is_written_beyond_the_limits(limits: DiskLimits, tmp_path: Path) -> None:
    with engine(load("qwen3"), tmp_path, disk_limits=limits) as first:
        run(first, FIRST)
    assert files(tmp_path) == []


def test_old_files_and_those_beyond_the_size_are_deleted(tmp_path: Path) -> None:
    model = load("qwen3")
    with engine(model, tmp_path) as first:
        run(first, FIRST)
        run(first, FIRST[::-1])
    found = files(tmp_path)
    past = time.time() - 31 * 86400
    os.utime(found[0], (past, past))
    engine(model, tmp_path).close()
    assert files(tmp_path) == found[1:]
    most = sum(path.stat().st_size for path in found[1:]) - 1
    engine(model, tmp_path, disk_limits=DiskLimits(most_bytes=most)).close()
    assert len(files(tmp_path)) == len(found) - 2


def test_the_number_of_files_is_limited_and_deleted_ones_are_forgotten(tmp_path: Path) -> None:
    model = load("qwen3")
    with engine(model, tmp_path, disk_limits=DiskLimits(most_files=3)) as first:
        for number in range(6):
            run(first, (number, *FIRST[:20]))
            wait_for(lambda: not first._worker.scheduler.prefixes._files._tasks.qsize())  # pyright: ignore
        kept = first._worker.scheduler.prefixes._files._entries  # pyright: ignore
        first.close()
        assert len(files(tmp_path)) == 3
        assert {entry.path for entry in kept.values()} == set(files(tmp_path))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
