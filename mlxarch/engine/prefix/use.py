"""Use of the prefix cache: when the prompt of a row is looked up, and when its caches are stored."""

from collections.abc import Sequence

import numpy as np

from mlxarch.blocks import Cache
from mlxarch.engine.prefix.files import PrefixFiles
from mlxarch.engine.prefix.tree import PrefixCache
from mlxarch.engine.row import Row

POINT_TOKENS = 4096  # between points of a long prompt at which layers with windows are stored


class PrefixUse:
    """Prefix cache of an engine, and the decisions about its use.

    A prompt is looked up when its first chunk is due, and not before: requests with the same
    beginning that arrive together then find what the first of them has read. Layers that cannot be
    cut are stored where the prompt begins to differ from earlier ones, so that the next prompt with
    this beginning can continue there, and every ``POINT_TOKENS`` tokens.

    Args:
        sample: caches of a row, to see which layers can be cut.
        stores_answers: whether answers are stored, too. Their keys and values come from passes over
            one token each, whose bits may differ from those of longer passes.
        files: cache on the disk; None keeps nothing there.
    """

    def __init__(
        self,
        cache: PrefixCache,
        sample: Sequence[Cache | None],
        stores_answers: bool,
        files: PrefixFiles | None = None,
    ) -> None:
        self.cache = cache
        self._files = files
        self._cuts = all(c.stores_all for c in sample if c is not None)
        self._stores_answers = stores_answers

    def close(self) -> None:
        """Finish writing to the disk, and release the memory."""
        if self._files is not None:
            self._files.close()
        self.cache.clear()

    def restore(self, row: Row, free: int | None) -> None:
        """Bring the empty caches of a row to the longest cached beginning of its prompt.

        Args:
            free: bytes that the prefix cache may grow by; None is not limited.
        """
        prompt = row.request.prompt
        if row.request.prompt_logprobs or not self.cache.most_bytes:
            return
        self._load(np.asarray(prompt, np.int32), free)
        hit = self.cache.find(prompt, self._cuts)
        hit.restore(row.caches)
        row.fed = row.cached_tokens = hit.length
        if hit.differs and hit.matched:
            row.first_difference = hit.matched
        if not self._cuts:
            points = {hit.matched, *range(POINT_TOKENS, len(prompt), POINT_TOKENS)}
            points = {point // self.cache.grid * self.cache.grid for point in points}
            row.borders = {point for point in points if hit.length < point < len(prompt)}

    def store(self, row: Row, free: int | None) -> None:
        """Store what the caches of a row hold, if it is useful and there is room.

        Args:
            free: bytes that the prefix cache may grow by; None is not limited.
        """
        ids = [*row.request.prompt, *row.tokens]
        lengths = {cache.length for cache in row.caches if cache is not None}
        length = max(lengths, default=0)
        only_prompt = length <= len(row.request.prompt)
        if (
            self.cache.most_bytes
            and row.reason != "error"
            and len(lengths) == 1
            and 0 < length <= len(ids)
            and (only_prompt or self._stores_answers)
        ):
            node = self.cache.insert(ids[:length], row.caches, free)
            if node is not None and self._files is not None:
                self._files.write(np.asarray(ids[:length], np.int32), node)

    def _load(self, ids: np.ndarray, free: int | None) -> None:
        """Load what files have of a prompt and memory does not."""
        while self._files is not None:
            matched = self.cache.matched(ids)
            found = self._files.longest(ids, matched, len(ids) - 1)
            stored = None if found is None else self._files.load(found[0])
            if found is None or stored is None:
                return
            entry, common = found
            first = matched - entry.start
            left = common - entry.start
            parts = [tuple(a[:, :, first:left] for a in state) for state in stored.parts]
            states = stored.states if common == entry.end else []
            if self.cache.attach(ids[:common], parts, states, free) is None:
                return
