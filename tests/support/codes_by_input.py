"""Random matrices in the files' forms of AWQ and GPTQ, and what they stand for, code by code."""

from typing import Any

import numpy as np
from formats import Held

from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.checkpoint.lazy_tensor import LazyTensor

# AutoAWQ's order_map: the output whose code stands in a word's first, second … four bits
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


class Matrix:
    """Random codes (in, out), zero points and scales (groups, out), and the tensors that hold them."""

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        group: int,
        bits: int = 4,
        sym: bool = False,
        seed: int = 0,
    ):
        draw, (inputs, outputs) = np.random.default_rng(seed), shape
        size, levels = inputs if group == -1 else group, 2**bits
        self.kind, self.bits, self.group = kind, bits, group
        self.codes = draw.integers(0, levels, shape)
        self.zeros = draw.integers(0, levels, (-(-inputs // size), outputs))
        if sym:
            self.zeros[:] = levels // 2
        self.scales = draw.uniform(0.001, 0.1, self.zeros.shape).astype(np.float16)
        self.groups = np.arange(inputs) // size
        self.sym, self.act_order, self.stored_less = sym, False, int(kind == "gptq")

    def in_order_of_activations(self, seed: int = 1) -> "Matrix":
        self.groups, self.act_order = np.random.default_rng(seed).permutation(self.groups), True
        return self

    @property
    def values(self) -> np.ndarray:
        """(out, in) in float32."""
        inputs, outputs = self.codes.shape
        values = np.zeros((outputs, inputs))
        for i in range(inputs):
            for o in range(outputs):
                group = self.groups[i]
                values[o, i] = (self.codes[i, o] - self.zeros[group, o]) * np.float64(
                    self.scales[group, o]
                )
        return values.astype(np.float32)

    def words(self, codes: np.ndarray, along: int) -> np.ndarray:
        """Fields of neighbours on an axis in 32 bits."""
        each = 32 // self.bits
        order = AWQ if self.kind == "awq" else range(each)
        fields = np.moveaxis(codes, along, -1)
        fields = fields.reshape(*fields.shape[:-1], -1, each)
        words = sum(
            fields[..., of].astype(np.uint64) << np.uint64(self.bits * at)
            for at, of in enumerate(order)
        )
        return np.ascontiguousarray(
            np.moveaxis(np.asarray(words).astype(np.uint32).view(np.int32), -1, along)
        )

    def stored(self, base: str = "m") -> dict[str, np.ndarray]:
        zeros = (self.zeros - self.stored_less) % 2**self.bits
        found = {
            f"{base}.qweight": self.words(self.codes, 1 if self.kind == "awq" else 0),
            f"{base}.qzeros": self.words(zeros, 1),
            f"{base}.scales": self.scales,
        }
        return (
            found if self.kind == "awq" else found | {f"{base}.g_idx": self.groups.astype(np.int32)}
        )

    @property
    def section(self) -> dict[str, Any]:
        if self.kind == "awq":
            common = {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group,
                "zero_point": True,
                "version": "gemm",
            }
            return common | {"modules_to_not_convert": None}
        kind = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.stored_less else "gptq_v2",
        }
        return kind | {
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.act_order,
            "sym": self.sym,
        }

    def tensor(self, **changes: Any) -> LazyTensor:
        held = {name: Held(array) for name, array in self.stored().items()}
        return convert_to_mlx(held, {"quantization_config": self.section | changes})["m.weight"]
