"""How many rows go into one product of experts, so that MLX computes it as it would with all experts in memory.

On a GPU MLX chooses a kernel by the number of rows, by that of rows for each matrix of the stack, and by whether it is
told that the rows stand in the order of their matrices (``GatherQMM::eval_gpu`` and ``gather_mm_rhs_nax`` in
mlx/backend/metal, ``GatherQMM::eval_gpu`` and ``supports_gather_qmm_rhs_sm80`` in mlx/backend/cuda, 0.32). Within a
kernel a row's result is its own. A CPU takes each row by itself.
"""

from dataclasses import dataclass

from mlxarch.blocks.moe import in_order

TILED = 16  # rows that a product of rows in order has at least: with fewer, packed matrices get another kernel


@dataclass(frozen=True)
class Shape:
    """Of the products that a call is carried out in.

    Attributes:
        ordered: whether MLX is told that their rows stand in the order of the matrices.
        least, most: rows of one product; what is missing is filled up.
    """

    ordered: bool
    least: int
    most: int


def shape_on_gpu(rows: int, experts: int, slots: int, packed: bool) -> Shape:
    """Of a call of ``rows``, with ``slots`` matrices in the place of ``experts``.

    In order: as many rows for each slot as the call has for each expert. Otherwise: as many rows as the call.
    """
    if not in_order(rows, experts, packed):
        return Shape(False, rows, rows)
    each = rows // experts
    least = max(slots * each, TILED)
    return Shape(True, least, max(slots * (each + 1) - 1, least))


def shape_on_cpu(rows: int, experts: int, most: int, packed: bool) -> Shape:
    """Of a call of ``rows``: as they come, up to ``most``."""
    return Shape(in_order(rows, experts, packed), 1, most)
