"""A model to evaluate: its weights (opened only while needed), tokenizer, size and content hash."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.shards import Shard
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.hub.hub_cache import model_title
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.system.checksums import sha256_files
from mlxarch.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        bytes: total size of the weight files.
        parameters: number of weights.
        bits_per_weight: 8 * bytes / parameters.
        quantized_bits_per_weight: bits per weight of the quantized matrices alone, their scales and
            biases included; None if nothing is quantized.
    """

    bytes: int
    parameters: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None


@dataclass(frozen=True)
class EvalModel:
    """A model that can be evaluated.

    Attributes:
        name: shown in reports.
        size: size of its weight files, and number of parameters.
        vocab_size: number of logits per token; ``tokenizer`` may know fewer tokens.
        context_length: largest number of tokens that the model can read.
        tokenizer: tokenizer of the model.
        open_weights: returns a context manager that opens the checkpoint and closes it again.
        content_hash: computes a hash that changes with any byte of the weights or of the config.
    """

    name: str
    size: ModelSize
    vocab_size: int
    context_length: int
    tokenizer: Tokenizer
    open_weights: Callable[[], AbstractContextManager[Resolved]]
    content_hash: Callable[[], str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "EvalModel":
        """Describe the model in a checkpoint folder, one that ``load_model`` accepts.

        Raises:
            CheckpointError, ConfigError, TokenizerError: the folder is not a sound checkpoint.
        """
        folder = Path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        source = open_checkpoint(folder)
        resolved = resolve(source)
        for shard in source.shards:
            shard.close()
        return cls(
            name=model_title(folder),
            size=measure_size(resolved.parameters.values(), source.shards),
            vocab_size=resolved.model.vocab_size,
            context_length=resolved.model.context_length,
            tokenizer=tokenizer,
            open_weights=partial(_open_folder, folder),
            content_hash=lambda: content_hash(source.shards, source.config),
        )


@contextmanager
def _open_folder(folder: Path) -> Iterator[Resolved]:
    source = open_checkpoint(folder)
    try:
        yield resolve(source)
        source.check_unchanged()
    finally:
        for shard in source.shards:
            shard.close()


def measure_size(tensors: Iterable[LazyTensor], shards: Iterable[Shard]) -> ModelSize:
    """Compute the size of a model from its parameters and its weight files."""
    tensors = list(tensors)
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    file_bytes = sum(shard.size for shard in shards)
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    quantized_bits = None
    if quantized:
        quantized_parameters = sum(prod(tensor.shape) for tensor in quantized)
        quantized_bits = 8 * sum(tensor.nbytes for tensor in quantized) / quantized_parameters
    return ModelSize(file_bytes, parameters, 8 * file_bytes / parameters, quantized_bits)


def content_hash(shards: Iterable[Shard], config: dict[str, Any]) -> str:
    """Hash the bytes of weight files together with a config: SHA-256 in hexadecimal."""
    facts = sha256_files(shard.path for shard in shards) | {
        "config": json.dumps(config, sort_keys=True)
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
