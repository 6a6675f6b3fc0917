"""Shapes of expert products that make MLX choose the kernel it would choose with all experts in memory.

On a GPU, MLX chooses a kernel by the number of rows, by the rows for each matrix of the stack, and
by whether the rows are declared sorted by matrix (``GatherQMM::eval_gpu`` and ``gather_mm_rhs_nax``
in mlx/backend/metal, ``GatherQMM::eval_gpu`` and ``supports_gather_qmm_rhs_sm80`` in
mlx/backend/cuda, 0.32). Within a kernel, the result of a row does not depend on other rows. On a
CPU, each row is computed by itself.
"""

from dataclasses import dataclass

from mlxarch.blocks.moe.moe import uses_sorted_kernel

MIN_SORTED_ROWS = 16  # with fewer sorted rows, quantized matrices get another kernel


@dataclass(frozen=True)
class Shape:
    """Row counts of the products that compute one call of the experts.

    Attributes:
        ordered: whether rows are declared sorted by matrix.
        least: minimum number of rows of a product; missing rows are padded.
        most: maximum number of rows of a product.
    """

    ordered: bool
    least: int
    most: int


def shape_on_gpu(rows: int, experts: int, slots: int, packed: bool) -> Shape:
    """Shape for a call of ``rows`` rows on a GPU, with ``slots`` matrices instead of ``experts``.

    Sorted products have as many rows for each slot as the call has for each expert; others as many
    as the call.
    """
    if not uses_sorted_kernel(rows, experts, packed):
        return Shape(False, rows, rows)
    rows_per_expert = rows // experts
    least = max(slots * rows_per_expert, MIN_SORTED_ROWS)
    return Shape(True, least, max(slots * (rows_per_expert + 1) - 1, least))


def shape_on_cpu(rows: int, experts: int, most: int, packed: bool) -> Shape:
    """Shape for a call of ``rows`` rows on a CPU: any number up to ``most``."""
    return Shape(uses_sorted_kernel(rows, experts, packed), 1, most)
