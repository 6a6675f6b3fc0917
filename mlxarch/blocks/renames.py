"""How a published checkpoint's tensors become a model's parameters: what a model file's ``WEIGHTS`` table is made of.

The rules only say what is to be done; ``mlxarch.weights`` does it. They are applied in the order of the table, each to
every tensor whose name its pattern matches (a regular expression, found anywhere in the name).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rename:
    """Replace what the pattern matches; ``to`` may refer to its groups."""

    pattern: str
    to: str


@dataclass(frozen=True)
class Ignore:
    """Leave these tensors out; ``what`` tells a person what they are."""

    pattern: str
    what: str


@dataclass(frozen=True)
class IgnoreExtraLayers:
    """Leave out layers from ``num_hidden_layers`` on: heads that predict further tokens (MTP)."""


@dataclass(frozen=True)
class IgnoreFrom:
    """Leave out what the pattern matches in layers from a number on; ``first`` names it among the config's values.

    ``carried``: a converted checkpoint has them all the same, for readers that want every published tensor.
    """

    first: str
    pattern: str
    what: str
    carried: bool = False


@dataclass(frozen=True)
class Transpose:
    """Stored (…, in, out), wanted (…, out, in)."""

    pattern: str


@dataclass(frozen=True)
class Stack:
    """Tensors of single experts become one, the group ``expert`` of the pattern counting from 0: (E, out, in)."""

    pattern: str
    to: str


@dataclass(frozen=True)
class Join:
    """Slices become one tensor, side by side in the order of the pattern's group ``rank``, which counts from 0.

    Attributes:
        axis: -2 joins (out / n, in), -1 joins (out, in / n).
    """

    pattern: str
    to: str
    axis: Literal[-2, -1]


@dataclass(frozen=True)
class SplitRows:
    """One tensor holds several: (…, n · out, in), or (…, n · out) where ``vector`` is set, in equal parts.

    Attributes:
        to: names of the parts, in their order; they may refer to the pattern's groups.
        interleaved: the parts' rows alternate.
    """

    pattern: str
    to: tuple[str, ...]
    interleaved: bool = False
    vector: bool = False


@dataclass(frozen=True)
class SplitHeads:
    """One matrix holds two for every head, a rows of the first and then b of the second: (H · (a + b), in).

    The first is wanted transposed: (H, in, a) and (H, b, in).

    Attributes:
        to: names of the two; they may refer to the pattern's groups.
        sizes: a and b, by their names in the config.
    """

    pattern: str
    to: tuple[str, str]
    sizes: tuple[str, str]


Rule = Rename | Ignore | IgnoreExtraLayers | IgnoreFrom | Transpose | Stack | Join | SplitRows | SplitHeads


def stacked_experts(*, interleaved: bool = False) -> tuple[Rule, ...]:
    """Rules for experts published as ``experts.gate_up_proj`` (E, in, 2 out) and ``down_proj``, biases as ``…_bias``.

    Where they come packed they are called ``….weight`` and are not transposed: (E, 2 out, in).
    """
    parts = (".gate_proj.weight", ".up_proj.weight"), (".gate_proj.bias", ".up_proj.bias")
    return (
        Transpose(r"\.experts\.(gate_up|down)_proj$"),
        Rename(r"(?<=_proj)$", ".weight"),
        Rename(r"(?<=_proj)_bias$", ".bias"),
        SplitRows(r"\.gate_up_proj\.weight$", parts[0], interleaved),
        SplitRows(r"\.gate_up_proj\.bias$", parts[1], interleaved, vector=True),
    )
