"""safetensors files byte by byte, and how many files are open."""

import json
import os
import struct
from typing import Any

import numpy as np


def safetensors(metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> bytes:
    """A file of arrays, in the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in arrays.items():
        entry = {"dtype": {"float32": "F32", "uint8": "U8"}[str(array.dtype)], "shape": array.shape}
        header[name] = entry | {"data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def open_files() -> int:
    """How many this process holds."""
    return len(os.listdir("/dev/fd"))
