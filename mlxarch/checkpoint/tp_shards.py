"""Checkpoints published as tensor-parallel slices without an index; file names give the ranks.

    pytorch_model-00003-TP-common.safetensors  tensors that every rank holds whole
    pytorch_model-00006-TP-000.safetensors …   slices: same tensor names in every rank's file

Source: xai-org/grok-2.
"""

import re
from collections.abc import Iterable, Mapping

from mlxarch.errors import CheckpointError
from mlxarch.system.untrusted_files import join_names, short_repr

_FILE = re.compile(r"pytorch_model-(?P<number>\d{5})-TP-(?P<rank>common|\d{3})\.safetensors")


def tp_slice_name(tensor: str, rank: int | None) -> str:
    """Return the unique name of a rank's slice: ``TENSOR.rank3``; a whole tensor keeps its name."""
    return tensor if rank is None else f"{tensor}.rank{rank}"


def tp_group(file: str) -> str:
    """Return a key that only files with the same number share: their slices are read together."""
    found = _FILE.fullmatch(file)
    return found["number"] if found else file


def find_tp_files(folder: object, names: Iterable[str]) -> dict[str, int | None]:
    """Find the files named as above: file name -> rank, None for a common file, in order.

    Raises:
        CheckpointError: a number, or one of its ranks, is missing, or it has both a common file and
            ranks.
    """
    numbers: dict[int, dict[int | None, str]] = {}
    for name in sorted(names):
        if found := _FILE.fullmatch(name):
            rank = None if found["rank"] == "common" else int(found["rank"])
            numbers.setdefault(int(found["number"]), {})[rank] = name
    rank_count = max(
        (rank + 1 for files in numbers.values() for rank in files if rank is not None), default=0
    )
    missing: list[str] = []
    for number in range(max(numbers, default=-1) + 1):
        files = numbers.get(number, {})
        if not files:
            missing.append(_file_name(number, "*"))
        elif None not in files:
            expected = [_file_name(number, f"{rank:03}") for rank in range(rank_count)]
            missing += [name for name in expected if name not in files.values()]
        elif len(files) > 1:
            raise CheckpointError(
                f"{folder}: {join_names(list(files.values()))} are there; a number has either a "
                "common file or one for each rank. Files of two versions are mixed: download all "
                "of "
                "them again."
            )
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weight files of {len(numbers)} numbers are missing: "
            f"{join_names(missing)}. Download the model again: what is there is kept, and only "
            "what "
            "is missing is fetched."
        )
    return {name: rank for number in sorted(numbers) for rank, name in numbers[number].items()}


def _file_name(number: int, rank: str) -> str:
    return f"pytorch_model-{number:05}-TP-{rank}.safetensors"


def check_tp_slices(
    folder: object, tensors: Mapping[str, Iterable[str]], ranks: Mapping[str, int | None]
) -> None:
    """Check that the files of each number hold slices of the same tensors.

    Args:
        folder: folder of the files, for the message.
        tensors: file -> names of its tensors.
        ranks: file -> rank, as ``find_tp_files`` returns it.

    Raises:
        CheckpointError: a file lacks a tensor that another rank's file has.
    """
    groups: dict[str, set[str]] = {}
    for file in ranks:
        groups.setdefault(tp_group(file), set()).update(tensors[file])
    for file in ranks:
        if lacking := groups[tp_group(file)] - set(tensors[file]):
            raise CheckpointError(
                f"{folder}/{file}: tensor {short_repr(min(lacking))} is not in this file, and "
                "another "
                f"rank's has a slice of it ({len(lacking)} such tensors). Files of two versions "
                "are "
                "mixed: download all of them again."
            )
