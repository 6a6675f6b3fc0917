"""Tables of embeddings that stay on the disk: the same bits as from memory."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import parity
from mlxarch.blocks import CausalLM
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.checkpoint.tensor_views import Transposed
from mlxarch.errors import (
    CheckpointError,
    EmbeddingReadError,
    GenerationError,
    InvalidInput,
    NonFiniteLogits,
    StreamError,
)
from mlxarch.generation.decode import decode, decode_batch
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.loading.matformer import Slice
from mlxarch.quantize import convert
from mlxarch.ssd_streaming import embeddings
from mlxarch.ssd_streaming.embeddings import LateRows, attach_tables, late_rows
from mlxarch.ssd_streaming.row_cache import RowCache, RowFile
from tiny_gemma3n import (
    MEMORY,
    MODES,
    ROWS,
    SSD,
    TABLE,
    VOCAB,
    generated,
    load,
    make_gemma3n,
    prompt,
    table_of,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model in a mode."""
    original = make_gemma3n(tmp_path_factory.mktemp("ple") / "original")

    def make(mode: str) -> Path:
        folder = original.with_name(mode)
        if not folder.exists():
            convert(original, folder, **MODES[mode])
        return folder

    return make


def same(first: CausalLM, second: CausalLM, tokens: list[int]) -> bool:
    """Whether logits of a prompt, of a prompt in pieces and of single tokens are equal, bit for bit."""
    results = []
    for model in (first, second):
        caches = model.make_caches()
        parts = [model(mx.array([tokens]))]
        parts += [model(mx.array([tokens[i : i + 7]]), caches) for i in range(0, len(tokens), 7)]
        parts += [model(mx.array([[token]]), caches) for token in tokens[:5]]
        results.append(b"".join(np.array(part.view(mx.uint8)).tobytes() for part in parts))
    return results[0] == results[1]


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_the_disk_as_from_memory(mode: str, dtype: str, packed: Callable[[str], Path]) -> None:
    folder = packed(mode)
    resident, streamed = (load(folder, execution, dtype=dtype) for execution in (MEMORY, SSD))
    assert same(resident, streamed, prompt(40))
    for sampling in ({}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}):
        wanted = generated(resident, prompt(9), **sampling)
        assert generated(streamed, prompt(9), **sampling) == wanted and len(set(wanted)) > 2
    assert table_of(streamed).cache.stats.bytes_read > 0


def test_a_wrong_row_would_show(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed("affine-4")
    resident, streamed = load(folder), load(folder, SSD)
    plain = RowFile.read
    monkeypatch.setattr(
        RowFile, "read", lambda self, row, record: plain(self, max(row - 1, 0), record)
    )
    assert not same(resident, streamed, prompt(40))


def test_places_that_are_filled_with_another_token_would_show(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed("affine-4")
    prompts = [
        prompt(9, seed) for seed in range(8)
    ]  # one alone may be answered in a loop that nothing disturbs
    wanted = [generated(load(folder), tokens) for tokens in prompts]
    plain = LateRows.fill
    monkeypatch.setattr(LateRows, "fill", lambda self, tokens: plain(self, [7 for _ in tokens]))
    assert [generated(load(folder, SSD), tokens) for tokens in prompts] != wanted


def test_what_is_computed_before_its_rows_are_there_is_not_a_number(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LateRows, "fill", lambda self, tokens: None)
    for mode in MODES:
        with pytest.raises(NonFiniteLogits, match="token 1"):
            generated(load(packed(mode), SSD), prompt(9))


def test_without_places_rows_are_read_at_once(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed("affine-8")
    wanted = generated(load(folder), prompt(9))
    model = load(folder, SSD)
    assert late_rows(model) is not None and late_rows(load(folder)) is None
    monkeypatch.setattr(embeddings, "writes_in_place", lambda device: False)
    assert late_rows(model) is None
    assert generated(model, prompt(9)) == wanted


def test_a_batch_gives_the_same_tokens(packed: Callable[[str], Path]) -> None:
    prompts, found = [prompt(5), prompt(11, 1), prompt(3, 2)], []
    for execution in (MEMORY, SSD):
        model = load(packed("affine-4"), execution)
        rows = decode_batch(model, prompts, Sampling(temperature=1.0, seed=1), 8, Timings())
        found.append(list(rows))
    assert found[0] == found[1] and len({tuple(row) for row in found[0]}) > 2


def test_tokens_beyond_the_table_have_its_first_row(packed: Callable[[str], Path]) -> None:
    resident, streamed = load(packed("affine-4")), load(packed("affine-4"), SSD)
    beyond = [ROWS, VOCAB - 1, 5, ROWS - 1]
    assert same(resident, streamed, beyond)
    rows = np.array(table_of(streamed)(mx.array([[*beyond, 0]])))[0]
    assert np.array_equal(rows[0], rows[-1]) and not np.array_equal(rows[3], rows[-1])


@pytest.mark.parametrize("mode", ["affine-4", "affine-3", "mxfp8", "nvfp4", "bfloat16"])
def test_a_slice_reads_its_part_of_each_row(mode: str, packed: Callable[[str], Path]) -> None:
    cut = Slice((32,), (0, 3))
    resident, streamed = load(packed(mode), slice=cut), load(packed(mode), SSD, slice=cut)
    assert same(resident, streamed, prompt(30))
    other = load(packed(mode), SSD, slice=Slice((32,), (0, 4)))
    first, second = (np.array(table_of(model)(mx.array([[3]]))) for model in (streamed, other))
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_the_table_takes_no_memory(packed: Callable[[str], Path]) -> None:
    names = [dict(tree_flatten(load(packed("affine-8"), e).parameters())) for e in (MEMORY, SSD)]
    assert {name.rpartition(".")[0] for name in names[0].keys() - names[1].keys()} == {TABLE}


# Rows that are kept -------------------------------------------------------------------------------------------------


def row_file(folder: Path, **arguments: Any) -> RowFile:
    return RowFile("the table", open_checkpoint(folder).tensors[f"{TABLE}.weight"], **arguments)


def test_rows_used_last_are_kept_within_their_bytes(packed: Callable[[str], Path]) -> None:
    file = row_file(packed("affine-4"))
    cache = RowCache(file, limit=10 * file.nbytes + 5)
    cache.rows(range(10))
    cache.rows([0])
    assert cache.stats.hits == 1
    cache.rows([20])  # 1 goes
    cache.rows([0, 2, 20])
    assert cache.stats.hits == 4 and cache.stats.bytes_read == 11 * file.nbytes
    cache.rows([1])
    assert cache.stats.hits == 4
    cache.rows(range(100, 150))
    cache.rows(range(140, 150))
    assert cache.stats.hits == 14 and cache.stats.rows == 10 + 1 + 1 + 3 + 1 + 50 + 10


def test_no_room_keeps_nothing(packed: Callable[[str], Path]) -> None:
    cache = RowCache(row_file(packed("affine-4")), limit=0)
    first, second = cache.rows([3, 4]), cache.rows([3, 4])
    assert np.array_equal(first, second) and cache.stats.hits == 0


def test_many_threads_get_their_own_rows(packed: Callable[[str], Path]) -> None:
    file = row_file(packed("affine-5"))
    cache, whole = RowCache(file, limit=40 * file.nbytes), RowCache(file).rows(range(ROWS))
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            rows = np.unique(rng.integers(0, ROWS, 30))
            if not np.array_equal(cache.rows(rows.tolist()), whole[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < cache.stats.hits < cache.stats.rows


def test_two_sessions_at_once_do_not_mix(packed: Callable[[str], Path]) -> None:
    folder = packed("affine-4")
    resident, streamed = load(folder), load(folder, SSD)
    prompts = [prompt(6, seed) for seed in range(2)]
    wanted = [generated(resident, tokens) for tokens in prompts]
    streams = [
        decode(streamed, Session(streamed.make_caches()), tokens, Sampling(), 12)
        for tokens in prompts
    ]
    found = [[a[0], b[0]] for a, b in zip(*streams, strict=True)]
    assert [list(row) for row in zip(*found, strict=True)] == wanted


# What cannot be -----------------------------------------------------------------------------------------------------


def test_a_model_without_such_a_table_says_so(packed: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidInput, match="no per-layer embeddings"):
        load(parity.GOLDEN / "llama3_tied", SSD)


def test_a_table_that_must_be_computed_with_is_refused(packed: Callable[[str], Path]) -> None:
    source = open_checkpoint(packed("float32"))
    tensors = {f"{TABLE}.weight": Transposed(source.tensors[f"{TABLE}.weight"])}
    with pytest.raises(CheckpointError, match=f"{TABLE} is stored in a form .Transposed."):
        attach_tables(load(packed("affine-4")), tensors, mx.float32)


def test_errors_are_those_of_generation() -> None:
    assert issubclass(EmbeddingReadError, StreamError) and issubclass(StreamError, GenerationError)
