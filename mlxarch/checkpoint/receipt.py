"""Reading of receipt.json, the record of a conversion: options, results and file hashes."""

import os
from pathlib import Path
from typing import Any

from mlxarch.errors import CheckpointError
from mlxarch.system.untrusted_files import read_json

RECEIPT_FILE = "receipt.json"

_MAX_BYTES = 256 << 20  # a model may have a hundred thousand tensors


def read_receipt(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the receipt of a folder; None if it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder) / RECEIPT_FILE
    if not os.path.lexists(path):
        return None
    receipt = read_json(path, limit=_MAX_BYTES, values=10_000_000, error=CheckpointError)
    files = receipt.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(
            f"{path}: `files` must give each file's SHA-256; quantize the model again"
        )
    return receipt


def format_forecast(forecast: float, measured: float) -> str:
    """Format an expected KL divergence beside the measured one, with the deviation in percent."""
    off = f" ({measured / forecast - 1:+.0%})" if forecast > 0 else ""
    return f"{forecast:.3g}, measured {measured:.3g}{off}"
