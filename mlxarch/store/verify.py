"""Check the files of a model against the checksums in its receipt."""

import os
from pathlib import Path

from mlxarch.checkpoint.receipt import RECEIPT_FILE, read_receipt
from mlxarch.errors import CheckpointError
from mlxarch.system.checksums import sha256_files

# Left behind by file managers and the Hub's library
_IGNORED_FILES = {".DS_Store", "Thumbs.db", ".cache", ".gitattributes"}


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Return the problems of a folder: files that changed, are missing or were added.

    Raises:
        CheckpointError: there is no receipt, or it is damaged.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        raise CheckpointError(
            f"{folder} has no {RECEIPT_FILE}; `mlxarch quantize` writes one into what it makes"
        )
    expected = receipt["files"]
    ignored = _IGNORED_FILES | {RECEIPT_FILE}
    found = {path.name: path for path in Path(folder).iterdir() if path.name not in ignored}
    present = {name: path for name, path in found.items() if name in expected and path.is_file()}
    digests = sha256_files(present.values())
    missing = sorted(expected.keys() - present.keys())
    changed = [name for name in sorted(present) if digests[name] != expected[name]]
    added = sorted(found.keys() - expected.keys())
    return [
        *(f"{name} is missing" for name in missing),
        *(f"{name} has changed" for name in changed),
        *(f"{name} was not there" for name in added),
    ]
