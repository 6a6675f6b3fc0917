"""Rows of a head that are likely at the same places, and what is multiplied with them there.

The likelihood feels an error d of a row by p (1 − p) (d · h)², with p the chance of the row's token and h the last
state: where the token has no chance, the error costs nothing. The states at which some tokens are likely are unlike
those of others, so that one average over all places tells little of a single row. Every row by itself would ask for a
matrix of moments each; families of rows, by k-means of the mean of the states at which they are likely, get most of it.
"""

from typing import NamedTuple

import numpy as np

from mlxarch.quantize.walk import quiet

LIKELIEST = 64  # tokens of each place that are remembered
FAMILIES, FACTORS = 16, 64 << 20  # at the most, and the bytes of their moments and factors
SKETCH, ROUNDS = 32, 8  # directions in which states are looked at, and of k-means
DOUBT = 100  # places that leave half of what a family has of its own; more leave more
PLACES = 1024  # at once


class Likely(NamedTuple):
    """The likeliest tokens of each place, in no order.

    Attributes:
        ids: (T, n).
        chances: (T, n).
    """

    ids: np.ndarray
    chances: np.ndarray

    @classmethod
    def of(cls, chances: np.ndarray) -> "Likely":
        """By the chances of all tokens, (T, V)."""
        count = min(LIKELIEST, chances.shape[1])
        ids = np.argpartition(chances, -count, axis=1)[:, -count:]
        return cls(ids, np.take_along_axis(chances, ids, 1))

    @property
    def felt(self) -> np.ndarray:
        """How much is felt of an error of the logit, (T, n)."""
        return self.chances * (1 - self.chances)


class Families(NamedTuple):
    """Rows of a table, and what they are weighed by.

    Attributes:
        of_row: the family of each row, (V,); 0 is that of those that are nowhere among the likeliest.
        states: the weight of each place in each family, (families, T), of mean 1.
        lookups: that of what the rows are looked up for, (families,), beside the states.
    """

    of_row: np.ndarray
    states: np.ndarray
    lookups: np.ndarray


def most(channels: int) -> int:
    """Families of rows (channels,) that memory allows; fewer than 2 are none."""
    return min(FAMILIES, FACTORS // (8 * channels**2))


@quiet()
def families(states: np.ndarray, likely: Likely, rows: int, count: int) -> Families:
    """Of a head of ``rows`` rows by the last states (T, in), at most ``count`` beside the first."""
    seen, places = np.unique(likely.ids, return_inverse=True)
    places, felt = places.reshape(likely.ids.shape), likely.felt
    means, felt_by = _means(states, places, felt, len(seen))
    own = _k_means(means, felt_by, count)
    of_row = np.zeros(rows, np.int64)
    of_row[seen] = own + 1
    index = (np.arange(len(states))[:, None] * count + own[places]).ravel()
    by_place, looked_up = (
        np.bincount(index, part.ravel(), len(states) * count).reshape(-1, count).T for part in (felt, likely.chances)
    )
    total = by_place.sum(1, keepdims=True)
    alive = total[:, 0] > 0
    total[~alive] = 1
    clear = np.where(alive, total[:, 0] ** 2 / np.maximum(np.square(by_place).sum(1), 1e-30), 0)  # places in effect
    share = (clear / (clear + DOUBT))[:, None]
    weights = share * by_place / total * len(states) + (1 - share)
    often = np.where(alive, looked_up.sum(1) / total[:, 0] * felt.sum() / likely.chances.sum(), 1)
    first = np.ones((1, len(states)))
    return Families(of_row, np.concatenate([first, weights]).astype(np.float32), np.append(1, often).astype(np.float32))


def _means(states: np.ndarray, places: np.ndarray, felt: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the mean state of each row lies from that of all, (rows, SKETCH), and how much is felt of it, (rows,)."""
    width = min(SKETCH, states.shape[1])
    sketch = states @ np.random.default_rng(0).standard_normal((states.shape[1], width), np.float32)
    felt_by = np.bincount(places.ravel(), felt.ravel(), rows)
    sums = np.zeros((rows, width), np.float32)
    for start in range(0, len(states), PLACES):
        part = slice(start, start + PLACES)
        order = np.argsort(places[part], axis=None, kind="stable")
        each = (felt[part][..., None] * sketch[part][:, None]).reshape(-1, width)[order]
        ids, first = np.unique(places[part].ravel()[order], return_index=True)
        sums[ids] += np.add.reduceat(each, first)
    means = sums / np.maximum(felt_by, 1e-30)[:, None] - sums.sum(0) / max(felt_by.sum(), 1e-30)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30), felt_by


def _k_means(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The cluster of each of some directions (N, width); of ``count``, some may stay empty."""
    centres = points[np.random.default_rng(0).permutation(len(points))[:count]]
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(1)
        sums = np.stack([np.bincount(nearest, weights * axis, len(centres)) for axis in points.T], axis=1)
        centres = (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)).astype(np.float32)
    return (points @ centres.T).argmax(1)
