"""Clusters of LM head rows that are likely at the same positions.

An error d of a row changes one logit, which costs about p (1 − p) (d · h)² of likelihood, with p
the probability of the row's token and h the last hidden state: where the token is improbable, its
error costs nothing. The hidden states at which some tokens are probable differ from those of
others, so a Hessian averaged over all positions suits no single row well. A Hessian for each row
would take too much memory; k-means clusters of rows, by the mean hidden state at which they are
probable, retain most of the gain.
"""

from typing import NamedTuple

import numpy as np

from mlxarch.quantize.calibration.layerwise import ignore_float_errors

TOP_K = 64  # tokens kept for each position
MAX_CLUSTERS = 16
MAX_FACTOR_BYTES = 64 << 20  # memory of all clusters' Hessians and their factors
SKETCH_DIM = 32  # dimensions of the random projection of hidden states
KMEANS_ITERATIONS = 8
SHRINKAGE_POSITIONS = 100  # effective positions at which a cluster's own weights count half
POSITION_CHUNK = 1024  # positions processed at once


class TopTokens(NamedTuple):
    """The n most probable next tokens at each of T positions, unordered.

    Attributes:
        ids: token ids, (T, n).
        probabilities: their probabilities, (T, n).
    """

    ids: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def from_probabilities(cls, probabilities: np.ndarray) -> "TopTokens":
        """Select the ``TOP_K`` most probable tokens of each position from probabilities (T, V)."""
        count = min(TOP_K, probabilities.shape[1])
        ids = np.argpartition(probabilities, -count, axis=1)[:, -count:]
        return cls(ids, np.take_along_axis(probabilities, ids, 1))

    @property
    def logit_fisher(self) -> np.ndarray:
        """Fisher information p (1 − p) of each token's logit, (T, n).

        An error e of the logit costs about p (1 − p) e² / 2 in KL divergence, with p the
        probability of the token.
        """
        return self.probabilities * (1 - self.probabilities)


class VocabClusters(NamedTuple):
    """Clusters of the rows of an LM head, and weights of the inputs in each cluster's Hessian.

    Cluster 0 holds the rows that are nowhere among the most probable tokens; all its weights are 1.

    Attributes:
        assignments: cluster index of each row, (V,).
        position_weights: weight of each position's hidden state for each cluster, (clusters, T), of
            mean 1.
        lookup_weights: weight of the inputs that stem from embedding lookups, relative to the
            hidden states, (clusters,).
    """

    assignments: np.ndarray
    position_weights: np.ndarray
    lookup_weights: np.ndarray


def max_clusters(channels: int) -> int:
    """Return the number of clusters whose Hessians fit into ``MAX_FACTOR_BYTES``.

    Args:
        channels: elements of a row; a Hessian and its factor take 8 * channels² bytes.

    Returns:
        At most ``MAX_CLUSTERS``. With fewer than 2, clustering is of no use.
    """
    return min(MAX_CLUSTERS, MAX_FACTOR_BYTES // (8 * channels**2))


@ignore_float_errors()
def cluster_vocabulary(
    states: np.ndarray, top_tokens: TopTokens, vocab_size: int, count: int
) -> VocabClusters:
    """Cluster the rows of an LM head by the hidden states at which their tokens are probable.

    A cluster weighs each position by the Fisher information of its rows' logits there, shrunk
    towards equal weights if it rests on few positions.

    Args:
        states: last hidden states, (T, in).
        top_tokens: most probable tokens at the same T positions.
        vocab_size: number of rows V.
        count: number of clusters besides cluster 0; some may stay empty.
    """
    seen_ids, seen_index = np.unique(top_tokens.ids, return_inverse=True)
    seen_index = seen_index.reshape(top_tokens.ids.shape)
    fisher = top_tokens.logit_fisher
    directions, row_fisher = _mean_state_directions(states, seen_index, fisher, len(seen_ids))
    clusters = _spherical_k_means(directions, row_fisher, count)
    assignments = np.zeros(vocab_size, np.int64)
    assignments[seen_ids] = clusters + 1

    positions = len(states)
    bins = (np.arange(positions)[:, None] * count + clusters[seen_index]).ravel()

    def sum_by_cluster(values: np.ndarray) -> np.ndarray:  # (T, n) -> (clusters, T)
        return np.bincount(bins, values.ravel(), positions * count).reshape(-1, count).T

    position_fisher = sum_by_cluster(fisher)
    position_probability = sum_by_cluster(top_tokens.probabilities)
    totals = position_fisher.sum(1, keepdims=True)
    nonempty = totals[:, 0] > 0
    totals[~nonempty] = 1
    squares = np.maximum(np.square(position_fisher).sum(1), 1e-30)
    effective_positions = np.where(nonempty, totals[:, 0] ** 2 / squares, 0)
    share = (effective_positions / (effective_positions + SHRINKAGE_POSITIONS))[:, None]
    weights = share * position_fisher / totals * positions + (1 - share)
    probability_per_fisher = position_probability.sum(1) / totals[:, 0]
    relative = probability_per_fisher * fisher.sum() / top_tokens.probabilities.sum()
    lookup_weights = np.where(nonempty, relative, 1)
    uniform = np.ones((1, positions))
    return VocabClusters(
        assignments,
        np.concatenate([uniform, weights]).astype(np.float32),
        np.append(1, lookup_weights).astype(np.float32),
    )


def _mean_state_directions(
    states: np.ndarray, rows: np.ndarray, fisher: np.ndarray, row_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Describe each vocabulary entry by the hidden states that predict it, for clustering.

    For each row of the output head, the hidden states of the tokens that rank it among their top
    tokens are averaged, weighted by Fisher information. The result is the direction of this mean
    from the mean of all rows, computed in a random projection.

    Args:
        states: hidden states (T, in).
        rows: row of the output head of each top token, (T, n).
        fisher: Fisher information of the top tokens' logits, (T, n).
        row_count: number of rows R.

    Returns:
        Unit vectors (R, ``SKETCH_DIM`` or less), and the Fisher information summed for each row,
        (R,).
    """
    width = min(SKETCH_DIM, states.shape[1])
    projection = np.random.default_rng(0).standard_normal((states.shape[1], width), np.float32)
    sketch = states @ projection
    row_fisher = np.bincount(rows.ravel(), fisher.ravel(), row_count)
    sums = np.zeros((row_count, width), np.float32)
    for start in range(0, len(states), POSITION_CHUNK):
        part = slice(start, start + POSITION_CHUNK)
        order = np.argsort(rows[part], axis=None, kind="stable")
        weighted = (fisher[part][..., None] * sketch[part][:, None]).reshape(-1, width)[order]
        ids, first = np.unique(rows[part].ravel()[order], return_index=True)
        sums[ids] += np.add.reduceat(weighted, first)
    means = sums / np.maximum(row_fisher, 1e-30)[:, None]
    means = means - sums.sum(0) / max(row_fisher.sum(), 1e-30)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30), row_fisher


def _spherical_k_means(directions: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Cluster unit vectors (N, width) by weighted spherical k-means; return indices (N,).

    Clusters may stay empty.
    """
    start = np.random.default_rng(0).permutation(len(directions))[:count]
    centroids = directions[start]
    for _ in range(KMEANS_ITERATIONS):
        nearest = (directions @ centroids.T).argmax(1)
        axes = [np.bincount(nearest, weights * axis, len(centroids)) for axis in directions.T]
        sums = np.stack(axes, axis=1)
        norms = np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)
        centroids = (sums / norms).astype(np.float32)
    return (directions @ centroids.T).argmax(1)
