"""Names of the float dtypes that a model can be computed and stored in, usable without MLX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


def mlx_dtype(name: str | None) -> "mx.Dtype | None":
    """Return the MLX dtype of a name in ``COMPUTE_DTYPES``; None for anything else."""
    import mlx.core as mx  # not at the top: the command line uses the names without MLX

    return getattr(mx, name) if name in COMPUTE_DTYPES else None
