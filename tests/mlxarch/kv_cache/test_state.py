"""States of recurrent layers: they return to snapshots only, and rows of a batch keep their own."""

import mlx.core as mx
import pytest

from mlxarch.errors import InvalidInput
from mlxarch.kv_cache import RowCaches, StateCache


def after(*lengths: int, keep: int = 2) -> StateCache:
    """A cache that was fed chunks, with a snapshot after each but the last."""
    cache = StateCache()
    for index, length in enumerate(lengths):
        cache.update(length, mx.full((1, 2), cache.length + length), mx.full((1, 3), index))
        if index + 1 < len(lengths):
            cache.snapshot(keep)
    return cache


def test_it_goes_back_to_a_snapshot_and_never_between() -> None:
    cache = after(5, 3, 4)
    assert [cache.truncatable_length(n) for n in (99, 12, 11, 8, 7, 5, 4)] == [
        12,
        12,
        8,
        8,
        5,
        5,
        0,
    ]
    assert not cache.truncate(11) and cache.length == 12, "nothing changes"
    assert cache.truncate(8)
    assert cache.length == 8 and cache.state[0].tolist() == [[8, 8]]
    assert cache.truncate(5) and cache.state[0].tolist() == [[5, 5]]
    assert cache.truncatable_length(4) == 0


def test_only_the_newest_snapshots_are_kept() -> None:
    assert after(5, 3, 4, keep=1).truncatable_length(7) == 0
    assert after(5, 3, 4, keep=0).truncatable_length(11) == 0


def test_a_cache_without_snapshots_goes_back_to_nothing() -> None:
    cache = after(5)
    assert cache.truncate(0) and cache.state == () and cache.length == 0


def test_a_snapshot_is_no_view_of_what_comes_after() -> None:
    cache = after(5, 3)
    state = cache.state[0]
    cache.update(1, state + 1, cache.state[1])
    assert state.tolist() == [[8, 8]] and cache.truncate(5) and cache.state[0].tolist() == [[5, 5]]


def test_bytes_are_those_of_state_and_snapshots() -> None:
    cache = after(5, 3)
    assert cache.snapshot_bytes == 5 * 4 and cache.nbytes == 2 * 5 * 4
    assert cache.state_bytes(1, 2) == 2 * 4 + 3 * 2


def test_rows_have_states_of_their_own() -> None:
    caches = [after(5), after(9)]
    batch = RowCaches(caches, 4)
    assert batch.state[0].tolist() == [[5, 5], [9, 9], [9, 9], [9, 9]]
    batch.update(1, batch.state[0] + 1, batch.state[1])
    assert [cache.length for cache in caches] == [6, 10]
    assert [cache.state[0].tolist() for cache in caches] == [[[6, 6]], [[10, 10]]]


def test_it_takes_no_keys_and_values() -> None:
    with pytest.raises(InvalidInput, match="recurrent"):
        StateCache().append(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))


def test_an_exported_state_is_restored_in_another_cache() -> None:
    source = after(5, 3)
    target = StateCache()
    target.restore(source.length, [source.export()])
    assert target.length == 8 and [a.tolist() for a in target.state] == [
        a.tolist() for a in source.state
    ]
    assert target.truncatable_length(7) == 0, "snapshots stay behind"
