"""Weights cut into slices for tensor parallelism and published so, without an index; the files' names say it all.

    pytorch_model-00003-TP-common.safetensors    tensors that every rank holds whole
    pytorch_model-00006-TP-000.safetensors …     slices: the tensors have the same names in every rank's file

Source: xai-org/grok-2.
"""

import re
from collections.abc import Iterable, Mapping

from mlxarch.errors import CheckpointError
from mlxarch.untrusted import listed, shown

_FILE = re.compile(r"pytorch_model-(?P<number>\d{5})-TP-(?P<rank>common|\d{3})\.safetensors")


def slice_name(tensor: str, rank: int | None) -> str:
    """What a rank's slice of a tensor is called here: ``TENSOR.rank3``; a whole tensor keeps its name."""
    return tensor if rank is None else f"{tensor}.rank{rank}"


def group_of(file: str) -> str:
    """What the files of one number have in common, and no others: they are read together."""
    found = _FILE.fullmatch(file)
    return found["number"] if found else file


def sliced_files(folder: object, names: Iterable[str]) -> dict[str, int | None]:
    """Of the files' names those of this layout, in order, each with its rank (None: common); {} where there are none.

    Raises:
        CheckpointError: a number, or one of its ranks, is missing, or it has both a common file and ranks.
    """
    numbers: dict[int, dict[int | None, str]] = {}
    for name in sorted(names):
        if found := _FILE.fullmatch(name):
            rank = None if found["rank"] == "common" else int(found["rank"])
            numbers.setdefault(int(found["number"]), {})[rank] = name
    ranks = max((rank + 1 for files in numbers.values() for rank in files if rank is not None), default=0)
    missing: list[str] = []
    for number in range(max(numbers, default=-1) + 1):
        files = numbers.get(number, {})
        if None not in files:
            wanted = [_name(number, rank) for rank in range(ranks)] if files else [_name(number, "*")]
            missing += [name for name in wanted if name not in files.values()]
        elif len(files) > 1:
            raise CheckpointError(
                f"{folder}: {listed(list(files.values()))} are there; a number has either a common file or one for "
                "each rank. Files of two versions are mixed: download all of them again."
            )
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weight files of {len(numbers)} numbers are missing: {listed(missing)}. "
            "Download the model again: what is there is kept, and only what is missing is fetched."
        )
    return {name: rank for number in sorted(numbers) for rank, name in numbers[number].items()}


def _name(number: int, rank: int | str) -> str:
    return f"pytorch_model-{number:05}-TP-{rank if isinstance(rank, str) else f'{rank:03}'}.safetensors"


def check_slices(folder: object, tensors: Mapping[str, Iterable[str]], ranks: Mapping[str, int | None]) -> None:
    """Whether the files of each number hold slices of the same tensors.

    Args:
        folder: for the message.
        tensors: file -> names of its tensors.
        ranks: what ``sliced_files`` found.

    Raises:
        CheckpointError: a file lacks one that its fellows have.
    """
    groups: dict[str, set[str]] = {}
    for file in ranks:
        groups.setdefault(group_of(file), set()).update(tensors[file])
    for file in ranks:
        if lacking := groups[group_of(file)] - set(tensors[file]):
            raise CheckpointError(
                f"{folder}/{file}: tensor {shown(min(lacking))} is not in this file, and another rank's has a slice of "
                f"it ({len(lacking)} such tensors). Files of two versions are mixed: download all of them again."
            )
