"""The planner: known sizes of published models, what goes to the disk, and what is refused."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from mlxarch.errors import InvalidInput, MemoryBudgetError
from mlxarch.hub import catalog
from mlxarch.planner.activation_memory import Peak
from mlxarch.planner.blueprint import Blueprint, blueprint_from_config
from mlxarch.planner.decode_speed import decode_tokens_per_second, hit_rate
from mlxarch.planner.expert_placement import ExpertPlacement
from mlxarch.planner.plan import Plan, Request
from mlxarch.planner.planner import best_plan, plan
from mlxarch.system import machines
from mlxarch.system.machines import Machine
from mlxarch.system.untrusted_files import read_json

LARGE = Machine("large", 10**13, "metal", 273e9, 5e9)
CONTEXT = 32_768


@functools.cache
def blueprint(name: str) -> Blueprint:
    return blueprint_from_config(name, read_json(catalog.entries()[name].config_path))


def planned(name: str, machine: str | Machine = LARGE, **asked: Any) -> Plan:
    return plan(
        blueprint(name),
        machines.find_machine(machine) if isinstance(machine, str) else machine,
        Request(**asked),
    )


# What it takes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_bits", "gigabytes"),
    [
        ("gemma3-27b", None, 3.12),
        ("gemma3-27b", 8, 1.66),
        ("qwen3-30b-a3b", None, 3.22),
        ("qwen3-30b-a3b", 8, 1.71),
        ("gpt-oss-120b", None, 1.21),
        ("glm4.5-air", None, 6.17),
        ("deepseek-v3", None, 2.30),
    ],
)
def test_keys_and_values_of_published_models(
    name: str, kv_bits: int | None, gigabytes: float
) -> None:
    kv = blueprint(name).footprint(4).kv_bytes(CONTEXT, 2, kv_bits)
    assert sum(kv.values()) / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_windows_cap_what_the_caches_hold() -> None:
    footprint = blueprint("gemma3-27b").footprint(4)
    near, far = footprint.kv_bytes(1024, 2), footprint.kv_bytes(CONTEXT, 2)
    assert (
        far["sliding layers"] == near["sliding layers"]
        and far["full layers"] == 32 * near["full layers"]
    )
    unbounded = replace(
        footprint, caches=tuple(c and replace(c, window=None) for c in footprint.caches)
    )
    assert sum(unbounded.kv_bytes(CONTEXT, 2).values()) / 1e9 == pytest.approx(16.6, abs=0.1)


@pytest.mark.parametrize(("bits", "gigabytes"), [(8, 28.7), (4, 15.2), (3, 11.8), (2, 8.4)])
def test_weights_of_gemma3_27b(bits: int, gigabytes: float) -> None:
    assert sum(
        blueprint("gemma3-27b").footprint(bits).weight_bytes(2).values()
    ) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_a_cpu_holds_floats_in_four_bytes_and_codes_as_they_are() -> None:
    weights = blueprint("qwen3-0.6b").footprint(4)
    elements = sum(w.arrays[0][0] * 8 for w in weights.weights if len(w.arrays) == 3)
    more = sum(weights.weight_bytes(4).values()) - sum(weights.weight_bytes(2).values())
    plain = sum(2 * w.arrays[0][0] for w in weights.weights if len(w.arrays) == 1)
    assert more == 2 * 2 * elements // 64 + plain


def test_sums_of_weights_are_not_those_of_a_footprint_that_it_was_copied_from() -> None:
    whole = blueprint("qwen3-0.6b").footprint(4)
    both = sum(whole.weight_bytes(2).values())
    half = replace(whole, weights=whole.weights[::2])
    assert sum(half.weight_bytes(2).values()) == sum(w.memory_bytes(2) for w in half.weights) < both
    whole.weight_bytes(2).clear()
    assert sum(whole.weight_bytes(2).values()) == both


def test_what_a_session_goes_back_to_counts_where_windows_are_small() -> None:
    small, large = (planned(name, bits=4, context=8192).kv for name in ("gemma3-1b", "gemma3-27b"))
    assert small["to go back"] == 2 * small["sliding layers"] and large["to go back"] == 0
    assert "to go back" not in planned("qwen3-0.6b", bits=4, context=8192).kv


def test_the_terms_add_up_and_name_every_kind() -> None:
    found = planned("gemma3n-e4b", bits=4, context=8192, ple="memory")
    assert sum(found.terms.values()) == found.total and found.verdict == "resident"
    kinds = {"attention", "feed-forward", "embeddings", "per-layer embeddings", "others"}
    assert {f"weights: {kind}" for kind in kinds} <= found.terms.keys()
    # 262,144 rows of 35 layers with 256 features each, as published for the E4B
    assert found.weights["per-layer embeddings"] == 262_144 * 35 * 256 * 4.5 / 8


def test_experts_published_in_mxfp4_stay_so() -> None:
    at_four, at_three = (
        blueprint("gpt-oss-20b").footprint(bits).weight_bytes(2)["experts"] for bits in (4, 3)
    )
    stacks = 24 * 32 * 3 * 2880 * 2880
    biases = 24 * 32 * (2 * 2880 + 2880)
    assert at_four == stacks * 4.25 / 8 + 2 * biases
    assert at_three < 0.9 * at_four


# What is decided -----------------------------------------------------------------------------------------------------


def test_experts_go_to_the_disk_where_they_do_not_fit_and_the_budget_is_kept() -> None:
    whole = planned("qwen3-30b-a3b", bits=4, context=4096)
    assert whole.verdict == "resident" and whole.execution.slots is None
    for memory in (5, 8, 12, 16):
        found = planned("qwen3-30b-a3b", bits=4, context=4096, memory=memory * 10**9)
        slots = found.execution.slots
        assert found.verdict == "streamed" and found.total <= memory * 10**9
        assert slots is not None and len(slots) == 48 and all(8 <= count <= 128 for count in slots)
        # so much as one more place in every layer would not have fitted
        assert found.total + 48 * 2_654_208 > memory * 10**9


def test_records_on_their_way_into_a_bank_take_room_where_they_are_copied() -> None:
    cpu = Machine("cpu", 10**13, "cpu", None, None)
    expert = max(blueprint("qwen3-30b-a3b").footprint(4).expert_bytes(4))
    for float_bytes, records in (
        (4, 4),
        (2, 32),
    ):  # read in place, where every thread widens one; or beside
        resident, streamed = (
            planned(
                "qwen3-30b-a3b", cpu, bits=4, context=2048, float_bytes=float_bytes, memory=memory
            )
            for memory in (None, 8 * 10**9)
        )
        assert (resident.verdict, streamed.verdict) == ("resident", "streamed")
        assert streamed.process - resident.process == pytest.approx(records * expert, rel=0.1)


def test_four_records_are_on_their_way_however_large_they_are() -> None:
    gpu = Machine("nvidia", 10**13, "cuda", None, None)
    expert = max(blueprint("llama4-maverick").footprint(4).expert_bytes(2))
    assert 4 * expert > 128 << 20
    resident, streamed = (
        planned("llama4-maverick", gpu, bits=4, context=2048, memory=memory)
        for memory in (None, 60 * 10**9)
    )
    assert (resident.verdict, streamed.verdict) == ("resident", "streamed")
    assert streamed.process - resident.process == 4 * expert


def test_prompts_pass_streamed_layers_together_as_far_as_there_is_room() -> None:
    def together(found: Plan) -> int:
        assert found.verdict == "streamed" and found.total <= 10 * 10**9
        return found.execution.segment or 0

    asked: dict[str, Any] = {"bits": 4, "context": CONTEXT, "memory": 10 * 10**9}
    found = planned("qwen3-30b-a3b", **asked)
    one = 12 * 2048 * 2  # bytes of a token: state, attention, experts' input twice, 8 outputs
    usual = (256 << 20) // one
    assert usual <= together(found) < usual + 48 * 2_654_208 // one, (
        "the rest of a place for an expert"
    )
    # where experts were given less, more is left; a prompt can be no longer than the context
    few = planned("qwen3-30b-a3b", **asked, expert_cache_bytes=2 * 10**9)
    assert together(few) == CONTEXT and few.weights["experts"] < found.weights["experts"] / 2
    some = planned("qwen3-30b-a3b", **asked, expert_cache_bytes=3_500_000_000)
    assert usual < together(some) < CONTEXT and some.total + one * 2 * 1.03 > 10 * 10**9
    assert together(planned("qwen3-30b-a3b", bits=4, context=4096, memory=8 * 10**9)) == 4096
    assert planned("qwen3-30b-a3b", bits=4, context=4096).execution.segment is None, (
        "nothing is streamed"
    )


def test_where_memory_is_scarce_fewer_tokens_pass_together_before_the_model_is_refused() -> None:
    def together(memory: float) -> int | None:
        asked = Request(bits=4, context=4 * 4096, kv_bits=8, memory=round(memory * 1e9))
        found = plan(blueprint("qwen3-30b-a3b"), LARGE, asked, advise=False)
        assert (found.verdict == "streamed") is (found.total <= memory * 1e9)
        return found.execution.segment

    usual = (256 << 20) // (12 * 2048 * 2)
    enough, scarce, least = (together(memory) or 0 for memory in (4.5, 4.2, 3.4))
    assert enough >= usual > scarce > least >= 512
    assert together(3.0) is None


def test_the_most_is_taken_by_attention_at_the_end_of_a_prompt_or_by_its_experts() -> None:
    placement = ExpertPlacement(blueprint("qwen3-30b-a3b").footprint(4), 2)
    assert placement.token_bytes == 12 * 2048 * 2
    row, step = 8 * (2 * 2048 + 3 * 768) * 2, Peak(10**9, 8 * 10**8)
    assert placement.segment_peak(step, 512, 512) == step
    assert placement.segment_peak(step, 1512, 512) == tuple(
        size + 1000 * 3 * 2048 * 2 for size in step
    )
    assert (
        placement.segment_peak(step, 50_000, 512).allocated
        == 50_000 * placement.token_bytes + 512 * row
    )


def test_layers_are_whole_where_most_experts_fit() -> None:
    slots = planned("qwen3-30b-a3b", "m4-pro-24gb", bits=4, context=4096).execution.slots
    assert slots is not None and slots.count(128) >= 12
    scarce = planned("qwen3-30b-a3b", bits=4, context=4096, memory=4 * 10**9).execution.slots
    assert scarce is not None and 128 not in scarce


def test_per_layer_embeddings_go_to_the_disk_first() -> None:
    room = planned("gemma3n-e4b", bits=4, context=4096).total - 10**8
    found = planned("gemma3n-e4b", bits=4, context=4096, memory=room)
    assert (
        found.execution.ple == "ssd" and found.verdict == "streamed" and "1.3 GB" in found.offloaded
    )
    kept = planned("gemma3n-e4b", bits=4, context=4096, memory=room, ple="memory")
    assert kept.execution.ple == "memory"
    assert planned("gemma3n-e4b", bits=4, context=4096, ple="ssd").execution.ple == "ssd"
    for ple in ("auto", "memory"):
        assert planned("qwen3-0.6b", bits=4, context=4096, ple=ple).execution.ple == "memory", (
            "it has none"
        )
    with pytest.raises(
        InvalidInput, match="ple is ssd, and qwen3-0.6b has no table .*; leave it at auto"
    ):
        planned("qwen3-0.6b", bits=4, context=4096, ple="ssd")


def test_without_a_context_as_much_is_planned_as_fits() -> None:
    assert planned("qwen3-0.6b", bits=4).context == 40_960
    tight = planned("qwen3-0.6b", bits=4, memory=2 * 10**9)
    assert (
        tight.verdict == "resident" and 4096 <= tight.context < 40_960 and tight.total <= 2 * 10**9
    )
    more = planned("qwen3-0.6b", bits=4, memory=2 * 10**9, context=tight.context + 4096)
    assert more.verdict == "does not fit" or more.execution.chunk, "only in short chunks"


def test_short_chunks_of_the_prompt_are_a_way_to_fit() -> None:
    found = planned("gemma3-27b", "m4-24gb", bits=4, context=4096)
    assert found.verdict == "resident" and found.execution.chunk == 512
    assert planned("gemma3-27b", "m4-32gb", bits=4, context=4096).execution.chunk is None


def test_the_largest_of_8_and_4_bits_is_taken_that_stays_in_memory() -> None:
    model = blueprint("qwen3-8b")
    assert best_plan(model, machines.find_machine("m4-pro-48gb")).bits == 8
    small = machines.find_machine("m1-8gb")
    assert best_plan(model, small).bits == 4 and best_plan(model, small).verdict == "resident"
    assert best_plan(model, small, Request(bits=3)).bits == 3
    assert (
        best_plan(blueprint("llama3.3-70b"), machines.find_machine("m4-32gb")).verdict
        == "does not fit"
    )


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_a_way_out() -> None:
    found = planned("gemma3-27b", "m4-24gb", bits=4, context=CONTEXT)
    with pytest.raises(MemoryBudgetError) as caught:
        found.require()
    message = str(caught.value)
    for term in (
        "weights: feed-forward",
        "keys and values: full layers",
        "activations",
        "together",
    ):
        assert f"GB  {term}" in message
    assert "--context 4096 makes it fit" in message and "--bits 3 makes it fit" in message
    assert planned("gemma3-27b", "m4-24gb", bits=3, context=CONTEXT).require().verdict == "resident"
    hopeless = planned("llama3.3-70b", "m1-8gb", bits=2, context=4096)
    assert "The largest term is weights: feed-forward" in hopeless.remedies[0]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"kv_bits": 3}, "kv_bits must be 16, 8 or 4"),
        ({"ple": "disk"}, "ple must be"),
        ({"memory": 0}, "memory must be"),
        ({"memory": 1.5}, "memory must be"),
        ({"context": 0}, "context must lie in 1 … 40960"),
        ({"context": 50_000}, "context must lie in 1 … 40960"),
    ],
)
def test_what_is_out_of_range_is_refused(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        planned("qwen3-0.6b", **asked)


# How fast ------------------------------------------------------------------------------------------------------------


def test_rates_of_resident_models_are_those_that_were_measured() -> None:
    machine = machines.find_machine("m4-pro-64gb")
    for name, measured in (("gemma3-27b", 13.24), ("qwen3-30b-a3b", 70.55)):
        rate = decode_tokens_per_second(blueprint(name).footprint(4), machine, 100, 2)
        assert rate == pytest.approx(measured, rel=0.08)
    assert (
        decode_tokens_per_second(
            blueprint("qwen3-0.6b").footprint(4), replace(machine, bandwidth=None), 100, 2
        )
        is None
    )


def test_rates_of_streamed_models_lie_within_what_was_estimated() -> None:
    small = planned("qwen3-30b-a3b", "m4-16gb", bits=4, context=4096)
    assert small.tokens_per_second is not None and 9.0 <= small.tokens_per_second <= 14.5
    assert [hit_rate(share) for share in (0, 0.5, 1)] == [0, 0.855, 1]
    assert hit_rate(0.3) < hit_rate(0.31)
