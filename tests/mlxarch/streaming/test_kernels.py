"""What MLX on Metal chooses a kernel by is the same for every number of slots. Its rule is written down here anew."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import CausalLM, Experts, Quantization
from mlxarch.generation import Session, prefill
from streamed import load
from tiny_moe import make_moe

COUNT, K = 12, 3


def kernel(rows: int, stack: int, sorted: bool, packed: bool) -> str:
    """Of ``gather_qmm`` and ``gather_mm`` on Metal for single rows (mlx/backend/metal, 0.32)."""
    if not packed:
        return "tiles" if sorted else "vectors"
    if not (sorted and rows >= 16 and rows // stack >= 4):
        return "vectors"
    return "tiles" if rows // stack < 64 else "large tiles"


def used(model: CausalLM, tokens: int, monkeypatch: pytest.MonkeyPatch, metal: bool = True) -> set[str]:
    """The kernels that the experts of a pass over ``tokens`` would run on."""
    found: set[str] = set()
    rows = Experts.rows

    def noted(self: Experts, x: mx.array, places: mx.array, sorted: bool) -> mx.array:
        packed = self.down_proj.quantization is not None
        found.add(kernel(x.shape[0], self.down_proj["weight"].shape[0], sorted, packed))
        assert not sorted or bool(mx.all(places[1:] >= places[:-1]).item()), "MLX was promised sorted rows"
        return rows(self, x, places, sorted)

    monkeypatch.setattr(Experts, "rows", noted)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    ids = np.random.default_rng(6).integers(0, 96, (1, tokens))
    mx.eval(model.states(mx.array(ids), model.make_caches()))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 20, 25, 70, 250, 300])
def test_the_kernel_does_not_depend_on_the_slots(
    tokens: int, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_moe(tmp_path / "model", packed=Quantization(4, 32) if packed else None)
    wanted = used(load(folder), tokens, monkeypatch)
    assert len(wanted) == 1
    assert {n: used(load(folder, n), tokens, monkeypatch) for n in (1, 4, 11)} == dict.fromkeys((1, 4, 11), wanted)


def test_all_kernels_are_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_moe(tmp_path / "model", packed=Quantization(4, 32)))
    assert [used(model, n, monkeypatch) for n in (1, 70, 300)] == [{"vectors"}, {"tiles"}, {"large tiles"}]


def test_without_filling_up_other_kernels_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_moe(tmp_path / "model", packed=Quantization(4, 32)), 11)
    assert "vectors" in used(model, 20, monkeypatch, metal=False) | used(model, 70, monkeypatch, metal=False)


def test_chunks_of_different_kinds_keep_theirs_in_one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_moe(tmp_path / "model", packed=Quantization(4, 32))
    found: dict[int, set[int]] = {}
    prompt = np.random.default_rng(7).integers(0, 96, 40).tolist()  # 39 tokens and one
    for slots in (2, 9):
        model, kinds = load(folder, slots), set[int]()
        layer = model.streaming.layers[0]
        rows = layer._rows

        def noted(*arguments, kinds=kinds, rows=rows) -> mx.array:
            kinds.add(arguments[-1])
            return rows(*arguments)

        layer._rows = noted
        prefill(model, Session(model.make_caches()), prompt)
        found[slots] = kinds
    assert found == {2: {0, 4}, 9: {0, 4}}
