"""How a model is to be run: what of it stays in memory, and what is read from the disk when it is needed."""

from dataclasses import dataclass
from typing import Literal

from mlxarch.blocks import Quantization


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The planner decides it, loading and generation carry it out. The default holds everything in memory.

    Attributes:
        kv: how the caches are packed; None keeps keys and values in the type that is computed in.
        slots: for each layer of the decoder, how many of its experts have a place in memory, the others being read
            from the disk; 0 for a layer without experts. None keeps all experts where the loader puts them.
        ple: where the table of per-layer embeddings is read from.
        chunk: tokens of a prompt that pass at once, which bounds what a step takes; None: what suits the machine.
        segment: tokens of a prompt that pass a layer with streamed experts together, so that each expert is read once
            for all of them; at least a chunk. None: as many as usual.
        verify: when the checksums of records read from the disk are checked.
    """

    kv: Quantization | None = None
    slots: tuple[int, ...] | None = None
    ple: Literal["memory", "ssd"] = "memory"
    chunk: int | None = None
    segment: int | None = None
    verify: Literal["first", "always", "never"] = "first"
