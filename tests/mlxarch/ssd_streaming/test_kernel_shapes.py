"""Shapes by which MLX chooses GPU kernels: equal for every number of slots, and with all experts in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from house import THOROUGH

from mlxarch.blocks import CausalLM
from mlxarch.cpu_kernels import native
from mlxarch.generation import prefill as prefill_module
from mlxarch.generation.prefill import prefill
from mlxarch.generation.session import Session
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.experts import streaming_of
from streamed import attached, fingerprint, load
from tiny_moe import make_moe

pytestmark = pytest.mark.without_kernels  # they watch MLX's own products

EXPERTS, K = 16, 4
COUNTS = (
    tuple(range(K, EXPERTS + 1)) if THOROUGH else (4, 5, 6, 8, 11, 15, 16)
)  # slots, all of the experts last
FEW: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": K}
MANY: dict[str, Any] = {
    "num_experts": 60,
    "num_experts_per_tok": 2,
}  # 64 rows and more that are fewer than four for each expert
PACKED = Quantization(4, 32)
Product = tuple[Any, ...]


def loaded(folder: Path, slots: int | None = None, gpu: bool = True) -> CausalLM:
    """With the products of a GPU, on this CPU."""
    model = load(folder, slots)
    for layer in attached(model).layers.values() if streaming_of(model) else ():
        layer._gpu = gpu
    return model


def forward(tokens: int) -> Callable[[CausalLM], None]:
    """A pass of so many tokens."""

    def run(model: CausalLM) -> None:
        ids = np.random.default_rng(6).integers(0, 96, (1, tokens))
        mx.eval(model.hidden_state(mx.array(ids), model.make_caches()))

    return run


def in_chunks(model: CausalLM) -> None:
    """A prompt of three chunks and one token, layer by layer."""
    prefill(
        model, Session(model.make_caches()), np.random.default_rng(7).integers(0, 96, 121).tolist()
    )


def products(
    model: CausalLM, run: Callable[[CausalLM], None], monkeypatch: pytest.MonkeyPatch
) -> set[Product]:
    """Products with experts in ``run``: whether rows are sorted, their number, and the shapes."""
    found: set[Product] = set()

    def noting(name: str) -> Callable[..., mx.array]:
        real = getattr(mx, name)

        def noted(x: mx.array, w: mx.array, *rest: Any, **options: Any) -> mx.array:
            rows, stack, ordered = x.shape[0], w.shape[0], options["sorted_indices"]
            places = options["rhs_indices"]
            assert not ordered or bool(mx.all(places[1:] >= places[:-1]).item()), (
                "MLX was promised rows in order"
            )
            form = tuple(options.get(key) for key in ("bits", "group_size", "mode"))
            found.add(
                (
                    name,
                    ordered,
                    rows // stack if ordered else rows,
                    x.shape[1:],
                    w.shape[1:],
                    x.dtype,
                    form,
                )
            )
            return real(x, w, *rest, **options)

        return noted

    for name in ("gather_qmm", "gather_mm"):
        monkeypatch.setattr(mx, name, noting(name))
    with native.suspended():  # the products are MLX's own
        run(model)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("packed", [PACKED, None], ids=["packed", "float"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 25, 70, 250, 300])
def test_products_do_not_depend_on_the_slots(
    tokens: int, packed: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counts = make_moe(tmp_path / "model", packed=packed, **FEW), COUNTS
    wanted = products(loaded(folder), forward(tokens), monkeypatch)
    assert wanted and len({(ordered, rows) for _, ordered, rows, *_ in wanted}) == 1
    found = {n: products(loaded(folder, n), forward(tokens), monkeypatch) for n in counts}
    assert found == dict.fromkeys(counts, wanted)


@pytest.mark.parametrize("tokens", [1, 20, 40, 110, 130])
def test_nor_where_most_experts_get_few_rows(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counts = make_moe(tmp_path / "model", packed=PACKED, **MANY), (2, 7, 29, 30, 31, 59, 60)
    wanted = products(loaded(folder), forward(tokens), monkeypatch)
    assert {ordered for _, ordered, *_ in wanted} == {tokens * 2 // 60 >= 4}
    counts = counts[tokens * 2 // 60 >= 4 :]  # two slots: see below
    assert {
        n: products(loaded(folder, n), forward(tokens), monkeypatch) for n in counts
    } == dict.fromkeys(counts, wanted)


@pytest.mark.parametrize(("chunk", "kinds"), [(40, 2), (64, 3)])
def test_chunks_keep_their_products_in_one_prompt(
    chunk: int, kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counts = make_moe(tmp_path / "model", packed=PACKED, **FEW), range(K, EXPERTS + 1)
    real = prefill_module.default_chunk
    prefill_module.default_chunk = lambda: chunk
    try:
        wanted = products(loaded(folder), in_chunks, monkeypatch)
        found = {n: products(loaded(folder, n), in_chunks, monkeypatch) for n in counts}
    finally:
        prefill_module.default_chunk = real
    assert found == dict.fromkeys(counts, wanted)
    assert len({(ordered, rows) for _, ordered, rows, *_ in wanted}) == kinds


def kernel(product: Product) -> str:
    """Kernel for quantized experts on a GPU (mlx/backend/{metal,cuda/quantized}/quantized.cpp, 0.32)."""
    _, ordered, rows, *_ = product
    if not ordered or rows < 4:
        return "a few vectors" if rows < 8 else "vectors"
    return "tiles" if rows < 64 else "large tiles"


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [(1, "a few vectors"), (5, "vectors"), (17, "tiles"), (260, "large tiles")],
)
def test_fewer_slots_than_a_token_needs_get_the_same_kernel(
    tokens: int, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_moe(tmp_path / "model", packed=PACKED, **FEW)
    for slots in (None, 1, 2, 3):
        found = products(loaded(folder, slots), forward(tokens), monkeypatch)
        assert {kernel(product) for product in found} == {wanted}


@pytest.mark.parametrize("tokens", [5, 17, 250])
def test_as_a_cpu_takes_them_they_would_differ(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_moe(tmp_path / "model", packed=PACKED, **FEW)
    found = [
        products(loaded(folder, n, gpu=False), forward(tokens), monkeypatch) for n in (None, 4, 7)
    ]
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize(
    "mode", [PACKED, Quantization(8, 32), Quantization(4, 32, "mxfp4"), None], ids=str
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_rows_that_fill_a_product_up_change_nothing(
    kind: str, mode: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_moe(tmp_path / "model", kind, packed=mode)
    wanted, counts = fingerprint(load(folder), 100), (1, 2, 3, 5, 8, 11)
    assert {n: fingerprint(loaded(folder, n), 100) for n in counts} == dict.fromkeys(counts, wanted)


def test_no_more_than_four_times_the_rows_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = make_moe(tmp_path / "model", packed=PACKED, **FEW), list[int]()
    real = mx.gather_qmm

    def noted(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        rows.append(x.shape[0])
        return real(x, *rest, **options)

    monkeypatch.setattr(mx, "gather_qmm", noted)
    for slots in range(K, EXPERTS):
        rows.clear()
        forward(200)(loaded(folder, slots))
        assert 800 * 6 <= sum(rows) <= 4 * 800 * 6  # two layers of three matrices


def stride(rows: mx.array) -> int:
    """Elements from one step of the axis before the last to the next."""
    mx.eval(rows)
    return np.asarray(rows).strides[-2] // rows.itemsize


@pytest.mark.parametrize("tokens", [20, 70])
def test_a_row_is_where_cuda_looks_for_it(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gather_mm`` of rows in order takes the stride of (rows, 1, dim)'s middle axis for that from row to row."""
    folder, real, found = (
        make_moe(tmp_path / "model", packed=None, **FEW),
        mx.gather_mm,
        set[bool](),
    )

    def noted(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        if options["sorted_indices"]:
            found.add(stride(x) == x.shape[-1])
        return real(x, *rest, **options)

    monkeypatch.setattr(mx, "gather_mm", noted)
    for slots in (None, 4, 9):
        forward(tokens)(loaded(folder, slots))
    assert found == {True}
    put_in = mx.zeros((4, 8))[mx.arange(3)][:, None]
    assert stride(put_in) == 1
