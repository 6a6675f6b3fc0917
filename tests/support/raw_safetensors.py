"""safetensors files byte by byte, and which files of a folder are open."""

import contextlib
import json
import os
import struct
import time
from pathlib import Path
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


def open_in(folder: Path) -> int:
    """How many descriptors of this process are files of a folder.

    Of that folder alone: what an earlier test opened may be closed, by a thread of MLX's, during this one.
    """
    files, found = set(), 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # a link to nowhere
            status = path.stat()
            files.add((status.st_dev, status.st_ino))
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # that of the listing is closed by now
            status = os.fstat(int(name))
            found += (status.st_dev, status.st_ino) in files
    return found


def all_closed(folder: Path) -> bool:
    """Whether no file of a folder stays open: a thread of MLX's lets go of a weight's file when it gets to it."""
    deadline = time.monotonic() + 10
    while open_in(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not open_in(folder)
