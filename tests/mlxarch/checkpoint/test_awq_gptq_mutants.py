"""Damaged AWQ and GPTQ matrices: each is read, or refused with a message; nothing else happens."""

import copy
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from codes_by_input import Matrix
from formats import Held

from mlxarch.checkpoint.formats.quantization_config import convert_to_mlx
from mlxarch.errors import MlxArchError

VALUES = [
    None,
    0,
    -1,
    1,
    2,
    3,
    4,
    8,
    16,
    32,
    64,
    7,
    1 << 31,
    1 << 70,
    True,
    False,
    "gemm",
    "gptq",
    "x",
    [],
    {},
    [4],
    4.0,
]
DTYPES = [np.float32, np.int64, np.uint8, np.int32, np.float16, np.uint32, np.int8]


def whole(draw: random.Random) -> Matrix:
    if draw.random() < 0.5:
        return Matrix("awq", (64, 16), draw.choice([8, 32, 64, -1]))
    matrix = Matrix(
        "gptq",
        (64, 32),
        draw.choice([8, 32, -1]),
        bits=draw.choice([2, 4, 8]),
        sym=draw.random() < 0.5,
    )
    return matrix.in_order_of_activations() if draw.random() < 0.5 else matrix


def damaged(array: np.ndarray, draw: random.Random) -> np.ndarray:
    changes = [
        lambda: array[:-1],
        lambda: array[..., :-1],
        lambda: array[:0],
        lambda: array[None],
        lambda: array.reshape(-1),
        lambda: array.ravel()[0],
        lambda: array.view(np.uint8).astype(draw.choice(DTYPES)),
        lambda: np.frombuffer(draw.randbytes(array.nbytes), array.dtype).reshape(array.shape),
    ]
    return np.ascontiguousarray(draw.choice(changes)())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes are NaN and infinity too
def test_a_thousand_mutants_are_read_or_refused() -> None:
    draw, outcomes = random.Random(5), {"read": 0, "refused": 0}
    for _ in range(1000):
        matrix = whole(draw)
        stored, section = dict(matrix.stored()), copy.deepcopy(matrix.section)
        part = draw.choice(sorted(stored))
        kind = draw.randrange(4)
        if kind == 0:
            section[draw.choice(sorted(section.keys() - {"quant_method"}))] = copy.deepcopy(
                draw.choice(VALUES)
            )
        elif kind == 1:
            del stored[part]
        else:
            stored[part] = damaged(stored[part], draw)
        held: dict[str, Any] = {name: Held(array) for name, array in stored.items()}
        try:
            tensors = convert_to_mlx(held, {"quantization_config": section})
            mx.eval([tensor.load() for tensor in tensors.values()])
            outcomes["read"] += 1
        except MlxArchError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) >= 100
