"""Counters of streaming, compared with the reads that happen."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from raw_safetensors import all_closed, open_in

from mlxarch.cli.stats import memory_line, memory_stats, streaming_line, streaming_stats
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.quantization.scheme import Quantization
from streamed import attached, load
from tiny_moe import make_moe

PROMPT = np.random.default_rng(5).integers(0, 96, 20).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "model", packed=Quantization(4, 32))


def generate(model: Any, tokens: int) -> None:
    session = Session(model.make_caches(), renew=model.make_caches)
    for _ in decode(model, session, PROMPT, Sampling(), tokens):
        pass


def test_bytes_are_those_of_the_records_that_were_read(folder: Path) -> None:
    model = load(folder, 4)
    read = []
    for layer in attached(model).layers.values():

        def noted(
            expert: int, buffers: Any, records: Any = layer.records, real: Any = layer.records.read
        ) -> None:
            read.append(records.nbytes)
            real(expert, buffers)

        layer.records.read = noted
    generate(model, 6)
    stats = attached(model).stats
    assert stats.bytes_read == sum(read) and stats.wanted - stats.hits == len(read)
    assert 0 < stats.hit_rate < 1 and stats.read_seconds > 0 and stats.sync_seconds > 0


def test_decoded_tokens_are_counted_without_the_prompt(folder: Path) -> None:
    model = load(folder, 4)
    generate(model, 1)
    stats = attached(model).stats
    before = stats.bytes_read
    assert (stats.decoded, stats.decode_bytes) == (0, 0) and before > 0
    generate(model, 6)
    assert stats.decoded == 5 and stats.bytes_per_token == stats.decode_bytes / 5
    assert 0 < stats.decode_bytes < stats.bytes_read - before


def test_the_last_tokens_hits_are_those_of_the_last_64(folder: Path) -> None:
    model = load(folder, 11)
    generate(model, 100)
    stats = attached(model).stats
    assert stats.decoded == 99 and len(stats._recent) == 64
    assert all(wanted == 6 for wanted, _ in stats._recent)  # 3 experts in each of 2 layers
    assert stats.steady_hit_rate > stats.hit_rate


def test_the_bank_takes_what_its_slots_take(folder: Path) -> None:
    sizes = {count: attached(load(folder, count)).nbytes for count in (1, 3, 9)}
    assert sizes[3] == 3 * sizes[1] and sizes[9] == 9 * sizes[1]


def test_a_person_and_a_program_see_it(folder: Path) -> None:
    model = load(folder, 4)
    generate(model, 6)
    plan = SimpleNamespace(process_peak=5_000_000_000, mlx_peak=4_000_000_000)
    shown: Any = SimpleNamespace(streaming=attached(model), plan=plan)
    line, found = streaming_line(shown), streaming_stats(shown)
    assert line and found
    assert line.startswith("experts from the disk: ") and "s computing experts" in line
    assert (
        found["bytes_read"] == attached(model).stats.bytes_read
        and found["bank_bytes"] == attached(model).nbytes
    )
    assert memory_line(shown).count(" planned") == 2 and "of 5.0 GB" in memory_line(shown)
    taken = memory_stats(shown)
    assert (taken["peak_bytes"] or 0) > (taken["peak_mlx_bytes"] or 0) > 0 and taken[
        "planned_mlx_bytes"
    ] == plan.mlx_peak
    shown.plan = None
    assert "planned" not in memory_line(shown) and memory_stats(shown)["planned_bytes"] is None
    shown.streaming = shown.streamed_rows = None
    assert streaming_line(shown) is None and streaming_stats(shown) is None


def test_a_model_that_is_let_go_of_takes_its_banks_and_files_with_it(folder: Path) -> None:
    gc.collect()
    gc.disable()  # nothing must wait for a collection
    try:
        before = mx.get_active_memory()
        model = load(folder, 8)
        generate(model, 3)
        assert mx.get_active_memory() - before > attached(model).nbytes
        assert open_in(folder) > 0
        del model
        assert mx.get_active_memory() - before < 10_000
        assert all_closed(folder)
    finally:
        gc.enable()
