"""Figures of a server for monitoring, in the text format of Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mlxarch.server.answers.events import End, Usage

_TOTALS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
)
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Histogram:
    """Counts of durations by bucket."""

    def __init__(self, buckets: Sequence[float] = _BUCKETS) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(self._buckets, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """Lines of the text format."""
        lines = [f"# TYPE {name} histogram"]
        total = 0
        for bound, count in zip([*map(str, self._buckets), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Figures since the start of the server."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter(dict.fromkeys(_TOTALS, 0))
        self._finished: Counter[str] = Counter()
        self._durations = {
            name: Histogram()
            for name in (
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
            )
        }

    def add(self, usage: Usage, endings: Iterable[End], seconds: float) -> None:
        """Count a request that has ended."""
        self._totals["prompt_tokens_total"] += usage.prompt
        self._totals["generation_tokens_total"] += usage.answer
        self._totals["prefix_cache_queries_total"] += usage.prompt
        self._totals["prefix_cache_hits_total"] += usage.cached
        durations = self._durations
        durations["e2e_request_latency_seconds"].add(seconds)
        for end in endings:
            self._finished[end.reason] += 1
            if (timings := end.timings) is None:
                continue
            durations["request_queue_time_seconds"].add(timings.queue_seconds)
            durations["request_prefill_time_seconds"].add(timings.prefill_seconds)
            durations["request_decode_time_seconds"].add(timings.decode_seconds)
            first = timings.queue_seconds + timings.prefill_seconds
            durations["time_to_first_token_seconds"].add(first)
            between = timings.decode_seconds / max(1, end.usage.answer - 1)
            durations["inter_token_latency_seconds"].add(between)

    def render(self, gauges: Mapping[str, float], counters: Mapping[str, int]) -> str:
        """Text format of all figures, under the names that dashboards of vLLM read."""
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name} {value:g}"]
        for name, total in (*self._totals.items(), *counters.items()):
            lines += [f"# TYPE vllm:{name} counter", f"vllm:{name} {total}"]
        lines.append("# TYPE vllm:request_success_total counter")
        for reason, count in self._finished.items():
            lines.append(f'vllm:request_success_total{{finished_reason="{reason}"}} {count}')
        for name, histogram in self._durations.items():
            lines += histogram.lines(f"vllm:{name}")
        return "\n".join(lines) + "\n"


async def metrics(request: Request) -> Response:
    """Answer GET /metrics."""
    server = request.app
    states = [served.engine.status() for served in server.models.all() if served.engine]
    room = sum(state.room_bytes or 0 for state in states)
    used = sum(state.row_bytes + state.prefix_bytes for state in states)
    gauges = {
        "num_requests_running": float(sum(state.running + state.reading for state in states)),
        "num_requests_waiting": float(sum(state.waiting for state in states)),
        "kv_cache_usage_perc": used / room if room else 0.0,
        "kv_cache_bytes": float(used),
        "models_loaded": float(len(states)),
    }
    plans = [served.model.plan for served in server.models.all() if served.model]
    gauges["prefix_cache_bytes"] = float(sum(state.prefix_bytes for state in states))
    gauges["memory_planned_bytes"] = float(sum(plan.mlx_peak for plan in plans if plan))
    counted = {"num_preemptions_total": "set_aside", "cancelled_total": "finished_cancelled"}
    counters = {
        name: sum(state.counters.get(key, 0) for state in states) for name, key in counted.items()
    }
    text = server.metrics.render(gauges, counters)
    return Response(text, media_type="text/plain; version=0.0.4")
