"""What a conversion tells of itself: figures, and the facts that it learns of each parameter on the way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxarch.quantize.rows import Loss


@dataclass(frozen=True)
class Summary:
    """What a conversion made.

    Attributes:
        source_bytes, output_bytes: of the weights.
        tensors: parameters of the model; ``quantized`` of them are packed.
        bits_per_weight: of all parameters, those left as floats and all scales included.
        notes: sentences about what is not as one might expect.
    """

    output: Path
    source_bytes: int
    output_bytes: int
    tensors: int
    quantized: int
    bits_per_weight: float
    notes: list[str]


@dataclass(frozen=True)
class Fact:
    """What was learned of a parameter while it was written; the journal keeps it for a later run.

    Attributes:
        error: squared error over squares; None of what was not quantized.
        against_rounding: what its method measures of the error, over the same of rounding; None of what was rounded.
        unreached: its experts that no token came to.
    """

    error: float | None = None
    against_rounding: float | None = None
    unreached: tuple[int, ...] = ()

    @classmethod
    def of(cls, loss: Loss, unreached: Sequence[int]) -> "Fact":
        """Of a parameter all rows of which were added to ``loss``."""
        return cls(loss.relative, loss.against_rounding, tuple(unreached))

    @classmethod
    def read(cls, recorded: Mapping[str, Any]) -> "Fact":
        """From the journal."""
        return cls(**{**recorded, "unreached": tuple(recorded["unreached"])})

    def record(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)


def notes(facts: Mapping[str, Fact]) -> Iterator[str]:
    """What a person should know of the facts."""
    rounded = [path for path, fact in facts.items() if fact.against_rounding is not None and fact.against_rounding >= 1]
    if rounded:
        yield f"rounded to nearest, which nothing better was found than: {some(sorted(rounded))}"
    alone = {path.removesuffix(".weight"): fact.unreached for path, fact in facts.items() if fact.unreached}
    modules: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path in sorted(alone):
        module, _, name = path.rpartition(".")
        modules.setdefault((module, alone[path]), []).append(name)
    if modules:
        named = (f"{module} {some(list(map(str, experts)))}" for module, experts in modules)
        yield "experts that no token reached, whose inputs were taken to be like the others': " + "; ".join(named)


def some(names: list[str]) -> str:
    """The first few of them, and how many more."""
    names = [name.removesuffix(".weight") for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
