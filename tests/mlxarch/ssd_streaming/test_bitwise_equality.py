"""A model whose experts are read from the disk computes what it computes with all of them in memory, bit for bit."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming import attach
from mlxarch.ssd_streaming.expert_slots import ExpertSlots
from mlxarch.ssd_streaming.experts import streaming_of
from streamed import attached, fingerprint, load
from tiny_moe import make_moe

# With them the parts of a prompt of up to 16 tokens and longer ones differ by rounding
pytestmark = pytest.mark.without_kernels

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
MODES = [Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [
    Quantization(4, 32, "mxfp4"),
    Quantization(8, 32, "mxfp8"),
    Quantization(4, 16, "nvfp4"),
    Quantization(4, 32),
]
ROUTERS = (
    "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "kimi_k2", "glm4_moe",
    "glm45_air", "llama4_scout", "llama4_maverick", "grok2",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_every_packing_gives_the_same_bits_at_every_number_of_slots(
    kind: str, mode: Quantization, tmp_path: Path
) -> None:
    folder = make_moe(tmp_path / "model", kind, packed=mode, dtype=mx.bfloat16)
    wanted = fingerprint(load(folder))
    assert {count: fingerprint(load(folder, count)) for count in (1, 3, 5, 11)} == dict.fromkeys(
        (1, 3, 5, 11), wanted
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_gives_the_same_bits(name: str) -> None:
    wanted, counts = fingerprint(load(GOLDEN / name)), range(1, 8)
    models = {count: load(GOLDEN / name, count) for count in counts}
    streamed = {count: fingerprint(model) for count, model in models.items()}
    assert streamed == dict.fromkeys(counts, wanted)
    assert streaming_of(models[1]) is not None


def test_another_expert_in_a_slot_shows(tmp_path: Path) -> None:
    model = load(make_moe(tmp_path / "model"), 11)
    wanted = fingerprint(model)
    layer = attached(model).layers[0]
    layer._slot_of[[expert for expert in range(12) if layer._slot_of[expert] >= 0][0]] = (
        layer._slot_of[[expert for expert in range(12) if layer._slot_of[expert] >= 0][1]]
    )
    assert fingerprint(model) != wanted


def test_a_layer_with_a_slot_for_each_expert_is_not_streamed(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "model")
    model, _ = load_model(folder, execution=Execution(slots=(12, 0, 11)))
    assert list(attached(model).layers) == [2]
    assert streaming_of(load(folder, 12)) is None


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_every_way_to_write_a_slot_gives_the_same_bits(
    kind: str, join: bool, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a GPU, too: joined matrices up, and slots that MLX copies records into."""

    def bank(
        experts: Any, parts: Any, slots: int, dtype: mx.Dtype, *_: object, **__: object
    ) -> ExpertSlots:
        return ExpertSlots(experts, parts, slots, dtype, in_place, join)

    folder = make_moe(tmp_path / "model", kind, packed=Quantization(4, 32), dtype=mx.bfloat16)
    wanted = fingerprint(load(folder))
    monkeypatch.setattr(attach, "ExpertSlots", bank)
    models = {count: load(folder, count) for count in (1, 4, 11)}
    assert {n: fingerprint(model) for n, model in models.items()} == dict.fromkeys(models, wanted)
    experts = attached(models[4]).layers[0].experts
    assert experts.gate_up.is_fused == join and experts.gate_proj["weight"].size == (
        0 if join else 4 * 64 * 8
    )
    assert attached(models[4]).layers[0].memory.in_place == in_place


def test_float_experts_in_other_types_than_they_are_computed_in(tmp_path: Path) -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        folder = make_moe(tmp_path / str(dtype), dtype=dtype, single=True)
        assert fingerprint(load(folder, 4)) == fingerprint(load(folder))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_give_the_same_bits(seed: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 40))
    k, prompt = int(draw.integers(1, min(count, 9))), int(draw.integers(8, 120))
    kind = str(draw.choice(["qwen3_moe", "gpt_oss"]))
    names = {"qwen3_moe": ("num_experts", "moe_intermediate_size")}
    names |= {"gpt_oss": ("num_local_experts", "intermediate_size")}
    sizes = dict(zip(names[kind], (count, 32 * int(draw.integers(1, 5))), strict=True))
    shape: dict[str, Any] = {
        "hidden_size": 32 * int(draw.integers(1, 6)),
        "num_experts_per_tok": k,
        **sizes,
    }
    mode = MODES[int(draw.integers(6, len(MODES)))]
    folder = make_moe(tmp_path / "model", kind, packed=mode, dtype=mx.bfloat16, seed=seed, **shape)
    slots = {1, k, min(2 * k, count - 1), count // 2 or 1, count - 1}
    wanted = fingerprint(load(folder), prompt)
    assert {n: fingerprint(load(folder, n), prompt) for n in slots} == dict.fromkeys(slots, wanted)
