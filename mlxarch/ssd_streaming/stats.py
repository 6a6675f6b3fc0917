"""Counters of expert offload: cache hits, bytes read, and seconds spent waiting."""

from collections import deque
from dataclasses import dataclass, field

RECENT = 64  # generated tokens


@dataclass
class Stats:
    """Counters of one model since it was loaded.

    Attributes:
        wanted: experts that the routers chose, each counted once for a layer and pass.
        hits: chosen experts that were in memory.
        bytes_read: bytes read from the SSD or the system's page cache.
        decode_bytes: bytes read while single tokens were generated.
        decoded: generated tokens.
        read_seconds: time spent waiting for records.
        compute_seconds: time spent waiting for outputs of experts.
        sync_seconds: time spent waiting for routers after that, with all that is computed between.
    """

    wanted: int = 0
    hits: int = 0
    bytes_read: int = 0
    decode_bytes: int = 0
    decoded: int = 0
    read_seconds: float = 0.0
    sync_seconds: float = 0.0
    compute_seconds: float = 0.0
    _recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def count_tokens(self, rows: int) -> None:
        """Count a pass over one token of each of ``rows`` sequences."""
        self.decoded += rows
        self._recent.append((0, 0))

    def count_call(self, wanted: int, hits: int, nbytes: int, decoding: bool) -> None:
        """Count the experts of one layer in one pass."""
        self.wanted += wanted
        self.hits += hits
        self.bytes_read += nbytes
        if decoding and self._recent:
            self.decode_bytes += nbytes
            wanted_before, hits_before = self._recent[-1]
            self._recent[-1] = (wanted_before + wanted, hits_before + hits)

    @property
    def hit_rate(self) -> float:
        """Share of chosen experts that were in memory, since the model was loaded."""
        return self.hits / self.wanted if self.wanted else 1.0

    @property
    def steady_hit_rate(self) -> float:
        """Share of chosen experts that were in memory, over the last 64 generated tokens."""
        wanted = sum(count for count, _ in self._recent)
        return sum(hits for _, hits in self._recent) / wanted if wanted else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read for each generated token."""
        return self.decode_bytes / self.decoded if self.decoded else 0.0
