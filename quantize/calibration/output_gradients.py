"""Gradients of the loss with respect to matrix outputs, stored on disk per token.

Row-wise error feedback needs their second moments E[g gᵀ]; see ``methods.row_feedback``.
"""

from typing import IO, cast

import mlx.nn as nn
import numpy as np

from mlxarch.blocks import ExpertLinear, Router
from mlxarch.blocks.linear import Matrix
from mlxarch.loading.resolve import Resolved
from mlxarch.quantize.calibration.gradient_records import MAX_OUTPUTS


def bytes_per_token(resolved: Resolved) -> int:
    """Estimate the bytes that ``OutputGradients`` stores per token.

    Two for each output of each matrix. Of expert matrices only those count that a token is routed
    to, and matrices per head are not stored.
    """
    model = resolved.model
    active_experts: dict[int, int] = {}  # id of an expert matrix -> experts that a token chooses
    for layer in model.layers:
        modules = cast(nn.Module, layer).modules()
        chosen = max((module.k for module in modules if isinstance(module, Router)), default=0)
        experts = (module for module in modules if isinstance(module, ExpertLinear))
        active_experts |= {id(module): chosen for module in experts}
    outputs = 1
    for path, module in model.named_modules():
        if not isinstance(module, Matrix) or not module.quantizable:
            continue
        *stack, out_features, _ = resolved.tensors[f"{path}.weight"].shape
        if out_features <= MAX_OUTPUTS:
            outputs += out_features * active_experts.get(id(module), 0 if stack else 1)
    return 2 * outputs


class OutputGradients:
    """Per-token gradients of the loss with respect to matrix outputs, in a binary file.

    Stored in bfloat16, which is precise enough because only averages over tokens are used.

    Args:
        file: open binary file, readable and writable; gradients are appended to it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._blocks: dict[str, list[list[tuple[int, tuple[int, int]]]]] = {}

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self._file.seek(0, 2)

    def __contains__(self, path: str) -> bool:
        return path in self._blocks

    def append(self, path: str, gradients: list[np.ndarray]) -> None:
        """Store the gradients of further tokens.

        Args:
            path: parameter path of the matrix.
            gradients: one array (T, out) for a single matrix, or one per expert; T may differ
                between experts.
        """
        blocks = self._blocks.setdefault(path, [[] for _ in gradients])
        for expert_blocks, gradient in zip(blocks, gradients, strict=True):
            expert_blocks.append((self._file.seek(0, 2), gradient.shape))
            bits = np.ascontiguousarray(gradient, np.float32).view(np.uint32)
            self._file.write((bits >> 16).astype(np.uint16).data)

    def read(self, path: str, index: int, start: int, stop: int) -> np.ndarray:
        """Return the gradients (T, stop − start) of outputs ``start`` to ``stop`` in float32.

        Args:
            path: parameter path of the matrix; T is 0 if nothing was stored for it.
            index: expert, or 0 for a single matrix.
            start: first output.
            stop: one past the last output.
        """
        parts = [np.zeros((0, stop - start), np.float32)]
        for offset, shape in self._blocks[path][index] if path in self._blocks else ():
            self._file.seek(offset)
            data = self._file.read(2 * shape[0] * shape[1])
            block = np.frombuffer(data, np.uint16).reshape(shape)
            parts.append((block[:, start:stop].astype(np.uint32) << 16).view(np.float32))
        return np.concatenate(parts)
