"""Placement of streamed experts: how many of each layer stay in memory, and the memory they need."""

from functools import cached_property

from mlxarch.planner.activation_memory import Peak
from mlxarch.planner.decode_speed import streaming_seconds
from mlxarch.planner.footprint import Footprint, LayerExperts
from mlxarch.progress import format_size
from mlxarch.ssd_streaming.layerwise_prefill import HIDDEN_ARRAYS, segment_token_bytes
from mlxarch.system.machines import Machine


class ExpertPlacement:
    """The experts of a model, some of which are in memory.

    *Slots* are the number of experts of each layer that fit in memory, 0 for a dense layer.

    Args:
        footprint: footprint of the model.
        float_bytes: bytes of a float in computations.
    """

    def __init__(self, footprint: Footprint, float_bytes: int) -> None:
        self.footprint = footprint
        self.float_bytes = float_bytes
        self.experts = footprint.experts
        self.expert_bytes = footprint.expert_bytes(float_bytes)

    @cached_property
    def min_bytes(self) -> int:
        """Bytes of the experts of one token, the least that must be in memory."""
        return sum(
            experts.per_token * size
            for experts, size in zip(self.experts, self.expert_bytes, strict=True)
            if experts
        )

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of each prompt token while a segment of the prompt passes a streamed layer."""
        per_token = max(experts.per_token for experts in self.experts if experts)
        return segment_token_bytes(per_token, self.footprint.hidden_size, self.float_bytes)

    def segment_peak(self, step: Peak, segment: int, chunk: int) -> Peak:
        """Peak bytes while ``segment`` prompt tokens pass a streamed layer together.

        It is the larger of attention, which runs chunk by chunk, and the experts after it.

        Args:
            step: peak of one chunk, which includes the states of its own tokens.
        """
        waiting_tokens = max(segment - chunk, 0)
        waiting = waiting_tokens * HIDDEN_ARRAYS * self.footprint.hidden_size * self.float_bytes
        activation_size = max(experts.activation_size for experts in self.experts if experts)
        activations = min(chunk, segment) * activation_size * self.float_bytes
        running = segment * self.token_bytes + activations
        return Peak(*(max(size + waiting, running) for size in step))

    def fit_slots(self, budget: int, machine: Machine) -> tuple[int, ...] | None:
        """Slots in ``budget`` bytes for the fastest decode; None if one token's experts do not fit.

        Some layers may be kept whole, as those need not wait for their router; the other layers
        share the rest of the budget equally.
        """
        moe_layers = [(layer, experts) for layer, experts in enumerate(self.experts) if experts]
        best: tuple[float, tuple[int, ...]] | None = None
        for whole_layers in range(len(moe_layers) + 1):
            slots = self._slots_with_whole_layers(moe_layers, whole_layers, budget)
            if slots is not None:
                cost = streaming_seconds(self.footprint, machine, self.float_bytes, slots)
                best = min(best, (cost, slots)) if best else (cost, slots)
        return best[1] if best else None

    def _slots_with_whole_layers(
        self, moe_layers: list[tuple[int, LayerExperts]], whole_layers: int, budget: int
    ) -> tuple[int, ...] | None:
        """Slots with the first MoE layers whole; None if that does not fit."""
        slots = [0] * len(self.expert_bytes)
        for layer, experts in moe_layers[:whole_layers]:
            slots[layer] = experts.count
            budget -= slots[layer] * self.expert_bytes[layer]
        others = moe_layers[whole_layers:]
        share = budget // sum(self.expert_bytes[layer] for layer, _ in others) if others else 0
        for layer, experts in others:
            slots[layer] = min(share, experts.count)
            if slots[layer] < experts.per_token:
                return None
        return tuple(slots) if budget >= 0 else None

    def describe(self, slots: tuple[int, ...]) -> str:
        """Describe how much is read from the disk, and how many experts are in memory."""
        moe_layers = [
            (in_memory, experts)
            for in_memory, experts in zip(slots, self.experts, strict=True)
            if experts
        ]
        fewest = min(in_memory for in_memory, _ in moe_layers)
        whole_layers = sum(in_memory == experts.count for in_memory, experts in moe_layers)
        offloaded = sum(
            (experts.count - in_memory) * size
            for in_memory, experts, size in zip(slots, self.experts, self.expert_bytes, strict=True)
            if experts
        )
        text = (
            f"{format_size(offloaded)} of experts from the disk, "
            f"{fewest} of {moe_layers[0][1].count} a layer in memory"
        )
        return text + (f", all of them in {whole_layers} layers" if whole_layers else "")
