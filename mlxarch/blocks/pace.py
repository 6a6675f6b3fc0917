"""Large arrays one after the other: MLX prepares as much as it is given, and would hold all of them at once."""

from collections.abc import Sequence

import mlx.core as mx


def two_under_way(newest: Sequence[mx.array], before: Sequence[mx.array]) -> list[mx.array]:
    """Begin to compute ``newest``, and wait for those ``before``; returns the newest.

    What was begun together is waited for together: where nothing of ``before`` was begun earlier, for all. With CUDA
    all is waited for: MLX gives memory back there some time after what needed it has ended, and what many blocks took
    was measured to be there at once.

    Where MLX only lists the operations of a step (``mx.export_function``), nothing can be computed: there the last of
    the newest bears a mark, which ``mlxarch.activations`` knows, and which names what is waited for.
    """
    try:
        mx.async_eval(*newest)
    except ValueError:
        return [*newest[:-1], mx.depends(newest[-1], [before[-1]])]
    if _gives_back_late():
        mx.synchronize()
    else:
        mx.eval(*before)
    return list(newest)


def _gives_back_late() -> bool:
    return mx.default_device() != mx.cpu and not mx.metal.is_available()
