"""Prefix cache: KV caches of earlier prompts and answers, in a tree over their token ids.

Each node holds what the caches store of its own tokens, so a beginning that several prompts share
is stored once. Layers that store every token can be cut anywhere. Others, such as sliding windows,
cannot: they are stored as they were at the end of a node, and a prompt can continue only there.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Cache

State = tuple[mx.array, ...]
KEPT_POINTS = 2  # newest points of a branch at which layers that cannot be cut are stored


@dataclass(eq=False)
class Node:
    """Some tokens, after those of its parents.

    Attributes:
        ids: token ids (n,).
        end: tokens from the root to the end of the node.
        parts: for each layer that stores every token, what it stores of the node's.
        states: for each other layer, its state at the end of the node; empty if not stored.
        parent: None for the root, and for a node that was removed.
        children: by their first token.
        used: number of the last use; the largest is the most recent.
    """

    ids: np.ndarray
    end: int
    parts: list[State]
    states: list[State]
    parent: "Node | None"
    children: dict[int, "Node"] = field(default_factory=dict)
    used: int = 0

    @property
    def start(self) -> int:
        """Tokens from the root to its beginning."""
        return self.end - len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return _nbytes(self.parts) + _nbytes(self.states)

    def ancestors(self) -> Iterator["Node"]:
        """The node and its parents, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True)
class Hit:
    """Cached beginning of a prompt.

    Attributes:
        length: tokens that the caches hold after ``restore``.
        matched: tokens that the tree has in common with the prompt, at least ``length``.
        differs: whether the tree goes on differently after these, rather than ending there.
        node: node in which ``length`` lies; None without a hit.
    """

    length: int
    matched: int
    differs: bool
    node: Node | None

    def restore(self, caches: Sequence[Cache | None]) -> None:
        """Bring empty caches to the state after ``length`` tokens."""
        if self.node is None:
            return
        path = list(self.node.ancestors())[::-1]
        whole, others = split_layers(caches)
        for index, cache in enumerate(whole):
            parts = [node.parts[index] for node in path]
            left = self.length - self.node.start
            parts[-1] = tuple(array[:, :, :left] for array in parts[-1])
            cache.restore(self.length, parts)
        for cache, state in zip(others, self.node.states, strict=False):
            cache.restore(self.length, [state])
        mx.eval([cache.arrays() for cache in (*whole, *others)])


def split_layers(caches: Sequence[Cache | None]) -> tuple[list[Cache], list[Cache]]:
    """Caches that store every token, and the others; layers without a cache are left out."""
    own = [cache for cache in caches if cache is not None]
    return [c for c in own if c.stores_all], [c for c in own if not c.stores_all]


class PrefixCache:
    """Tree of cached prompts and answers, of which the least recently used are dropped.

    Args:
        most_bytes: bytes that it may hold.
        grid: multiple of tokens at which prompts may continue; 1 allows all.

    Attributes:
        nbytes: bytes that it holds.
    """

    def __init__(self, most_bytes: int, grid: int = 1) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self.grid = grid
        self._root = Node(np.empty(0, np.int32), 0, [], [], None)
        self._uses = itertools.count(1)
        self._nodes: set[Node] = set()

    def find(self, prompt: Sequence[int], cuts: bool) -> Hit:
        """Longest cached beginning of a prompt at which it can continue.

        The last token of the prompt is never part of it, because its logits are needed.

        Args:
            cuts: whether all layers store every token, so that a prompt can continue anywhere.
        """
        ids = np.asarray(prompt, np.int32)
        node, matched = self._descend(ids)
        differs = matched < min(node.end, len(ids)) or (
            node.end == matched < len(ids) and bool(node.children)
        )
        usable = min(matched, len(ids) - 1) // self.grid * self.grid
        found: Node | None = node
        for found in node.ancestors():
            if cuts and found.start < usable:
                return self._hit(Hit(usable, matched, differs, found))
            if not cuts and found.states and found.end <= usable:
                return self._hit(Hit(found.end, matched, differs, found))
        return Hit(0, matched, differs, None)

    def insert(
        self, ids: Sequence[int], caches: Sequence[Cache | None], free: int | None = None
    ) -> Node | None:
        """Store what the caches hold, which is all of ``ids``.

        Args:
            free: bytes that it may grow by, besides ``most_bytes``; None is not limited.

        Returns:
            The node that ends with the last token; None if there is no room.
        """
        whole, others = split_layers(caches)
        tokens = np.asarray(ids, np.int32)
        node, matched = self._descend(tokens)
        parts: list[State] = []
        if matched < len(tokens):
            parts = [cache.cut(matched, len(tokens)) for cache in whole]
        stored = matched == len(tokens) == node.end and bool(node.states)
        can_continue = not stored and len(tokens) % self.grid == 0
        states = [cache.export() for cache in others] if can_continue else []
        return self.attach(tokens, parts, states, free)

    def matched(self, ids: np.ndarray) -> int:
        """Number of tokens that the tree has in common with the ids."""
        return self._descend(ids)[1]

    def attach(
        self, tokens: np.ndarray, parts: list[State], states: list[State], free: int | None = None
    ) -> Node | None:
        """Store arrays of the tokens that the tree does not have yet.

        Args:
            parts: for each layer that stores every token, what it stores of the new tokens; empty
                without new tokens.
            states: for each other layer, its state after the last token; empty to store none.
            free: as for ``insert``.
        """
        node, matched = self._descend(tokens)
        size = _nbytes(parts) + _nbytes(states)
        path = set(node.ancestors())
        if not self._make_room(size, free, path):
            return None
        if matched < node.end:
            node = self._split(node, matched)
        if matched < len(tokens):
            child = Node(tokens[matched:], len(tokens), parts, [], node)
            node.children[int(tokens[matched])] = child
            self._nodes.add(child)
            self.nbytes += child.nbytes
            node = child
        if states:
            self._set_states(node, states)
            self._drop_old_states(node)
        mx.eval([*parts, *states])
        self._use(node)
        return node

    def path(self, prompt: Sequence[int]) -> "set[Node]":
        """Nodes that hold the cached beginning of a prompt."""
        return set(self._descend(np.asarray(prompt, np.int32))[0].ancestors())

    def drop_least_recently_used(self, kept: "set[Node] | None" = None) -> bool:
        """Drop a node without children; gives whether there was one outside of ``kept``."""
        leaves = [n for n in self._nodes if not n.children and n not in (kept or ())]
        if not leaves:
            return False
        self._remove(min(leaves, key=lambda node: node.used))
        return True

    def clear(self) -> None:
        """Drop everything."""
        while self.drop_least_recently_used():
            pass

    def _descend(self, ids: np.ndarray) -> tuple[Node, int]:
        """The deepest node whose first token the ids have, and the number of tokens in common."""
        node = self._root
        while node.end < len(ids) and int(ids[node.end]) in node.children:
            node = node.children[int(ids[node.end])]
            wanted = ids[node.start : node.end]
            differing = np.flatnonzero(node.ids[: len(wanted)] != wanted)
            common = int(differing[0]) if differing.size else len(wanted)
            if common < len(node.ids):
                return node, node.start + common
        return node, node.end

    def _hit(self, hit: Hit) -> Hit:
        if hit.node is not None:
            self._use(hit.node)
        return hit

    def _use(self, node: Node) -> None:
        number = next(self._uses)
        for each in node.ancestors():
            each.used = number

    def _make_room(self, size: int, free: int | None, kept: "set[Node]") -> bool:
        """Drop nodes until ``size`` more bytes are within the limits."""
        if size > self.most_bytes:
            return False
        allowed = self.most_bytes if free is None else min(self.most_bytes, self.nbytes + free)
        while self.nbytes + size > allowed:
            if not self.drop_least_recently_used(kept):
                return False
        return True

    def _split(self, node: Node, end: int) -> Node:
        """Divide a node in two; gives the upper one, which ends after ``end`` tokens."""
        count = end - node.start
        parent = node.parent
        assert parent is not None
        upper = Node(node.ids[:count], end, _copy_range(node.parts, 0, count), [], parent)
        upper.used = node.used
        node.parts = _copy_range(node.parts, count, len(node.ids))
        node.ids = node.ids[count:]
        mx.eval(upper.parts, node.parts)
        node.parent = upper
        parent.children[int(upper.ids[0])] = upper
        upper.children[int(node.ids[0])] = node
        self._nodes.add(upper)
        return upper

    def _set_states(self, node: Node, states: list[State]) -> None:
        self.nbytes += _nbytes(states) - _nbytes(node.states)
        node.states = states

    def _drop_old_states(self, node: Node) -> None:
        """Keep states at the newest points of the branch, and where it has forked."""
        points = [each for each in node.ancestors() if each.states and len(each.children) < 2]
        for each in points[KEPT_POINTS:]:
            self._set_states(each, [])

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[int(node.ids[0])]
        node.parent = None
        self._nodes.remove(node)
        self.nbytes -= node.nbytes


def _nbytes(states: Sequence[State]) -> int:
    return sum(array.nbytes for state in states for array in state)


def _copy_range(parts: Sequence[State], start: int, stop: int) -> list[State]:
    """Copies of the tokens from ``start`` to ``stop``; a slice would keep all of the memory."""
    indices = mx.arange(start, stop)
    return [tuple(mx.take(array, indices, axis=2) for array in state) for state in parts]
