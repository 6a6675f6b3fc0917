"""What streamed experts take: places in memory for some of them, and what of a prompt is held while they run."""

from functools import cached_property

from mlxarch.activations import Peak
from mlxarch.footprint import Experts, Footprint
from mlxarch.machines import Machine
from mlxarch.progress import gigabytes
from mlxarch.rates import streaming_seconds
from mlxarch.streaming.prefill import BEHIND, token_bytes


class Places:
    """The experts of a model whose floats take ``float_bytes``, of which some are in memory.

    *Slots* are the number of places for experts in each layer, 0 in a dense one.
    """

    def __init__(self, footprint: Footprint, float_bytes: int) -> None:
        self.footprint, self.float_bytes = footprint, float_bytes
        self.experts, self.sizes = footprint.experts, footprint.expert_bytes(float_bytes)

    @cached_property
    def least(self) -> int:
        """Bytes of the experts of one token."""
        return sum(e.chosen * size for e, size in zip(self.experts, self.sizes, strict=True) if e)

    @cached_property
    def token_bytes(self) -> int:
        """That each token of a prompt takes while it passes a streamed layer."""
        return token_bytes(max(e.chosen for e in self.experts if e), self.footprint.hidden, self.float_bytes)

    def peak(self, step: Peak, segment: int, chunk: int) -> Peak:
        """Bytes while ``segment`` tokens of a prompt pass a layer together: attention at first, then the experts.

        Args:
            step: of a chunk, in which its own states are.
        """
        before = max(segment - chunk, 0) * BEHIND * self.footprint.hidden * self.float_bytes
        row = max(e.row for e in self.experts if e) * self.float_bytes
        running = segment * self.token_bytes + min(chunk, segment) * row
        return Peak(*(max(size + before, running) for size in step))

    def within(self, budget: int, machine: Machine) -> tuple[int, ...] | None:
        """Slots in ``budget`` bytes, for the fastest decode; None if the experts of one token do not fit.

        Whole layers come first, as they need not wait for their router; what is left is shared by the others.
        """
        layers = [(n, e) for n, e in enumerate(self.experts) if e]
        best: tuple[float, tuple[int, ...]] | None = None
        for whole in range(len(layers) + 1):
            slots = self._with_whole(layers, whole, budget)
            if slots is not None:
                cost = streaming_seconds(self.footprint, machine, self.float_bytes, slots)
                best = min(best, (cost, slots)) if best else (cost, slots)
        return best[1] if best else None

    def _with_whole(self, layers: list[tuple[int, Experts]], whole: int, budget: int) -> tuple[int, ...] | None:
        slots = [0] * len(self.sizes)
        for n, experts in layers[:whole]:
            slots[n] = experts.count
            budget -= slots[n] * self.sizes[n]
        others = layers[whole:]
        share = budget // sum(self.sizes[n] for n, _ in others) if others else 0
        for n, experts in others:
            slots[n] = min(share, experts.count)
            if slots[n] < experts.chosen:
                return None
        return tuple(slots) if budget >= 0 else None

    def in_words(self, slots: tuple[int, ...]) -> str:
        """How much is read from the disk, and how many experts are in memory."""
        layers = [(n, e) for n, e in zip(slots, self.experts, strict=True) if e]
        whole = sum(n == e.count for n, e in layers)
        least, most = min(n for n, _ in layers), layers[0][1].count
        size = sum((e.count - n) * b for n, e, b in zip(slots, self.experts, self.sizes, strict=True) if e)
        words = f"{gigabytes(size)} of experts from the disk, {least} of {most} a layer in memory"
        return words + (f", all of them in {whole} layers" if whole else "")
