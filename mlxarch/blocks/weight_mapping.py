"""Rules that map the tensors of a published checkpoint to a model's parameters.

A model file lists them in its table ``WEIGHTS``. The rules are only descriptions; they are carried
out by ``mlxarch.loading.resolve``, in the order of the table. Each applies to every tensor whose
name its pattern matches (a regular expression, found anywhere in the name).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rename:
    """Replace the match in the name; ``to`` may refer to the pattern's groups."""

    pattern: str
    to: str


@dataclass(frozen=True)
class AddModelPrefix:
    """Put ``model.`` before ``layers.0.…`` and the like, if no tensor's name begins with it.

    A base model that was saved without a head has such names.
    """


@dataclass(frozen=True)
class Ignore:
    """Leave out these tensors; ``what`` describes them to the user."""

    pattern: str
    what: str


@dataclass(frozen=True)
class IgnoreExtraLayers:
    """Leave out layers from ``num_hidden_layers`` on: multi-token prediction heads (MTP)."""


@dataclass(frozen=True)
class IgnoreFrom:
    """Leave out matching tensors in all layers from a certain one on.

    Attributes:
        first: name of the config's attribute with the index of the first such layer.
        pattern: regular expression of the tensors' names.
        what: describes the tensors to the user.
        carried: whether a converted checkpoint keeps them, for other readers that require every
            published tensor.
    """

    first: str
    pattern: str
    what: str
    carried: bool = False


@dataclass(frozen=True)
class Transpose:
    """Swap the last two axes: stored as (…, in, out), loaded as (…, out, in)."""

    pattern: str


@dataclass(frozen=True)
class TransposeTo:
    """Swap the last two axes of tensors whose last axis is not the wanted one.

    Different programs store them in either order.

    Attributes:
        columns: name of the config's attribute with the wanted size of the last axis.
        swap_square: whether a tensor whose last two axes are equal is swapped.
    """

    pattern: str
    columns: str
    swap_square: bool = False


@dataclass(frozen=True)
class Flatten:
    """Load a tensor as a vector, whatever its shape: (1, 1, H, 1) as (H,)."""

    pattern: str


@dataclass(frozen=True)
class SubtractOne:
    """Subtract 1 from tensors, in checkpoints that store norms of 1 + weight as their sum.

    MLX-LM stores them so, and convolutions as (C, kernel, 1), which tells its files from published
    ones.

    Attributes:
        pattern: regular expression of the tensors' names.
        convolutions: regular expression of the names of convolutions.
    """

    pattern: str
    convolutions: str


@dataclass(frozen=True)
class Stack:
    """Stack the tensors of single experts into one, (E, out, in).

    The pattern's group ``expert`` is the index of the expert, counted from 0.
    """

    pattern: str
    to: str


@dataclass(frozen=True)
class Join:
    """Concatenate the slices of a tensor that is published in slices for several devices.

    The pattern's group ``rank`` is the index of the slice, counted from 0.

    Attributes:
        axis: -2 concatenates slices (out / n, in), -1 slices (out, in / n).
    """

    pattern: str
    to: str
    axis: Literal[-2, -1]


@dataclass(frozen=True)
class SplitRows:
    """Split a tensor (…, n · out, in) into n parts of equal size along its rows.

    Attributes:
        to: names of the parts, in order; they may refer to the pattern's groups.
        interleaved: whether the rows of the parts alternate.
        vector: whether the tensor is a bias, (…, n · out).
    """

    pattern: str
    to: tuple[str, ...]
    interleaved: bool = False
    vector: bool = False


@dataclass(frozen=True)
class SplitSizes:
    """Split a tensor (…, out, in) into parts of different sizes along its rows.

    Attributes:
        to: names of the parts, in order; they may refer to the pattern's groups.
        sizes: name of the config's attribute with the rows of each part.
    """

    pattern: str
    to: tuple[str, ...]
    sizes: str


@dataclass(frozen=True)
class SplitHeads:
    """Split a matrix that contains two for every head, (H · (a + b), in).

    For every head, a rows of the first come before b rows of the second. The first is loaded
    transposed: (H, in, a) and (H, b, in).

    Attributes:
        to: names of the two; they may refer to the pattern's groups.
        sizes: names of a and b in the config.
    """

    pattern: str
    to: tuple[str, str]
    sizes: tuple[str, str]


Rule = (
    Rename
    | AddModelPrefix
    | Ignore
    | IgnoreExtraLayers
    | IgnoreFrom
    | Transpose
    | TransposeTo
    | Flatten
    | SubtractOne
    | Stack
    | Join
    | SplitRows
    | SplitSizes
    | SplitHeads
)


def stacked_experts(*, interleaved: bool = False) -> tuple[Rule, ...]:
    """Rules for experts published as ``experts.gate_up_proj`` (E, in, 2 out) and ``down_proj``.

    Biases are called ``…_bias``. Quantized experts are called ``….weight`` and are not transposed:
    (E, 2 out, in).

    Args:
        interleaved: whether the rows of gate and up alternate.
    """
    weights = (".gate_proj.weight", ".up_proj.weight")
    biases = (".gate_proj.bias", ".up_proj.bias")
    return (
        Transpose(r"\.experts\.(gate_up|down)_proj$"),
        Rename(r"(?<=_proj)$", ".weight"),
        Rename(r"(?<=_proj)_bias$", ".bias"),
        SplitRows(r"\.gate_up_proj\.weight$", weights, interleaved),
        SplitRows(r"\.gate_up_proj\.bias$", biases, interleaved, vector=True),
    )
