"""From the tensors of a checkpoint to the parameters of a model, without reading more than is asked for.

A ``Tensor`` knows its shape and gives its values by rows: a quantizer reads a tensor in chunks, a loader whole.
What is stored otherwise than the model wants it (packed, split, stacked, in another number format) becomes a Tensor
that computes its rows from others.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM, Quantization
from mlxarch.blocks.linear import Matrix
from mlxarch.checkpoint import Checkpoint, Shard, TensorInfo
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.registry import Architecture, architecture

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SIDECARS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json"),
)


class Tensor(ABC):
    """A tensor that is read when its rows are asked for.

    Attributes:
        shape: what the model sees.
        dtype: of the rows.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def row_count(self) -> int:
        """Rows of the matrix (prod(shape[:-1]), shape[-1]) as which ``rows`` counts; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return prod(self.shape) * self.dtype.size

    @abstractmethod
    def rows(self, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop``: (stop - start, shape[-1]).

        Raises:
            CheckpointError: the file cannot be read, or is no longer the one that was checked.
        """

    def load(self) -> mx.array:
        """All of it, in its own shape."""
        return self.rows(0, self.row_count).reshape(self.shape)


class Stored(Tensor):
    """A tensor as a safetensors file holds it."""

    def __init__(self, shard: Shard, info: TensorInfo) -> None:
        self.shard, self.info, self.shape, self.dtype = shard, info, info.shape, _dtype(shard, info)

    def rows(self, start: int, stop: int) -> mx.array:
        width = self.shape[-1] if self.shape else 1
        raw = bytearray((stop - start) * width * self.dtype.size)
        self.shard.read_into(self.info, memoryview(raw), start * width * self.dtype.size)
        # by way of an integer type of the same width, for NumPy has no bfloat16
        words = mx.array(np.frombuffer(raw, f"u{self.dtype.size}"))
        return words.view(self.dtype).reshape(stop - start, width)

    def load(self) -> mx.array:
        """See Tensor. MLX reads it, when it is evaluated: in parallel, and straight into its own buffer."""
        array = _unread_array(self.shard, self.info.name)
        if array.shape != self.shape or array.dtype != self.dtype:
            self.shard.check_unchanged()
            raise CheckpointError(
                f"{self.shard.path}: tensor {self.info.name} is {self.dtype} {self.shape}, and MLX reads it as "
                f"{array.dtype} {array.shape}; save the checkpoint again"
            )
        return array


_unread: WeakKeyDictionary[Shard, dict[str, mx.array]] = WeakKeyDictionary()


def _unread_array(shard: Shard, name: str) -> mx.array:
    """An array that MLX has yet to read. It is handed out once, so that nothing here holds on to what was read."""
    if name not in _unread.get(shard, {}):
        shard.check_unchanged()  # MLX opens it anew, by its path
        try:
            _unread[shard] = cast(dict[str, mx.array], mx.load(str(shard.path), format="safetensors"))
        except (RuntimeError, ValueError) as error:
            shard.check_unchanged()
            raise CheckpointError(f"{shard.path}: MLX does not read it ({error}); download it again") from None
    if name not in _unread[shard]:
        shard.check_unchanged()
        raise CheckpointError(f"{shard.path}: MLX does not find tensor {name}; download the file again")
    return _unread[shard].pop(name)


def _dtype(shard: Shard, info: TensorInfo) -> mx.Dtype:
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"{shard.path}: tensor {info.name} has dtype {info.dtype}; mlxarch reads {', '.join(DTYPES)}. "
            "Save the checkpoint in bfloat16 or float32"
        )
    return DTYPES[info.dtype]


class Packed(Tensor):
    """A quantized matrix: its rows are dequantized, its parts are what is stored.

    The rows are float32 whatever the type of the scales: in float16, scale * code + bias would be off by an eighth of
    a step.

    Raises:
        CheckpointError: weight, scales and biases do not fit together. MLX would read beyond their ends.
    """

    def __init__(self, name: str, parts: Mapping[str, Tensor], settings: Quantization) -> None:
        self.parts, self.settings = dict(parts), settings
        weight, scales = parts["weight"], parts["scales"]
        elements = prod(weight.shape[-1:]) * 32
        self.shape = (*weight.shape[:-1], elements // settings.bits)
        self.dtype = mx.float32
        wanted = {"weight": (mx.uint32, weight.shape), "scales": (None, settings.scales_shape(self.shape))}
        if settings.mode == "affine":
            wanted["biases"] = (scales.dtype, settings.scales_shape(self.shape))
        wrong = [
            f"{part} is {parts[part].dtype} {parts[part].shape}" if part in parts else f"{part} is missing"
            for part, (dtype, shape) in wanted.items()
            if part not in parts or parts[part].shape != shape or parts[part].dtype != (dtype or parts[part].dtype)
        ]
        wrong += [f"{part} are not of this mode" for part in sorted(parts.keys() - wanted.keys())]
        scale_types = FLOATS if settings.mode == "affine" else (mx.uint8,)
        if scales.dtype not in scale_types:
            wrong.append(f"scales are {scales.dtype}")
        if elements % settings.bits or self.shape[-1] % settings.group_size or wrong:
            raise CheckpointError(
                f"tensor {name}: with {settings.bits} bits, groups of {settings.group_size}, mode {settings.mode}, a "
                f"weight of {weight.dtype} {weight.shape} and its scales and biases must fit together; found "
                f"{'; '.join(wrong) or f'rows of {self.shape[-1]} elements'}. Check `quantization` in config.json"
            )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, start: int, stop: int) -> mx.array:
        parts = {part: tensor.rows(start, stop) for part, tensor in self.parts.items()}
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(self.dtype), biases.astype(self.dtype)
        return self.settings.dequantize(parts["weight"], scales, biases, self.dtype)


@dataclass(frozen=True)
class Source:
    """A checkpoint as virtual tensors, by their published names.

    Attributes:
        config: config.json, parsed.
        tensors: name -> Tensor; a quantized triple is one Packed under the name of its weight.
        sidecars: tokenizer files and the like, to carry along: name -> contents or where they are.
        shards: the files behind the tensors, for fingerprints; empty where there are none.
        notes: what a person should know about it.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    sidecars: Mapping[str, bytes | Path] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was changed, replaced or removed since it was validated."""
        for shard in self.shards:
            shard.check_unchanged()


def open_source(folder: str | Path) -> Source:
    """Open a checkpoint folder. Headers and index are validated; no tensor is read.

    Raises:
        CheckpointError: a file breaks a rule of the format.
        ConfigError: config.json is malformed, or names a quantization method that is not understood.
    """
    checkpoint = Checkpoint.open(folder)
    stored = {name: Stored(shard, info) for name, (shard, info) in checkpoint.tensors.items()}
    sidecars = {name: path for name in SIDECARS if (path := checkpoint.folder / name).is_file()}
    return Source(checkpoint.config, pack(stored, checkpoint.config), sidecars, tuple(checkpoint.shards))


def pack(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Join each quantized weight with its scales and biases, by the settings in ``config``."""
    if not config.get("quantization"):
        _refuse_foreign(config)
    packed = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        if path not in packed or part not in ("weight", "scales", "biases"):
            tensors[name] = tensor
        elif part == "weight":
            parts = {p: stored[f"{path}.{p}"] for p in ("weight", "scales", "biases") if f"{path}.{p}" in stored}
            tensors[name] = Packed(name, parts, settings_of(config, path))
        elif f"{path}.weight" not in stored:
            raise CheckpointError(f"tensor {name} has no {path}.weight beside it; download the checkpoint again")
    return tensors


def settings_of(config: Mapping[str, Any], path: str) -> Quantization:
    """How the matrix at ``path`` is packed: its own entry in config.json's ``quantization``, else the common one.

    Raises:
        ConfigError: there is none, or it names bits, a group size or a mode that MLX does not have.
    """
    common = config.get("quantization") or config.get("quantization_config")
    own = common.get(path) if isinstance(common, dict) else None
    chosen = own if isinstance(own, dict) else common
    if not isinstance(chosen, dict):
        raise ConfigError(f"config.json: {path} is quantized, but `quantization` gives no bits and group_size for it")
    mode, allowed = chosen.get("mode", "affine"), "affine, mxfp4, mxfp8, nvfp4"
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(f"config.json: quantization mode {mode!r} of {path} is unknown; known: {allowed}")
    bits_allowed, groups_allowed = MODES[mode]
    bits, group = chosen.get("bits", bits_allowed[-1]), chosen.get("group_size", groups_allowed[0])
    if type(bits) is not int or bits not in bits_allowed or type(group) is not int or group not in groups_allowed:
        raise ConfigError(
            f"config.json: {path} has {bits!r} bits in groups of {group!r}; mode {mode} allows bits "
            f"{', '.join(map(str, bits_allowed))} in groups of {', '.join(map(str, groups_allowed))}"
        )
    return Quantization(bits, group, mode)


# bits and group sizes of MLX's quantization modes; the first group size is the default
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    foreign = config.get("quantization_config") or {}
    method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
    if method:
        raise ConfigError(
            f"config.json: the weights are packed by {method!r}, which mlxarch does not read; take the original "
            "checkpoint, or one that is quantized for MLX"
        )


@dataclass(frozen=True)
class Resolved:
    """A model's parameters, each with the tensor that fills it.

    Attributes:
        architecture: with ``tie_word_embeddings`` as the tensors have it.
        parameters: path of the weight -> Tensor; a Packed stands for its three arrays.
        ignored: names of tensors that the model has no use for, by rule.
    """

    architecture: Architecture
    model: CausalLM
    parameters: dict[str, Tensor]
    ignored: tuple[str, ...] = ()

    @property
    def matrices(self) -> frozenset[str]:
        """Paths of the parameters that can be quantized: weights of linear layers and embeddings."""
        return frozenset(f"{path}.weight" for path, m in self.model.named_modules() if isinstance(m, Matrix))


# What no architecture reads: tables that RoPE computes itself
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def resolve(source: Source) -> Resolved:
    """Find the architecture of a source and match its tensors with the model's parameters.

    Raises:
        CheckpointError: tensors are missing or unexpected (named), or one has another shape than the config says.
        ConfigError, UnsupportedArchitecture: see ``registry.architecture``.
    """
    found = architecture(source.config)
    ignored = tuple(name for name in source.tensors if IGNORED.search(name))
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in ignored}
    if found.config.tie_word_embeddings and "lm_head.weight" in tensors:
        # the file brings a head of its own, which then counts, whatever the config says
        found = replace(found, config=replace(found.config, tie_word_embeddings=False))
    model = found.build()
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    _check_names(shapes, tensors)
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {shapes[name]}; "
                "the two files belong to different models"
            )
        if not isinstance(tensor, Packed) and tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are allowed")
    resolved = Resolved(found, model, {name: tensors[name] for name in shapes}, ignored)
    packed = {name for name, tensor in tensors.items() if isinstance(tensor, Packed)}
    if not packed <= resolved.matrices:
        raise CheckpointError(f"tensor {min(packed - resolved.matrices)} is quantized, and no matrix")
    return resolved


def _check_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            "the checkpoint's tensors are not those of its config.json"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; unexpected: {_some(extra)}" if extra else "")
            + ". Download it again, or compare config.json with the original's"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
