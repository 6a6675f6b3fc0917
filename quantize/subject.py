"""A model that is judged: where its weights come from, how large it is, and what identifies it."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from mlxarch import receipts
from mlxarch.checkpoint import Shard
from mlxarch.tensors import Packed, Tensor
from mlxarch.tokenizer import Tokenizer
from mlxarch.weights import Resolved, open_source, resolve


@dataclass(frozen=True)
class Size:
    """Bytes of the weight files, parameters, and bits for each: of all there is, and of the quantized matrices."""

    bytes: int
    parameters: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        vocabulary: tokens that it has logits for; ``tokenizer`` may know fewer.
        opened: its weights, as long as they are needed.
        identity: changes with any byte of its weights or of its config.
    """

    name: str
    size: Size
    vocabulary: int
    tokenizer: Tokenizer
    opened: Callable[[], AbstractContextManager[Resolved]]
    identity: Callable[[], str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Subject":
        """A folder that ``load_model`` takes.

        Raises:
            CheckpointError, ConfigError, TokenizerError: it is not sound.
        """
        folder = Path(folder)
        tokenizer, source = Tokenizer.from_folder(folder), open_source(folder)
        resolved = resolve(source)
        for shard in source.shards:
            shard.close()
        return cls(
            folder.resolve().name,
            size_of(resolved.parameters.values(), source.shards),
            resolved.model.vocab_size,
            tokenizer,
            partial(_opened, folder),
            lambda: identity(source.shards, source.config),
        )


@contextmanager
def _opened(folder: Path) -> Iterator[Resolved]:
    source = open_source(folder)
    try:
        yield resolve(source)
        source.check_unchanged()
    finally:
        for shard in source.shards:
            shard.close()


def size_of(tensors: Iterable[Tensor], shards: Iterable[Shard]) -> Size:
    """Of the tensors that fill a model, and of the files that hold them."""
    tensors = list(tensors)
    packed = [tensor for tensor in tensors if isinstance(tensor, Packed)]
    total, parameters = sum(shard.size for shard in shards), sum(prod(tensor.shape) for tensor in tensors)
    inside = sum(prod(tensor.shape) for tensor in packed)
    return Size(
        total,
        parameters,
        8 * total / parameters,
        8 * sum(tensor.nbytes for tensor in packed) / inside if packed else None,
    )


def identity(shards: Iterable[Shard], config: dict[str, Any]) -> str:
    """Of the bytes of weight files, and a config."""
    facts = receipts.sha256(shard.path for shard in shards) | {"config": json.dumps(config, sort_keys=True)}
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
