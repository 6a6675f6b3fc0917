"""Decode speed, estimated from the bytes that a token reads.

    seconds = (core + experts + keys and values) / (BANDWIDTH_EFFICIENCY * bandwidth)
              + LAYER_SECONDS * layers + STREAMED_LAYER_SECONDS * streamed layers
              + misses * expert / ssd

BANDWIDTH_EFFICIENCY and LAYER_SECONDS are fitted to llama.cpp's measurements on an M4 Pro: 13.2
tokens a second for Gemma 3 27B at 15.4 GB, and 70.6 for Qwen3 30B-A3B. STREAMED_LAYER_SECONDS lies
between the values that engines with expert offloading report. Engines were up to twice as slow as
this estimate.
"""

from mlxarch.planner.footprint import Footprint
from mlxarch.system.machines import Machine

BANDWIDTH_EFFICIENCY = 0.75
LAYER_SECONDS = 0.12e-3
STREAMED_LAYER_SECONDS = 0.4e-3  # synchronization with the router
DEFAULT_SSD = 2.8e9  # bytes a second, if the speed of the disk is unknown
FORMULA = (
    f"seconds a token = (core + experts + keys and values) / ({BANDWIDTH_EFFICIENCY:g} bandwidth)"
    f" + {1000 * LAYER_SECONDS:g} ms a layer"
    f" + {1000 * STREAMED_LAYER_SECONDS:g} ms a streamed layer + misses x expert / ssd"
)
# (fraction of the experts in memory, hit rate): medians of what engines with offloading report
HIT_RATES = (
    (0.0, 0.0),
    (0.03, 0.14),
    (0.05, 0.29),
    (0.125, 0.56),
    (0.25, 0.71),
    (0.36, 0.78),
    (0.5, 0.855),
    (0.75, 0.935),
    (0.9, 0.975),
    (1.0, 1.0),
)
# Kinds of weights of which a token reads a few rows or experts only
SPARSELY_READ = {"per-layer embeddings", "experts", "embeddings"}


def decode_tokens_per_second(
    footprint: Footprint,
    machine: Machine,
    context: int,
    float_bytes: int,
    kv_bits: int | None = None,
    slots: tuple[int, ...] | None = None,
) -> float | None:
    """Estimate decode speed with ``context`` tokens in the KV cache.

    Args:
        slots: experts of each layer that are kept in memory; None if no experts are streamed.

    Returns:
        Tokens a second; None if the memory bandwidth of the machine is unknown.
    """
    if machine.bandwidth is None:
        return None
    weights = footprint.weight_bytes(float_bytes)
    expert_sizes = footprint.expert_bytes(float_bytes)
    core = sum(size for kind, size in weights.items() if kind not in SPARSELY_READ)
    if footprint.tied:
        core += weights.get("embeddings", 0)
    experts = sum(
        layer.per_token * size
        for layer, size in zip(footprint.experts, expert_sizes, strict=True)
        if layer
    )
    kv = sum(footprint.kv_bytes(context, float_bytes, kv_bits).values())
    seconds = (core + experts + kv) / (BANDWIDTH_EFFICIENCY * machine.bandwidth)
    seconds += len(expert_sizes) * LAYER_SECONDS
    if slots:
        seconds += streaming_seconds(footprint, machine, float_bytes, slots)
    return 1 / seconds


def streaming_seconds(
    footprint: Footprint, machine: Machine, float_bytes: int, slots: tuple[int, ...]
) -> float:
    """Seconds that a token waits for routers and for experts from the disk."""
    total = 0.0
    ssd = machine.ssd or DEFAULT_SSD
    expert_sizes = footprint.expert_bytes(float_bytes)
    for in_memory, experts, size in zip(slots, footprint.experts, expert_sizes, strict=True):
        if experts and in_memory < experts.count:
            miss_rate = 1 - hit_rate(in_memory / experts.count)
            total += STREAMED_LAYER_SECONDS + miss_rate * experts.per_token * size / ssd
    return total


def hit_rate(fraction: float) -> float:
    """Fraction of the requested experts that are in memory when ``fraction`` of all experts are."""
    for (low, rate_at_low), (high, rate_at_high) in zip(HIT_RATES, HIT_RATES[1:], strict=False):
        if fraction <= high:
            return rate_at_low + (rate_at_high - rate_at_low) * (fraction - low) / (high - low)
    return 1.0
