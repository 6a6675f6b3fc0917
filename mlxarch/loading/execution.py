"""Execution settings of a model: KV-cache quantization, offloaded parts, chunk sizes."""

from dataclasses import dataclass
from typing import Literal

from mlxarch.quantization.scheme import Quantization


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model runs; decided by the planner, carried out by loading and generation.

    The default keeps everything in memory.

    Attributes:
        kv: quantization of the KV caches; None keeps keys and values in the compute dtype.
        slots: experts that each layer of the decoder holds in memory, the others being read from
            the SSD; 0 for a layer without experts. None keeps all experts in memory.
        ple: where per-layer embeddings are looked up, in memory or on the SSD.
        chunk: tokens of a prompt per forward pass, which bounds the activation memory; None takes
            the default of the machine.
        segment: tokens of a prompt that a layer with offloaded experts processes together, so that
            each expert is read once for all of them; at least ``chunk``. None takes the default.
        verify: when checksums of records read from the SSD are checked: at their first read, at
            every read, or never.
    """

    kv: Quantization | None = None
    slots: tuple[int, ...] | None = None
    ple: Literal["memory", "ssd"] = "memory"
    chunk: int | None = None
    segment: int | None = None
    verify: Literal["first", "always", "never"] = "first"
