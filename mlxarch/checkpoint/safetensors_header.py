"""Reading and validation of a safetensors header, before any of the data is read.

A file is an unsigned 64-bit little-endian size, a JSON object of that size, and data:

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
     "__metadata__": {"text": "text"}}

The tensors cover the data from its first byte to its last without holes or overlap. Array libraries
check less than that. A header that passes here is also accepted by the format's own library
(https://github.com/huggingface/safetensors).
"""

from dataclasses import dataclass
from typing import Any

from mlxarch.errors import CheckpointError
from mlxarch.system.untrusted_files import REMEDY, parse_json, read_exactly, short_repr

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31 - 1
MAX_ELEMENTS = 2**63 - 1

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
}
"""Bytes per element of each supported dtype."""

_CONVERT = {
    "F64": "float64 has no place on a GPU: convert the tensor to F32",
    "C64": "no language model has complex weights: store real and imaginary part as F32",
    "F8_E5M2": "convert the tensor to BF16 or F8_E4M3",
    "F4": "store 4-bit values packed into U8 or U32",
}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype, shape and position of a tensor in its file.

    ``start`` is an absolute offset in bytes, ``dtype`` a key of ``DTYPE_BYTES``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(fd: int, size: int, path: object) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read tensors and metadata of an open file of ``size`` bytes, in the order of the data.

    Raises:
        CheckpointError: a rule of the format or a limit of this module is broken; the message names
            file, tensor, rule and remedy.
    """
    text, data_start = _read_text(fd, size, str(path))
    # 14 values per tensor: the object, its three fields, eight dimensions and two offsets. In this
    # format -0 is a floating-point number; checking every integer for it takes a third of the time.
    integer = _integer if b"-0" in text else int
    header = parse_json(text, str(path), depth=8, values=14 * MAX_TENSORS, integer=integer)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where it is given none
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise _refusal(path, f"__metadata__ is {short_repr(metadata)}, and must map text to text")
    if len(header) > MAX_TENSORS:
        raise _refusal(
            path, f"the header lists {len(header)} tensors, and at most {MAX_TENSORS} are read"
        )
    tensors = [_tensor(name, fields, data_start, size, path) for name, fields in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_cover(tensors, data_start, size, path)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _refusal(path: object, problem: str, remedy: str = REMEDY) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}. {remedy}")


def _integer(literal: str) -> int | float:
    return -0.0 if literal == "-0" else int(literal)


def _read_text(fd: int, size: int, path: str) -> tuple[bytearray, int]:
    if size < 8:
        raise _refusal(
            path,
            f"the file has {size} bytes, and a safetensors file starts with 8 that size its header",
        )
    prefix = bytearray(8)
    read_exactly(fd, prefix, 0, path)
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise _refusal(
            path, f"the header claims {length} bytes, and the file has {size - 8} left for it"
        )
    if length > MAX_HEADER_BYTES:
        raise _refusal(
            path, f"the header has {length} bytes, and at most {MAX_HEADER_BYTES} are read"
        )
    if size > 1_000_000 and length > size // 4:
        raise _refusal(
            path, f"the header has {length} of the file's {size} bytes, and a quarter is the most"
        )
    text = bytearray(length)
    read_exactly(fd, text, 8, path)
    if text[:1] != b"{":
        raise _refusal(
            path, f"the header starts with {short_repr(bytes(text[:1]))}, and must start with {{"
        )
    return text, 8 + length


def _tensor(name: str, fields: Any, data_start: int, size: int, path: object) -> TensorInfo:
    def refusal(problem: str, remedy: str = REMEDY) -> CheckpointError:
        return _refusal(path, f"tensor {short_repr(name)}: {problem}", remedy)

    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise refusal(
            f"its entry is {short_repr(fields)}, and must be an object with dtype, shape and "
            "data_offsets alone"
        )
    dtype = fields["dtype"]
    shape = fields["shape"]
    offsets = fields["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        convert = _CONVERT.get(dtype) if type(dtype) is str else None
        known = f"known: {', '.join(DTYPE_BYTES)}"
        raise refusal(
            f"dtype {short_repr(dtype)} is not supported; {known}",
            f"To use it, {convert}." if convert else REMEDY,
        )
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise refusal(
            f"shape {short_repr(shape)} must be a list of at most {MAX_DIMENSIONS} dimensions"
        )
    elements = 1
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= MAX_DIMENSION:
            raise refusal(
                f"shape {short_repr(shape)} holds something else than integers from 0 to "
                f"{MAX_DIMENSION}"
            )
        elements *= dimension
        if elements > MAX_ELEMENTS:
            raise refusal(f"shape {short_repr(shape)} has more than {MAX_ELEMENTS} elements")
    if (
        type(offsets) is not list
        or len(offsets) != 2
        or type(offsets[0]) is not int
        or type(offsets[1]) is not int
    ):
        raise refusal(f"data_offsets {short_repr(offsets)} must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise refusal(
            f"data_offsets {short_repr(offsets)} must be two integers that do not decrease, from 0 "
            "on"
        )
    if end > size - data_start:
        raise refusal(
            f"data_offsets {short_repr(offsets)} exceed the {size - data_start} bytes of data in "
            "the file"
        )
    if end - begin != elements * DTYPE_BYTES[dtype]:
        raise refusal(
            f"data_offsets {short_repr(offsets)} span {end - begin} bytes, and {dtype} of shape "
            f"{short_repr(shape)} "
            f"needs {elements * DTYPE_BYTES[dtype]}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_cover(tensors: list[TensorInfo], data_start: int, size: int, path: object) -> None:
    covered = data_start
    for tensor in tensors:
        if tensor.start != covered:
            what = (
                "overlap the tensor before it"
                if tensor.start < covered
                else "leave a hole before it"
            )
            raise _refusal(
                path,
                f"tensor {short_repr(tensor.name)}: its bytes {what}; they start at "
                f"{tensor.start}, not at {covered}",
            )
        covered += tensor.nbytes
    if covered != size:
        raise _refusal(
            path,
            f"{size - covered} bytes follow the last tensor, and every byte must belong to one",
        )
