"""What ``--stats``, ``/stats`` and JSON tell: how fast an answer was, what memory it took, what was read for it."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxarch.cli.output import size

if TYPE_CHECKING:
    from mlxarch.generation import Timings
    from mlxarch.language_model import LanguageModel
    from mlxarch.streaming.rows import RowStats


def stats_line(timings: "Timings", *, long: bool = False) -> str:
    """How fast it was, for a person."""
    parts = [
        f"first token after {timings.time_to_first_token:.2f} s",
        f"{timings.decode_rate:.1f} tokens/s",
        f"{timings.generated_tokens} tokens",
        f"prompt {timings.prompt_tokens} tokens"
        + (f", {timings.reused_tokens} reused" if timings.reused_tokens else ""),
    ]
    return " · ".join([*parts, f"prefill {timings.prefill_rate:.0f} tokens/s"] if long else parts)


def stats(timings: "Timings") -> dict[str, Any]:
    """The same for a program: counts of tokens, seconds, and tokens per second."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "reused_tokens": timings.reused_tokens,
        "dropped_tokens": timings.dropped_tokens,
        "generated_tokens": timings.generated_tokens,
        "time_to_first_token": round(timings.time_to_first_token, 6),
        "prefill_seconds": round(timings.prefill_seconds, 6),
        "decode_seconds": round(timings.decode_seconds, 6),
        "prefill_rate": round(timings.prefill_rate, 3),
        "decode_rate": round(timings.decode_rate, 3),
    }


def memory_line(model: "LanguageModel") -> str:
    """What memory it took since the process began, beside what was planned for a full context, for a person."""
    found = memory_stats(model)

    def beside_plan(kind: str) -> str:
        planned = f" of {size(found[f'planned_{kind}'])} planned" if model.plan else ""
        return f"{size(found[f'peak_{kind}'])}{planned}"

    return f"peak memory {beside_plan('bytes')} · in MLX's arrays {beside_plan('mlx_bytes')}"


def memory_stats(model: "LanguageModel") -> dict[str, Any]:
    """The same for a program: the process, which on an NVIDIA GPU has its arrays elsewhere, and what MLX counts."""
    import mlx.core as mx

    plan = model.plan
    return {
        "peak_bytes": process_peak(),
        "planned_bytes": plan.peak if plan else None,
        "peak_mlx_bytes": mx.get_peak_memory(),
        "planned_mlx_bytes": plan.mlx if plan else None,
    }


def process_peak() -> int:
    """Bytes that this process had in memory at most; on Linux not by ``getrusage``, which begins with the parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def streaming_line(model: "LanguageModel") -> str | None:
    """What was read from the disk since the model was loaded, for a person; None where nothing is."""
    found = streaming_stats(model)
    if found is None:
        return None
    if model.streaming is None:
        parts = [
            f"per-layer embeddings from the disk: {found['bytes_per_token'] / 1000:.1f} kB a token",
            f"{found['hit_rate']:.0%} were in memory, {found['recent_hit_rate']:.0%} of the last 64",
            f"{found['read_seconds']:.2f} s reading",
        ]
        return " · ".join(parts)
    seconds = [f"{found[key]:.1f} s {what}" for key, what in _SECONDS.items()]
    parts = [
        f"experts from the disk: {size(found['bytes_per_token'])} a token",
        f"{found['hit_rate']:.0%} were in memory, {found['recent_hit_rate']:.0%} for the last 64 tokens",
        ", ".join(seconds),
    ]
    return " · ".join(parts)


_SECONDS = {
    "read_seconds": "reading",
    "expert_seconds": "computing experts",
    "router_seconds": "waiting for routers and what is computed before them",
}


def streaming_stats(model: "LanguageModel") -> dict[str, Any] | None:
    """The same for a program."""
    if model.streaming is None:
        return _row_stats(model.streamed_rows.stats) if model.streamed_rows else None
    counted = model.streaming.stats
    return {
        "bytes_read": counted.bytes_read,
        "bytes_per_token": round(counted.bytes_per_token),
        "hit_rate": round(counted.hit_rate, 4),
        "recent_hit_rate": round(counted.steady_hit_rate, 4),
        "read_seconds": round(counted.read_seconds, 6),
        "router_seconds": round(counted.sync_seconds, 6),
        "expert_seconds": round(counted.compute_seconds, 6),
        "bank_bytes": model.streaming.nbytes,
    }


def _row_stats(counted: "RowStats") -> dict[str, Any]:
    return {
        "bytes_read": counted.bytes_read,
        "bytes_per_token": round(counted.bytes_read / max(counted.rows, 1)),
        "hit_rate": round(counted.hit_rate, 4),
        "recent_hit_rate": round(counted.steady_hit_rate, 4),
        "read_seconds": round(counted.read_seconds, 6),
    }
