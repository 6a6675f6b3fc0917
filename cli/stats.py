"""Statistics of an answer, as text and as JSON: timings, peak memory, and reads from the SSD."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxarch.progress import format_size

if TYPE_CHECKING:
    from mlxarch.generation.timings import Timings
    from mlxarch.language_model import LanguageModel
    from mlxarch.ssd_streaming.row_cache import RowStats


def timings_line(timings: "Timings", *, long: bool = False) -> str:
    """Format the timings of an answer; ``long`` adds the prefill rate."""
    reused = f", {timings.reused_tokens} reused" if timings.reused_tokens else ""
    parts = [
        f"first token after {timings.time_to_first_token:.2f} s",
        f"{timings.decode_rate:.1f} tokens/s",
        f"{timings.generated_tokens} tokens",
        f"prompt {timings.prompt_tokens} tokens{reused}",
    ]
    if long:
        parts.append(f"prefill {timings.prefill_rate:.0f} tokens/s")
    return " · ".join(parts)


def timings_stats(timings: "Timings") -> dict[str, Any]:
    """Return the timings for JSON: token counts, seconds, and tokens per second."""
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


def kernels_line() -> str:
    """Describe the CPU kernels; empty on a GPU."""
    from mlxarch.cpu_kernels import native

    return native.description()


def memory_line(model: "LanguageModel") -> str:
    """Format the peak memory since the process began beside the plan for a full context window."""
    memory = memory_stats(model)

    def compare(kind: str) -> str:
        planned = f" of {format_size(memory[f'planned_{kind}'])} planned" if model.plan else ""
        return f"{format_size(memory[f'peak_{kind}'])}{planned}"

    return f"peak memory {compare('bytes')} · in MLX's arrays {compare('mlx_bytes')}"


def memory_stats(model: "LanguageModel") -> dict[str, Any]:
    """Return peak memory in bytes for JSON: of the process, and as MLX counts its arrays.

    On an NVIDIA GPU the arrays are not in the memory of the process.
    """
    import mlx.core as mx

    plan = model.plan
    return {
        "peak_bytes": process_peak_bytes(),
        "planned_bytes": plan.process_peak if plan else None,
        "peak_mlx_bytes": mx.get_peak_memory(),
        "planned_mlx_bytes": plan.mlx_peak if plan else None,
    }


def process_peak_bytes() -> int:
    """Return the peak memory of this process in bytes.

    On Linux it is read from /proc, because ``getrusage`` includes the peak of the parent process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_SECONDS = {
    "read_seconds": "reading",
    "expert_seconds": "computing experts",
    "router_seconds": "waiting for routers and what is computed before them",
}


def streaming_line(model: "LanguageModel") -> str | None:
    """Format the reads from the SSD since the model was loaded; None if all of it is in memory."""
    stats = streaming_stats(model)
    if stats is None:
        return None
    if model.streaming is None:
        parts = [
            f"per-layer embeddings from the disk: {stats['bytes_per_token'] / 1000:.1f} kB a token",
            f"{stats['hit_rate']:.0%} were in memory, "
            f"{stats['recent_hit_rate']:.0%} of the last 64",
            f"{stats['read_seconds']:.2f} s reading",
        ]
    else:
        parts = [
            f"experts from the disk: {format_size(stats['bytes_per_token'])} a token",
            f"{stats['hit_rate']:.0%} were in memory, "
            f"{stats['recent_hit_rate']:.0%} for the last 64 tokens",
            ", ".join(f"{stats[key]:.1f} s {activity}" for key, activity in _SECONDS.items()),
        ]
    return " · ".join(parts)


def streaming_stats(model: "LanguageModel") -> dict[str, Any] | None:
    """Return the reads from the SSD for JSON; None if the whole model is in memory."""
    if model.streaming is None:
        return _row_stats(model.streamed_rows.stats) if model.streamed_rows else None
    stats = model.streaming.stats
    return {
        "bytes_read": stats.bytes_read,
        "bytes_per_token": round(stats.bytes_per_token),
        "hit_rate": round(stats.hit_rate, 4),
        "recent_hit_rate": round(stats.steady_hit_rate, 4),
        "read_seconds": round(stats.read_seconds, 6),
        "router_seconds": round(stats.sync_seconds, 6),
        "expert_seconds": round(stats.compute_seconds, 6),
        "bank_bytes": model.streaming.nbytes,
    }


def _row_stats(stats: "RowStats") -> dict[str, Any]:
    return {
        "bytes_read": stats.bytes_read,
        "bytes_per_token": round(stats.bytes_read / max(stats.rows, 1)),
        "hit_rate": round(stats.hit_rate, 4),
        "recent_hit_rate": round(stats.steady_hit_rate, 4),
        "read_seconds": round(stats.read_seconds, 6),
    }
