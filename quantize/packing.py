"""How rows of a matrix are packed, by what reaches it and by how its outputs are pulled at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.quantize.families import Families
from mlxarch.quantize.gptq import WIDTH, Feedback, Several, pack_fed, rounded_values
from mlxarch.quantize.importance import Inputs
from mlxarch.quantize.pulls import RowFeedback
from mlxarch.quantize.rounding import affine
from mlxarch.quantize.rows import Loss
from mlxarch.quantize.search import Grid, search, values_of
from mlxarch.quantize.walk import quiet

FEW = 4  # channels for each token, beyond which a search goes without feedback: ``shrunk`` would leave it a ninth
SPAN, SPAN_BYTES = 1536, 8 << 20  # rows that may make up for each other's errors, and what they take in float32


class Method(Protocol):
    """Chooses grids and values of rows by what reaches them."""

    def choose(self, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        """Grids for rows (R, in), and the values that come of them."""
        ...

    def weigh(self, change: np.ndarray) -> np.ndarray:
        """(R, in) times the second moments of the inputs, as far as the method looks at them."""
        ...


class Search:
    """Grids by the importance (in,) of the channels."""

    def __init__(self, importance: np.ndarray) -> None:
        self.importance = importance.astype(np.float32)

    def choose(self, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        """See Method."""
        rows = mx.array(exact)
        grid = search(rows, to, dtype, mx.array(self.importance)).grid
        return grid, values_of(mx.unflatten(rows, -1, (-1, to.group_size)), grid, to.bits)

    def weigh(self, change: np.ndarray) -> np.ndarray:
        """See Method."""
        return change * self.importance


@dataclass
class Recent:
    """The feedback that was worked out last: the next matrix may get the same inputs, as keys do behind queries."""

    rows: list[np.ndarray] = field(default_factory=list)
    feedback: Feedback | None = None

    def of(self, rows: list[np.ndarray], ahead: bool) -> Feedback:
        """By rows (T, in) in parts; the same arrays make the same feedback."""
        known = len(rows) == len(self.rows) and all(own is other for own, other in zip(rows, self.rows, strict=True))
        if self.feedback is None or not known or self.feedback.ahead != ahead:
            self.forget()
            self.feedback = Feedback(np.concatenate(rows) if len(rows) > 1 else rows[0], ahead)
            self.rows = list(rows)
        return self.feedback

    def forget(self) -> None:
        """Make room."""
        self.rows, self.feedback = [], None


def enough(tokens: int, channels: int, ahead: bool) -> bool:
    """Whether so many tokens tell enough of pairs of channels to feed errors back by; ``ahead``: see Feedback."""
    return tokens >= max(min(channels, WIDTH) // FEW if ahead else 1, 1)


class Packer:
    """Packs the rows of a matrix, or of one of ``high`` rows for each expert, in their order.

    Args:
        inputs: what reaches them. Where the rows are kept, errors are fed back from column to column.
        pulls: (expert, start, stop) -> what pulls at these outputs, (T, stop - start); T is 0 where it is not known.
        ahead: whether grids are found before errors are fed back from column to column; see ``Feedback``.
        owed: what is added to the rows before they are packed, (rows, in); see ``trail``.
        recent: what several matrices that are packed one after the other share.
        families: of the rows, where the first inputs weigh differently for some.

    Attributes:
        span: rows of a matrix, from its first on, that make up for each other's errors.
    """

    def __init__(
        self,
        inputs: Inputs,
        high: int,
        pulls: Callable[[int, int, int], np.ndarray],
        ahead: bool = False,
        owed: np.ndarray | None = None,
        recent: Recent | None = None,
        families: Families | None = None,
    ) -> None:
        self._inputs, self._high, self._pulls, self._ahead, self._owed = inputs, high, pulls, ahead, owed
        self._importance, self._recent = inputs.importance(), recent or Recent()
        self.span = max(min(SPAN, SPAN_BYTES // (4 * self._importance.shape[1])), 1)
        self._held: tuple[int, Method] | None = None  # of one expert at a time
        self._families, self._relatives = families, list[Feedback]()

    @quiet()
    def pack(self, rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, loss: Loss) -> dict[str, mx.array]:
        """See ``rows.Pack``."""
        pieces = []
        if self._owed is not None:
            rows = rows.astype(mx.float32) + mx.array(self._owed[start : start + len(rows)])
        for expert, first, last in self._spans(start, start + len(rows)):
            part = rows[first - start : last - start]
            pulls = self._pulls(expert, first % self._high, first % self._high + len(part))
            method = self._related(self._families, first, last) if self._families else self._method(expert)
            if len(pulls):
                pieces.append(_coupled(part, to, dtype, loss, method, RowFeedback(pulls)))
            elif isinstance(method, (Feedback, Several)):
                parts, error, rounded = pack_fed(method, part, to, dtype)
                loss.add_weighted(error, rounded)
                pieces.append(parts)
            else:
                found = search(part, to, dtype, mx.array(self._importance[expert]))
                loss.add_weighted(np.asarray(found.error), np.asarray(found.rounded))
                groups = mx.unflatten(part.astype(mx.float32), -1, (-1, to.group_size))
                pieces.append(affine(groups, found.grid, to.bits, dtype))
        return {name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The expert, the first row and the last but one of rows of one matrix, among all."""
        while start < stop:
            expert = start // self._high if len(self._importance) > 1 else 0
            end = (expert + 1) * self._high if len(self._importance) > 1 else stop
            last = min(start + self.span, end, stop)
            yield expert, start, last
            start = last

    def _method(self, expert: int) -> Method:
        if self._held is None or self._held[0] != expert:
            count, (_, channels) = self._inputs.counts[expert], self._importance.shape
            method: Method = Search(self._importance[expert])
            if self._inputs.rows and enough(count, channels, self._ahead):
                method = self._recent.of(self._inputs.rows[expert], self._ahead)
            self._held = expert, method
        return self._held[1]

    def _related(self, families: Families, start: int, stop: int) -> Method:
        if not self._relatives:
            [[rows]] = self._inputs.rows
            for own, often in zip(np.sqrt(families.states), np.sqrt(families.lookups), strict=True):
                weights = np.concatenate([own, np.full(len(rows) - len(own), often)])
                self._relatives.append(Feedback(rows * weights[:, None]))
        return Several(self._relatives, families.of_row[start:stop])


def _coupled(
    rows: mx.array, to: Quantization, dtype: mx.Dtype, loss: Loss, method: Method, feedback: RowFeedback
) -> dict[str, mx.array]:
    """Rows that make up for each other's errors, or if rounding is better than that, rows that do not, or rounded."""
    exact = np.array(rows.astype(mx.float32))

    def cost(values: np.ndarray) -> np.ndarray:
        change = values - exact
        return np.einsum("ri,ri->", feedback.moments @ change, method.weigh(change)).reshape(1)

    def choose(block: np.ndarray) -> tuple[Grid, np.ndarray]:
        return method.choose(block, to, dtype)

    plain = rounded_values(exact, to, dtype)
    rounded = cost(plain[1])
    for chosen in (lambda: feedback.choose(exact, choose), lambda: choose(exact), lambda: plain):
        grid, values = chosen()
        if (error := cost(values)) < rounded:
            break
    loss.add_weighted(np.minimum(error, rounded), rounded)
    return affine(mx.unflatten(mx.array(values), -1, (-1, to.group_size)), grid, to.bits, dtype)
