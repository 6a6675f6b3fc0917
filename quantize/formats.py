"""Which packed formats exist, and the choice among them for one matrix. Arithmetic only: no array is made here."""

from collections.abc import Sequence

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.weights import MODES


def default_bits(mode: str) -> int:
    """The bits of a mode that leaves no choice; 4 where it does."""
    bits, _ = MODES.get(mode, ((), ()))
    return bits[0] if len(bits) == 1 else 4


def settings(bits: int, group_size: int | None = None, mode: str = "affine") -> Quantization:
    """Check what was asked for; ``group_size`` None is the mode's own, 64 for affine.

    Raises:
        QuantizationError: naming what is allowed.
    """
    if mode not in MODES:
        raise QuantizationError(f"mode {mode!r} does not exist; allowed: {', '.join(MODES)}")
    bits_allowed, groups_allowed = MODES[mode]
    if bits not in bits_allowed or type(bits) is not int:
        raise QuantizationError(f"{bits!r} bits: mode {mode} allows {_list(bits_allowed)} bits")
    if group_size is None:
        group_size = groups_allowed[0]
    if group_size not in groups_allowed or type(group_size) is not int:
        raise QuantizationError(f"group size {group_size!r}: mode {mode} allows groups of {_list(groups_allowed)}")
    return Quantization(bits, group_size, mode)


def fitting(wanted: Quantization, columns: int) -> Quantization | None:
    """``wanted``, or the same with the largest smaller group that divides a row of ``columns``; None if none does."""
    _, groups = MODES[wanted.mode]
    for size in sorted(groups, reverse=True):
        if size <= wanted.group_size and columns and columns % size == 0:
            return Quantization(wanted.bits, size, wanted.mode)
    return None


def stored_as(quantization: Quantization, shape: Sequence[int], scales: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a packed matrix of logical ``shape`` consists of: part -> (dtype, shape); affine scales in ``scales``.

    Dtypes go by their safetensors names. The scales of the other modes are floats of eight bits, kept as bytes.
    """
    weight, per_group = ("U32", quantization.packed_shape(shape)), quantization.scales_shape(shape)
    if quantization.mode != "affine":
        return {"weight": weight, "scales": ("U8", per_group)}
    return {"weight": weight, "scales": (scales, per_group), "biases": (scales, per_group)}


def as_config(quantization: Quantization) -> dict[str, int | str]:
    """How config.json spells it."""
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def in_words(*settings: Quantization) -> str:
    """How a person reads what some matrices, or all of them, are packed as; several are of one mode."""
    bits, groups = (sorted({getattr(q, name) for q in settings}) for name in ("bits", "group_size"))
    modes = sorted({q.mode for q in settings})
    return f"{_joined(bits)} bits, groups of {_joined(groups)}, {_joined(modes)}"


def _joined(values: Sequence[object]) -> str:
    """As 2, 3 or 4."""
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
