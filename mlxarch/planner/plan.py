"""Memory plan of a model on a machine, and the request that it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlxarch.errors import InvalidInput, MemoryBudgetError
from mlxarch.loading.execution import Execution
from mlxarch.progress import format_size
from mlxarch.quantization.formats import KV_BITS
from mlxarch.system.machines import Machine

MB = 10**6
HEADROOM_FRACTION = 0.03  # of MLX's peak: how far the plan may be off

Verdict = Literal["resident", "streamed", "does not fit"]


@dataclass(frozen=True)
class Plan:
    """How a model runs on a machine, or why it does not fit. Sizes are in bytes.

    Attributes:
        model, machine: model and machine of the plan.
        memory: memory budget of the process.
        bits: bits of most weight matrices.
        kv_bits: bits of the KV cache; None: not quantized.
        context: tokens of prompt and answer together.
        execution: instructions for loading and generation.
        weights, kv: weights and KV cache in memory, by kind; offloaded weights count with their
            slots in memory.
        activations: allocations of the largest step, as MLX counts them.
        touched_activations: memory pages of these that the process really has at a time: MLX
            counts an array when it is allocated, before it is written to.
        mlx_cache: freed buffers that MLX may keep for later arrays.
        process: Python, its libraries, the tokenizer, and the read buffers of streaming.
        verdict: whether and how the model fits.
        offloaded: description of the weights that are read from the disk; empty without any.
        tokens_per_second: estimated decode speed with a full context; None if the memory bandwidth
            of the machine is unknown.
        remedies: options that would make the model fit.
        grows: whether KV caches grow on demand; otherwise they are allocated for the whole context.
    """

    model: str
    machine: Machine
    memory: int
    bits: int
    kv_bits: int | None
    context: int
    execution: Execution
    weights: Mapping[str, int]
    kv: Mapping[str, int]
    activations: int
    touched_activations: int
    mlx_cache: int
    process: int
    verdict: Verdict
    offloaded: str = ""
    tokens_per_second: float | None = None
    remedies: Sequence[str] = field(default=())
    grows: bool = False

    @property
    def mlx_peak(self) -> int:
        """Predicted peak of MLX's own memory count."""
        return sum(self.weights.values()) + sum(self.kv.values()) + self.activations

    @property
    def kv_room(self) -> int:
        """Bytes that KV caches may take: the memory budget without all other terms."""
        return self.memory - self.total + sum(self.kv.values())

    @property
    def headroom(self) -> int:
        """Reserve for the error of the plan."""
        return round(HEADROOM_FRACTION * self.mlx_peak)

    @property
    def process_peak(self) -> int:
        """Predicted peak memory of the process, without headroom.

        It includes the buffers of a step that MLX keeps after they are freed.
        """
        active = self.mlx_peak - self.activations + self.touched_activations
        return active + min(self.mlx_cache, self.touched_activations) + self.process

    @property
    def total(self) -> int:
        """Sum of all terms, which must fit into the memory budget."""
        return self.mlx_peak + self.mlx_cache + self.process + self.headroom

    @property
    def terms(self) -> dict[str, int]:
        """All terms of the total, by the name under which they are printed."""
        found = {f"weights: {kind}": size for kind, size in self.weights.items()}
        found |= {f"keys and values: {kind}": size for kind, size in self.kv.items()}
        found |= {"activations": self.activations, "MLX's free memory": self.mlx_cache}
        return found | {"Python, libraries, tokenizer": self.process, "headroom": self.headroom}

    @property
    def summary(self) -> str:
        """Verdict, memory and speed in one line."""
        text = f"{self.verdict}: {self.offloaded}" if self.offloaded else self.verdict
        text += (
            f"; with {self.context} tokens of context it takes {format_size(self.total)} of the "
            f"{format_size(self.memory)} that it may use of {self.machine.name}"
        )
        if self.tokens_per_second and self.verdict != "does not fit":
            text += f", about {self.tokens_per_second:.3g} tokens a second"
        return text

    def require(self) -> "Plan":
        """Return the plan itself if it fits.

        Raises:
            MemoryBudgetError: it does not fit; the message lists the terms and the remedies.
        """
        if self.verdict != "does not fit":
            return self
        lines = [
            f"  {size / 1e9:8.2f} GB  {term}" for term, size in self.terms.items() if size >= 5 * MB
        ]
        raise MemoryBudgetError(
            f"{self.model} at {self.bits} bits with {self.context} tokens of context takes "
            f"{format_size(self.total)}, and it may use {format_size(self.memory)} of "
            f"{self.machine.name}:\n"
            + "\n".join([*lines, f"  {self.total / 1e9:8.2f} GB  together"])
            + f"\n{'; or '.join(self.remedies) or 'Take a smaller model.'}"
        )


@dataclass(frozen=True)
class Request:
    """Options of the user for a plan; None leaves the choice to the planner.

    Attributes:
        memory: memory budget of the process in bytes; None: the machine's.
        context: tokens; None: as many as fit, up to the model's maximum.
        bits: bits of the weights; None: as stored.
        kv_bits: bits of the KV cache, 8 or 4; None or 16: not quantized.
        ple: where the per-layer embeddings are kept; "auto": in memory if they fit.
        float_bytes: bytes of a float in computations; None: the machine's default.
        expert_cache_bytes: memory for streamed experts at most; None: all that is left.
    """

    memory: int | None = None
    context: int | None = None
    bits: int | None = None
    kv_bits: int | None = None
    ple: Literal["ssd", "memory", "auto"] = "auto"
    float_bytes: int | None = None
    expert_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 16, *KV_BITS):
            raise InvalidInput(f"kv_bits must be 16, 8 or 4, found {self.kv_bits!r}")
        if self.ple not in ("ssd", "memory", "auto"):
            raise InvalidInput(f"ple must be ssd, memory or auto, found {self.ple!r}")
        if self.memory is not None and (type(self.memory) is not int or self.memory < 1):
            raise InvalidInput(
                f"memory must be a whole number of bytes from 1 on, found {self.memory!r}"
            )
