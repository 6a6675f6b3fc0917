"""Bits under a limit: the choice, and the sensitivities behind it."""

from itertools import pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_chat import make_chat_model

import parity
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import InvalidInput, QuantizationError
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize import Target, prepare, toward
from mlxarch.quantize.calibration.sensitivity import FisherPass, estimate_sensitivity
from mlxarch.quantize.calibration.texts import Text
from mlxarch.quantize.methods.rounding import round_to_nearest
from mlxarch.quantize.mixed_precision import expected_kl
from mlxarch.quantize.mixed_precision.bit_allocation import (
    Option,
    allocate_bits,
    shared_input_groups,
)
from mlxarch.quantize.mixed_precision.expected_kl import held_out_windows

BITS = (2, 4, 8)


def options(count: int, seed: int) -> dict[tuple[str, ...], list[Option]]:
    """Matrices of several sizes; more bits cost less, and a matrix matters more or less."""
    draw, found = np.random.default_rng(seed), {}
    for index in range(count):
        size, weight = int(draw.integers(1, 5)) * 100, float(10 ** draw.uniform(-2, 2))
        found[f"m{index}.weight",] = [
            Option(Quantization(b, 64), size * b, weight * 4.0**-b) for b in BITS
        ]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_as_good_as_the_best_of_all_but_for_one_step(seed: int) -> None:
    given = options(5, seed)
    room = sum(group[1].nbytes for group in given.values())
    choice = allocate_bits(given, room)
    mixes = [
        sum(o.kl for o in mix)
        for mix in product(*given.values())
        if sum(o.nbytes for o in mix) <= room
    ]
    step = max(group[0].kl - group[1].kl for group in given.values())
    assert choice.nbytes <= room and min(mixes) - 1e-9 <= choice.expected_kl <= min(mixes) + step
    assert max(mixes) > min(mixes) + step  # a choice at random would fail


def test_mixed_precision_of_many_matrices_beats_the_same_bits_for_all() -> None:
    given = options(60, 3)
    room = sum(group[1].nbytes for group in given.values())
    assert allocate_bits(given, room).expected_kl < 0.7 * sum(
        group[1].kl for group in given.values()
    )


def test_a_divergence_is_reached_with_as_few_bytes_as_it_takes() -> None:
    given = options(8, 1)
    strict, loose = allocate_bits(given, None, 0.01), allocate_bits(given, None, 0.1)
    assert strict.expected_kl <= 0.01 < loose.expected_kl <= 0.1
    assert strict.nbytes > loose.nbytes
    with pytest.raises(QuantizationError, match="cannot be reached"):
        allocate_bits(given, None, 1e-9)
    with pytest.raises(QuantizationError, match="fewest bits"):
        allocate_bits(given, 10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "found none"),
        ({"size": 5, "bits": 4.0}, "found size, bits"),
        *(({"kl": kl}, "from 1e-07 to 10") for kl in (0.0, 1e-12, 10.1, float("nan"))),
        *(({"bits": bits}, "from 2 to 10") for bits in (-1.0, 1.9, 99.0, float("inf"))),
        *(({"size": size}, "a number of bytes") for size in (0, float("inf"))),
    ],
)
def test_a_target_is_one_number_in_its_range(wrong: dict, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        Target(**wrong)
    edges: list[dict[str, Any]] = [{"kl": 1e-7}, {"kl": 10}, {"bits": 2}, {"bits": 10}, {"size": 1}]
    assert all(Target(**edge) for edge in edges)


def test_matrices_that_share_the_input_of_a_feed_forward_stay_together() -> None:
    resolved = resolve(open_checkpoint(parity.GOLDEN / "llama3"))
    groups = shared_input_groups(resolved.model, sorted(resolved.matrices))
    layer = "model.layers.0."
    assert {(f"{layer}self_attn.{n}_proj.weight",) for n in "qkv"} <= set(groups)
    assert tuple(f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up")) in groups
    assert (f"{layer}mlp.down_proj.weight",) in groups
    assert sorted(path for group in groups for path in group) == sorted(resolved.matrices)


def rounded(
    path: str, index: int, rows: mx.array, inputs: np.ndarray, to: Quantization
) -> mx.array:
    parts = round_to_nearest(rows, to, mx.float32)
    return mx.dequantize(parts["weight"], parts["scales"], parts["biases"], to.group_size, to.bits)


@pytest.mark.parametrize(
    "name", ["llama3", "gemma3n_text", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt2"]
)
def test_every_matrix_of_an_architecture_has_a_cost_that_falls_with_the_bits(name: str) -> None:
    resolved = resolve(open_checkpoint(parity.GOLDEN / name))
    tokens = mx.array(np.random.default_rng(0).integers(0, resolved.model.vocab_size, (2, 16)))
    told: list[tuple[int, int]] = []
    wanted = [Quantization(bits, 32) for bits in BITS]
    found = estimate_sensitivity(
        resolved,
        tokens,
        wanted,
        rounded,
        progress=lambda label, done, total: told.append((done, total)),
    )
    total = 2 * sum(tensor.nbytes for tensor in resolved.parameters.values())
    assert (
        told == sorted(told)
        and told[-1] == (total, total)
        and {whole for _, whole in told} == {total}
    )
    assert found.keys() == resolved.matrices
    totals = [sum(own[Quantization(bits, 32)] for own in found.values()) for bits in BITS]
    assert totals[0] > 5 * totals[1] > 25 * totals[2] > 0


@pytest.mark.parametrize("repeated", [1, 32], ids=["any tokens", "one token again and again"])
def test_expected_costs_add_up_to_the_measured_divergence(
    repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All matrices at 8 bits and at 6, each sum against the divergence that is measured.

    Tokens of a window act together, the more so the more alike they are; taken each by itself, they tell too little.
    """
    folder = parity.GOLDEN / "llama3"
    resolved, (model, _) = resolve(open_checkpoint(folder)), load_model(folder, dtype="float32")
    drawn = np.random.default_rng(1).integers(0, model.vocab_size, (16, 32 // repeated))
    tokens = mx.array(np.repeat(drawn, repeated, 1))
    settings = [Quantization(bits, 32) for bits in (6, 8)]
    found = estimate_sensitivity(resolved, tokens, settings, rounded)
    original = log_softmax(model(tokens))
    for to in settings:
        moved, _ = load_model(folder, dtype="float32")
        for path, module in moved.named_modules():
            if f"{path}.weight" in found and module.weight.shape[-1] % 32 == 0:
                rows = module.weight.reshape(-1, module.weight.shape[-1])
                module.weight = rounded(path, 0, rows, np.zeros(0), to).reshape(module.weight.shape)
        other = log_softmax(moved(tokens))
        measured = float((np.exp(original) * (original - other)).sum(-1).mean())
        assert 0.6 < total(found, to) / measured < 1.7
    monkeypatch.setattr(FisherPass, "_window_shape", lambda *_: None)
    apart = estimate_sensitivity(resolved, tokens, settings, rounded)
    share = total(apart, settings[1]) / total(found, settings[1])
    assert share < 0.7 if repeated > 1 else 0.8 < share < 1.2


def total(found: dict[str, dict[Quantization, float]], to: Quantization) -> float:
    return sum(own[to] for own in found.values())


def log_softmax(logits: mx.array) -> np.ndarray:
    values = np.asarray(logits).astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_a_forecast_for_search_counts_the_error_left_after_feedback(tmp_path, monkeypatch) -> None:
    source, found = make_chat_model(tmp_path / "source"), {}
    for method, share in product(("search", "round"), (1.0, 0.5)):

        def remaining(resolved, *_: Any, share: float = share) -> dict[str, float]:
            return dict.fromkeys(resolved.parameters, share)

        monkeypatch.setattr(expected_kl, "remaining_error_fractions", remaining)
        conversion = toward(prepare(source, tmp_path / "out", method=method), Target(bits=5.0))
        found[method, share] = conversion.expected_kl
    assert found["search", 0.5] == pytest.approx(0.5 * found["search", 1.0])
    assert (
        found["round", 0.5]
        == found["round", 1.0]
        > found["search", 1.0] / expected_kl.SEARCH_KL_CORRECTION
    )


# Held-out windows ------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token for each character."""

    bos_id = 0

    def __init__(self, begins: bool) -> None:
        self.begins = begins

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * (self.begins and add_special_tokens) + [ord(c) for c in text]


@pytest.mark.parametrize("begins", [False, True])
def test_a_forecast_reads_the_second_halves_of_texts_all_over(begins: bool) -> None:
    texts = [
        Text(name, "".join(chr(at) for at in range(1000, 1000 + length)))
        for name, length in (("a", 4000), ("b", 3000))
    ]
    letters: Any = Letters(begins)
    found = np.asarray(held_out_windows(texts, letters, 4096))
    assert found.shape == (8, 256 + begins) and (found[:, 0] == 0).all() == begins
    starts = found[:, int(begins)].tolist()
    for half, (last, *others) in zip((3000, 2500), (starts[:4], starts[4:]), strict=True):
        assert last == 2 * half - 1000 - 256 and min(others) >= half and len(set(others)) == 3
        assert all(later - earlier > 256 for earlier, later in pairwise(sorted([last, *others])))
    assert np.asarray(held_out_windows(texts, letters, 100)).shape[1] == 100, (
        "no more than the context"
    )
    with pytest.raises(InvalidInput, match="text short is too short"):
        held_out_windows([texts[0], Text("short", "abc")], letters, 4096)
