"""Bits where they are worth most: a choice of settings for each matrix, under a limit of bytes or of divergence.

Each step gives more bits to the matrix where a byte saves the most divergence, by what ``sensitivity`` measured. On the
lower convex hull of what a matrix offers, that is the best choice but for the last step. Projections of a feed-forward
that share an input keep the same settings, for they run as one product. Those of an attention would, too; but they are
small, and values matter so much more than queries that a tenth of the divergence would be lost by it.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf

from mlxarch.blocks import Attention, CausalLM, LatentAttention, Quantization
from mlxarch.blocks.linear import SharedInput
from mlxarch.errors import QuantizationError
from mlxarch.quantize.disk import size

CANDIDATES = (2, 3, 4, 5, 6, 8)  # bits
RANGES = {"size": (1, inf), "bits": (2, 10), "kl": (1e-7, 10)}
"""Of targets: bytes; bits, scales included; nats, of which 1e-7 are float32's noise and 10 what a blind guess loses."""
GROUP_SIZE = 128  # of a mixture, unless it is given: what fewer scales leave is worth more as bits


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an output may take or lose; one of the three.

    Attributes:
        size: bytes of the whole folder.
        bits: per weight of the quantized matrices, scales and biases included.
        kl: mean divergence from the original, nats per token.
    """

    size: int | None = None
    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise QuantizationError(f"a target is one of size, bits and kl; found {', '.join(given) or 'none'}")
        found, (least, most) = vars(self)[name := given[0]], RANGES[name]
        if not least <= found <= most or found == inf:
            span = f"from {least:g} to {most:g}" if most < inf else "of bytes"
            raise QuantizationError(f"a target of {name} is a number {span}; found {found:g}")


def check_room(target: Target, room: int, least: int, most: int, elements: int) -> None:
    """Refuse a target of size or bits that leaves nothing to choose.

    Args:
        target: what was asked for.
        room: the bytes that it leaves for the matrices.
        least, most: what these take at the fewest bits and at the most, with scales and biases.
        elements: of them.

    Raises:
        QuantizationError: saying what is allowed.
    """
    if least <= room <= most or not elements:
        return
    if target.size is not None:
        asked, low, high = size(target.size), *(size(target.size - room + nbytes) for nbytes in (least, most))
    else:
        asked = f"{target.bits:g} bits per weight"
        low, high = f"{ceil(800 * least / elements) / 100:g}", f"{floor(800 * most / elements) / 100:g}"
    remedy = "a smaller model" if room < least else f"{max(CANDIDATES)} bits for all"
    raise QuantizationError(
        f"a target of {asked} leaves nothing to choose: with scales and biases it is {low} at {min(CANDIDATES)} bits "
        f"everywhere, and {high} at {max(CANDIDATES)}. Ask for something in between, or take {remedy}"
    )


@dataclass(frozen=True)
class Option:
    """One way to store some matrices: what it costs in bytes and in nats per token."""

    to: Quantization
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """The settings chosen.

    Attributes:
        settings: path -> settings.
        forecast: nats per token that all of them are expected to cost.
        nbytes: of all matrices.
    """

    settings: dict[str, Quantization]
    forecast: float
    nbytes: int


def ties(model: CausalLM, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """The paths of matrices, those together that share the input of a feed-forward."""
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    groups: dict[str, tuple[str, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            continue
        for value in vars(module).values():
            if isinstance(value, SharedInput):
                together = tuple(names[id(projection)] for projection in value.projections)
                groups |= dict.fromkeys(together, together)
    return list(dict.fromkeys(groups.get(path, (path,)) for path in paths))


def choose(offers: Mapping[tuple[str, ...], Sequence[Option]], room: int | None, kl: float | None = None) -> Choice:
    """Settings for all matrices.

    Args:
        offers: tied paths -> what each of them may become, all together.
        room: bytes for them; None where ``kl`` is the limit.
        kl: nats per token that may be lost; as few bytes as that takes.

    Raises:
        QuantizationError: not even the smallest options fit, or the best are not good enough.
    """
    hulls = {paths: _hull(options) for paths, options in offers.items()}
    taken = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].nbytes for hull in hulls.values())
    cost = sum(hull[0].cost for hull in hulls.values())
    if room is not None and spent > room:
        raise QuantizationError(
            f"the matrices take {size(spent)} at the fewest bits there are, and {size(max(room, 0))} are left for "
            "them; ask for a larger target, or take a smaller model"
        )
    steps = [_step(hull, 0, paths) for paths, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps and not (kl is not None and cost <= kl):
        _, paths = heapq.heappop(steps)
        hull, at = hulls[paths], taken[paths]
        more, less = hull[at + 1].nbytes - hull[at].nbytes, hull[at].cost - hull[at + 1].cost
        if room is not None and spent + more > room:
            continue  # another, smaller one may still fit
        taken[paths], spent, cost = at + 1, spent + more, cost - less
        if at + 2 < len(hull):
            heapq.heappush(steps, _step(hull, at + 1, paths))
    if kl is not None and cost > kl:
        raise QuantizationError(
            f"a divergence of {kl:g} nats per token cannot be reached: with {max(CANDIDATES)} bits everywhere it is "
            f"about {cost:.2g}; ask for more, or leave the weights unquantized"
        )
    chosen = {path: hulls[paths][at].to for paths, at in taken.items() for path in paths}
    return Choice(chosen, cost, spent)


def offers_of(
    groups: Sequence[tuple[str, ...]],
    costs: Mapping[str, Mapping[Quantization, float]],
    stored: Callable[[str, Quantization], int],
) -> dict[tuple[str, ...], list[Option]]:
    """What tied matrices may become; ``stored`` says the bytes of one at some settings."""
    return {
        paths: [
            Option(to, sum(stored(p, to) for p in paths), sum(costs[p][to] for p in paths)) for to in costs[paths[0]]
        ]
        for paths in groups
    }


def _step(hull: Sequence[Option], at: int, paths: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
    """Sorts by how much a byte saves, the most first; by name where that is equal, for the same result every time."""
    return (hull[at + 1].cost - hull[at].cost) / max(hull[at + 1].nbytes - hull[at].nbytes, 1), paths


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those that no mixture of two others beats, from the smallest to the largest."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _worth(hull[-2], hull[-1]) <= _worth(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _worth(one: Option, other: Option) -> float:
    return (one.cost - other.cost) / max(other.nbytes - one.nbytes, 1)
