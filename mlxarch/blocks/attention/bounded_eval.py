"""Evaluate large arrays one after the other, to bound peak memory.

MLX schedules everything it is asked for at once, and may hold all intermediate results of a graph
at the same time.
"""

from collections.abc import Sequence

import mlx.core as mx


def eval_two_in_flight(newest: Sequence[mx.array], previous: Sequence[mx.array]) -> list[mx.array]:
    """Start computing ``newest``, and wait for ``previous``, so that two are in flight at a time.

    Arrays that were started together are waited for together: if nothing of ``previous`` was
    started earlier, this waits for everything. On CUDA it always does: MLX frees memory there some
    time after the computation that used it, and without the wait the memory of many blocks was
    measured to be in use at once.

    While MLX traces the operations of a pass (``mx.export_function``) nothing can be computed. Then
    the last of the newest arrays gets a ``depends`` operation on the last previous one, which
    ``mlxarch.planner.peak_memory`` recognises.

    Returns:
        The newest arrays.
    """
    try:
        mx.async_eval(*newest)
    except ValueError:
        return [*newest[:-1], mx.depends(newest[-1], [previous[-1]])]
    if _frees_memory_late():
        mx.synchronize()
    else:
        mx.eval(*previous)
    return list(newest)


def _frees_memory_late() -> bool:
    """Whether MLX runs on CUDA."""
    return mx.default_device() != mx.cpu and not mx.metal.is_available()
