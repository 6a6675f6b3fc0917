"""How fast a model will decode, estimated from what a token reads.

    seconds = (core + experts + keys and values) / (ETA * bandwidth) + T_LAYER * layers
              + T_SYNC * streamed layers + misses * expert / ssd

ETA and T_LAYER are fitted to what llama.cpp measured on an M4 Pro: 13.2 tokens a second for Gemma 3 27B at 15.4 GB, and
70.6 for Qwen3 30B-A3B. T_SYNC is between what engines that stream report. Engines were up to twice as slow as this.
"""

from mlxarch.footprint import Footprint
from mlxarch.machines import Machine

ETA, T_LAYER, T_SYNC = 0.75, 0.12e-3, 0.4e-3
SSD = 2.8e9  # bytes a second where nothing is known
FORMULA = (
    f"seconds a token = (core + experts + keys and values) / ({ETA:g} bandwidth) + {1000 * T_LAYER:g} ms a layer"
    f" + {1000 * T_SYNC:g} ms a streamed layer + misses x expert / ssd"
)
# share of the experts in memory -> share of those asked for that are there: the middle of what was reported elsewhere
HITS = ((0.0, 0.0), (0.03, 0.14), (0.05, 0.29), (0.125, 0.56), (0.25, 0.71), (0.36, 0.78), (0.5, 0.855))
HITS += ((0.75, 0.935), (0.9, 0.975), (1.0, 1.0))
LOOKED_UP = {"per-layer embeddings", "experts", "embeddings"}  # of these a token reads some rows only


def decode_rate(
    footprint: Footprint,
    machine: Machine,
    context: int,
    float_bytes: int,
    kv_bits: int | None = None,
    slots: tuple[int, ...] | None = None,
) -> float | None:
    """Tokens a second while ``context`` tokens are held; None where nobody knows how fast the memory is."""
    if machine.bandwidth is None:
        return None
    held, one = footprint.held(float_bytes), footprint.expert_bytes(float_bytes)
    core = sum(size for kind, size in held.items() if kind not in LOOKED_UP)
    core += held.get("embeddings", 0) if footprint.tied else 0
    experts = sum(e.chosen * size for e, size in zip(footprint.experts, one, strict=True) if e)
    kv = sum(footprint.kv(context, float_bytes, kv_bits).values())
    seconds = (core + experts + kv) / (ETA * machine.bandwidth) + len(one) * T_LAYER
    return 1 / (seconds + (streaming_seconds(footprint, machine, float_bytes, slots) if slots else 0))


def streaming_seconds(footprint: Footprint, machine: Machine, float_bytes: int, slots: tuple[int, ...]) -> float:
    """What a token waits for routers and for experts from the disk."""
    total, ssd = 0.0, machine.ssd or SSD
    for places, e, size in zip(slots, footprint.experts, footprint.expert_bytes(float_bytes), strict=True):
        if e and places < e.count:
            total += T_SYNC + (1 - hit_rate(places / e.count)) * e.chosen * size / ssd
    return total


def hit_rate(share: float) -> float:
    """Of the experts asked for, how many are there when ``share`` of all have a place in memory."""
    for (low, below), (high, above) in zip(HITS, HITS[1:], strict=False):
        if share <= high:
            return below + (above - below) * (share - low) / (high - low)
    return 1.0
