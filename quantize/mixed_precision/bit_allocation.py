"""Bit allocation: how many bits each matrix gets under a limit on size or on KL divergence.

For every matrix and every candidate number of bits, the stored bytes and the expected KL divergence
(in nats per token) are known; the divergences of the matrices are taken to add up. All matrices
start at the fewest bits. Each step then raises the bits of the matrix whose upgrade saves the most
divergence per additional byte, until the size is used up or the divergence is low enough. Among the
options on the lower convex hull of each matrix's (bytes, divergence) points, this greedy choice is
optimal up to the last step.

The gate and up projections of a feed-forward network share their input and run as one product, so
they get the same bits. The query, key and value projections of attention may differ: they are
small, and values affect the output so much more than queries that equal bits would cost a tenth of
the divergence.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf

from mlxarch.blocks import Attention, CausalLM, LatentAttention
from mlxarch.blocks.linear import FusableProjections
from mlxarch.errors import QuantizationError
from mlxarch.quantization.scheme import Quantization
from mlxarch.system.durable_files import format_bytes

CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)
# size in bytes; bits per weight, scales and biases included; KL divergence in nats per token, where
# 1e-7 is the noise of float32 and 10 the loss of a model that guesses blindly
TARGET_RANGES = {"size": (1, inf), "bits": (2, 10), "kl": (1e-7, 10)}
# larger than for uniform bits: the bytes saved on scales are worth more as bits
DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Target:
    """Limit on the size or the quality loss of a quantized model; one of the three is given.

    Attributes:
        size: bytes of the whole output folder.
        bits: average bits per weight of the quantized matrices, scales and biases included.
        kl: mean KL divergence from the original model, in nats per token.
    """

    size: int | None = None
    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise QuantizationError(
                f"a target is one of size, bits and kl; found {', '.join(given) or 'none'}"
            )
        name = given[0]
        value = vars(self)[name]
        least, most = TARGET_RANGES[name]
        if not least <= value <= most or value == inf:
            span = f"from {least:g} to {most:g}" if most < inf else "of bytes"
            raise QuantizationError(f"a target of {name} is a number {span}; found {value:g}")


def check_byte_budget(
    target: Target, byte_budget: int, smallest: int, largest: int, elements: int
) -> None:
    """Refuse a target of size or of bits per weight that leaves no choice of bits.

    Args:
        target: requested target, for the message.
        byte_budget: bytes that the target leaves for the matrices.
        smallest, largest: bytes of all matrices at the fewest and at the most candidate bits,
            scales and biases included.
        elements: number of weights of the matrices; with 0 there is nothing to check.

    Raises:
        QuantizationError: ``byte_budget`` is not between ``smallest`` and ``largest``; the message
            names the range.
    """
    if smallest <= byte_budget <= largest or not elements:
        return
    if target.size is not None:
        asked = format_bytes(target.size)
        other_bytes = target.size - byte_budget
        low = format_bytes(other_bytes + smallest)
        high = format_bytes(other_bytes + largest)
    else:
        asked = f"{target.bits:g} bits per weight"
        low = f"{ceil(800 * smallest / elements) / 100:g}"
        high = f"{floor(800 * largest / elements) / 100:g}"
    fewest = min(CANDIDATE_BITS)
    most = max(CANDIDATE_BITS)
    remedy = "a smaller model" if byte_budget < smallest else f"{most} bits for all"
    raise QuantizationError(
        f"a target of {asked} leaves nothing to choose: with scales and biases it is {low} at "
        f"{fewest} bits everywhere, and {high} at {most}. Ask for something in between, or take "
        f"{remedy}"
    )


@dataclass(frozen=True)
class Option:
    """One possible quantization of a matrix, or of matrices that must share it.

    Attributes:
        quantization: bits, group size and mode.
        nbytes: stored bytes of these matrices, scales and biases included.
        kl: KL divergence that quantizing them so is expected to cost, in nats per token.
    """

    quantization: Quantization
    nbytes: int
    kl: float


@dataclass(frozen=True)
class BitAllocation:
    """The quantization chosen for each matrix, with the expected result.

    Attributes:
        quantizations: path of the matrix -> its quantization.
        expected_kl: expected KL divergence of the quantized model from the original in nats per
            token: the sum over the matrices.
        nbytes: stored bytes of all these matrices.
    """

    quantizations: dict[str, Quantization]
    expected_kl: float
    nbytes: int


def shared_input_groups(model: CausalLM, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Group the matrices that must get equal bits: projections of one feed-forward input.

    Args:
        model: whose modules say which projections share an input.
        paths: paths of the matrices, such as ``model.layers.0.mlp.up_proj.weight``.

    Returns:
        Groups of paths, most of them of a single path, in the order of ``paths``.
    """
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    group_of: dict[str, tuple[str, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            continue
        for value in vars(module).values():
            if isinstance(value, FusableProjections):
                group = tuple(names[id(projection)] for projection in value.projections)
                group_of |= dict.fromkeys(group, group)
    return list(dict.fromkeys(group_of.get(path, (path,)) for path in paths))


def allocate_bits(
    options: Mapping[tuple[str, ...], Sequence[Option]],
    byte_budget: int | None,
    max_kl: float | None = None,
) -> BitAllocation:
    """Choose a quantization for every group of matrices, within a limit on bytes or on divergence.

    With ``byte_budget`` the divergence is made as small as it can be within these bytes; with
    ``max_kl`` the bytes are made as few as they can be within this divergence.

    Args:
        options: group of paths -> the quantizations it may get, each with bytes and expected
            divergence.
        byte_budget: bytes that all matrices together may take; None if ``max_kl`` is the limit.
        max_kl: KL divergence in nats per token that may be lost; bits are raised only until it is
            reached.

    Raises:
        QuantizationError: the smallest options exceed the budget, or the best ones exceed
            ``max_kl``.
    """
    hulls = {paths: _lower_convex_hull(group) for paths, group in options.items()}
    chosen = dict.fromkeys(hulls, 0)  # index into the hull
    nbytes = sum(hull[0].nbytes for hull in hulls.values())
    kl = sum(hull[0].kl for hull in hulls.values())
    if byte_budget is not None and nbytes > byte_budget:
        raise QuantizationError(
            f"the matrices take {format_bytes(nbytes)} at the fewest bits there are, and "
            f"{format_bytes(max(byte_budget, 0))} are left for them; ask for a larger target, or "
            "take a smaller model"
        )
    upgrades = [_upgrade(hull, 0, paths) for paths, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(upgrades)
    while upgrades and not (max_kl is not None and kl <= max_kl):
        _, paths = heapq.heappop(upgrades)
        hull = hulls[paths]
        index = chosen[paths]
        added_bytes = hull[index + 1].nbytes - hull[index].nbytes
        if byte_budget is not None and nbytes + added_bytes > byte_budget:
            continue  # a smaller upgrade may still fit
        chosen[paths] = index + 1
        nbytes += added_bytes
        kl -= hull[index].kl - hull[index + 1].kl
        if index + 2 < len(hull):
            heapq.heappush(upgrades, _upgrade(hull, index + 1, paths))
    if max_kl is not None and kl > max_kl:
        raise QuantizationError(
            f"a divergence of {max_kl:g} nats per token cannot be reached: with "
            f"{max(CANDIDATE_BITS)} bits everywhere it is about {kl:.2g}; ask for more, or leave "
            "the weights unquantized"
        )
    quantizations = {
        path: hulls[paths][index].quantization for paths, index in chosen.items() for path in paths
    }
    return BitAllocation(quantizations, kl, nbytes)


def group_options(
    groups: Sequence[tuple[str, ...]],
    kl_costs: Mapping[str, Mapping[Quantization, float]],
    stored_bytes: Callable[[str, Quantization], int],
) -> dict[tuple[str, ...], list[Option]]:
    """List the options of each group of matrices that must share their quantization.

    Args:
        groups: paths of the matrices of each group.
        kl_costs: path -> quantization -> expected KL divergence in nats per token.
        stored_bytes: returns the bytes of the matrix at a path with a given quantization.

    Returns:
        group -> one option for each quantization, with bytes and divergences added over its
        matrices.
    """
    return {
        paths: [
            Option(
                quantization,
                sum(stored_bytes(path, quantization) for path in paths),
                sum(kl_costs[path][quantization] for path in paths),
            )
            for quantization in kl_costs[paths[0]]
        ]
        for paths in groups
    }


def _upgrade(
    hull: Sequence[Option], index: int, paths: tuple[str, ...]
) -> tuple[float, tuple[str, ...]]:
    """Heap entry of the step from option ``index`` to the next one.

    The step that saves the most divergence per byte comes first; equal ones are ordered by path, so
    that the result is deterministic.
    """
    return -_kl_saved_per_byte(hull[index], hull[index + 1]), paths


def _lower_convex_hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of the points (bytes, divergence), by increasing bytes.

    An option above the line between two others is left out, and so is one that another option beats
    in both.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and (
            _kl_saved_per_byte(hull[-2], hull[-1]) <= _kl_saved_per_byte(hull[-2], option)
        ):
            hull.pop()
        hull.append(option)
    return hull


def _kl_saved_per_byte(smaller: Option, larger: Option) -> float:
    return (smaller.kl - larger.kl) / max(larger.nbytes - smaller.nbytes, 1)
