"""Summary of a conversion, and the measured result for each parameter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxarch.quantize.methods.row_chunks import ErrorStats


@dataclass(frozen=True)
class Summary:
    """Sizes and notes of a conversion.

    Attributes:
        output: folder of the result.
        source_bytes, output_bytes: bytes of the weights before and after.
        tensors: number of the model's parameters.
        quantized: how many of them are quantized.
        bits_per_weight: average over all parameters, including unquantized ones, scales and biases.
        notes: sentences about anything unexpected.
    """

    output: Path
    source_bytes: int
    output_bytes: int
    tensors: int
    quantized: int
    bits_per_weight: float
    notes: list[str]


@dataclass(frozen=True)
class ParameterResult:
    """Measurements of one parameter, made while it is written and kept in the journal.

    Attributes:
        error: relative squared error, the sum of squared differences over the sum of squares of the
            source's values; None if the parameter was not quantized.
        against_rounding: the error that the method minimizes, divided by that of rounding to
            nearest; None if the parameter was rounded.
        unreached: indices of the experts that no calibration token was routed to.
    """

    error: float | None = None
    against_rounding: float | None = None
    unreached: tuple[int, ...] = ()

    @classmethod
    def from_error_stats(
        cls, error_stats: ErrorStats, unreached: Sequence[int]
    ) -> "ParameterResult":
        """Result of a parameter all rows of which have been added to ``error_stats``."""
        return cls(error_stats.relative_error, error_stats.against_rounding, tuple(unreached))

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> "ParameterResult":
        """Read a result from its journal entry."""
        return cls(**{**recorded, "unreached": tuple(recorded["unreached"])})

    def to_json(self) -> dict[str, Any]:
        """Convert the result to a journal entry."""
        return asdict(self)


def notes_on_results(results: Mapping[str, ParameterResult]) -> Iterator[str]:
    """Sentences on parameters that the method did not improve and on unreached experts.

    Args:
        results: path of the parameter -> its result.
    """
    not_improved = [
        path
        for path, result in results.items()
        if result.against_rounding is not None and result.against_rounding >= 1
    ]
    if not_improved:
        names = list_names(sorted(not_improved))
        yield f"rounded to nearest, because the method found nothing better: {names}"
    unreached = sorted(
        (path.removesuffix(".weight"), result.unreached)
        for path, result in results.items()
        if result.unreached
    )
    # the projections of a module mostly miss the same experts: they are named once
    modules = dict.fromkeys((path.rpartition(".")[0], experts) for path, experts in unreached)
    if modules:
        named = (f"{module} {list_names(list(map(str, experts)))}" for module, experts in modules)
        yield (
            "experts that no calibration token reached; the average inputs of the other experts "
            f"were used for them: {'; '.join(named)}"
        )


def list_names(names: list[str]) -> str:
    """The first eight parameter names, without ``.weight``, and how many more there are."""
    names = [name.removesuffix(".weight") for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
