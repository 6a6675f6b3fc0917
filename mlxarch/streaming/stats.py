"""What streaming costs, counted as it happens."""

from collections import deque
from dataclasses import dataclass, field

STEADY = 64  # tokens


@dataclass
class Stats:
    """Counters of one model, from when it was loaded.

    Attributes:
        wanted, hits: experts that the tokens' routers chose, each counted once a layer and pass, and how many of them
            were in memory.
        bytes_read: from the disk or the system's cache of it.
        decode_bytes: of these, while single tokens were generated.
        decoded: tokens that were generated.
        read_seconds: waited for records.
        compute_seconds: waited for experts' outputs.
        sync_seconds: waited for the routers behind that; what the model computes between the two is in it.
    """

    wanted: int = 0
    hits: int = 0
    bytes_read: int = 0
    decode_bytes: int = 0
    decoded: int = 0
    read_seconds: float = 0.0
    sync_seconds: float = 0.0
    compute_seconds: float = 0.0
    _latest: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=STEADY))

    def token(self, rows: int) -> None:
        """A pass over one token of each of ``rows`` begins."""
        self.decoded += rows
        self._latest.append((0, 0))

    def call(self, wanted: int, hits: int, nbytes: int, decoding: bool) -> None:
        """One layer has got its experts."""
        self.wanted, self.hits, self.bytes_read = self.wanted + wanted, self.hits + hits, self.bytes_read + nbytes
        if decoding and self._latest:
            self.decode_bytes += nbytes
            before = self._latest[-1]
            self._latest[-1] = before[0] + wanted, before[1] + hits

    @property
    def hit_rate(self) -> float:
        """Over the whole life of the model."""
        return self.hits / self.wanted if self.wanted else 1.0

    @property
    def steady_hit_rate(self) -> float:
        """Over the last 64 generated tokens."""
        wanted = sum(count for count, _ in self._latest)
        return sum(hits for _, hits in self._latest) / wanted if wanted else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Read for each generated token."""
        return self.decode_bytes / self.decoded if self.decoded else 0.0
