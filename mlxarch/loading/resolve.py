"""Matching of a checkpoint with an architecture: a tensor for every parameter of the network."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.weight_mapping import Ignore
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import CheckpointError
from mlxarch.loading.registry import Architecture, architecture
from mlxarch.loading.weight_rules import apply_rule

HEAD = "lm_head.weight"
ZERO_BIASES = "biases of zeros"
INTEGER_DTYPES = frozenset({mx.int32, mx.int64})
MAX_BIAS = 1 << 24  # elements that are read to see whether all are zeros


@dataclass(frozen=True)
class Resolved:
    """A network without weights, and the tensor of a checkpoint for each of its parameters.

    Attributes:
        source: the open checkpoint.
        architecture: its config has ``tie_word_embeddings`` as the tensors say.
        model: the network, its arrays unevaluated.
        tensors: path of the parameter -> lazy tensor, in the order of the source; a quantized
            matrix is one ``QuantizedTensor`` for its three arrays.
        ignored: names of tensors that the network does not use, each with its purpose.
        carried: names among ``ignored`` that a conversion copies all the same; they are in
            ``tensors``.
    """

    source: CheckpointSource
    architecture: Architecture
    model: CausalLM
    tensors: dict[str, LazyTensor]
    ignored: Mapping[str, str] = field(default_factory=dict)
    carried: Collection[str] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user: what the checkpoint has that the network does not use."""
        ignored = {n: what for n, what in self.ignored.items() if n not in self.carried}
        counts = Counter(ignored.values())
        first = {what: name for name, what in reversed(ignored.items())}
        return tuple(
            f"left out: {what}, {count} tensors such as {first[what]}"
            for what, count in counts.items()
        )

    def require_read(self) -> None:
        """Check that no tensor was left out for values that only a download would show.

        Raises:
            CheckpointError: one was.
        """
        biases = [name for name, what in self.ignored.items() if what == ZERO_BIASES]
        if biases and not all(tensor.local for tensor in self.source.tensors.values()):
            raise CheckpointError(
                f"tensor {biases[0]} is a bias that config.json does not provide for, and may be "
                "left out only if it is all zeros; download the repository first, so that it is read"
            )

    @property
    def parameters(self) -> dict[str, LazyTensor]:
        """Tensors that the network computes with, by path."""
        return {path: tensor for path, tensor in self.tensors.items() if path not in self.carried}

    @property
    def matrices(self) -> frozenset[str]:
        """Paths of the ``parameters`` that may be quantized: linear layers, experts, embeddings."""
        modules = self.model.named_modules()
        return frozenset(
            f"{path}.weight" for path, m in modules if isinstance(m, Matrix) and m.quantizable
        )

    @property
    def exact(self) -> frozenset[str]:
        """Paths of parameters that stay in float32; their modules list them in ``float32``."""
        modules = self.model.named_modules()
        return frozenset(
            f"{path}.{name}" for path, m in modules for name in getattr(m, "float32", ())
        )

    @property
    def published(self) -> dict[str, LazyTensor]:
        """``tensors`` by their published names, in the order of the source."""
        return {
            self.architecture.published_name(path): tensor for path, tensor in self.tensors.items()
        }

    @property
    def published_matrices(self) -> frozenset[str]:
        """Published names of all matrices that a conversion may quantize, carried ones included."""
        carried = {path for path in self.carried if len(self.tensors[path].shape) == 2}
        return frozenset(map(self.architecture.published_name, self.matrices | carried))

    @property
    def published_exact(self) -> frozenset[str]:
        """``exact`` by their published names."""
        return frozenset(map(self.architecture.published_name, self.exact))


# Tensors that other programs store beside a model, by what they are; none changes its numbers.
# They count only where the network has no parameter of the name
USELESS: tuple[Ignore, ...] = (
    Ignore(r"(^|\.)rotary(_pos)?_emb\.", "RoPE tables, which are computed"),
    Ignore(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask)$", "tables, which are computed"),
    Ignore(
        r"\.([qkv]|kv|kv_cache|prob)_(scale|zero_point)$|\.output_scale$",
        "scales of a quantized KV cache",
    ),
    Ignore(
        r"^(model\.)?(score|classifier|qa_outputs|v_head|value_head|reward_head)\.",
        "head of another task",
    ),
)


def resolve(source: CheckpointSource) -> Resolved:
    """Find the architecture of a checkpoint, build its network and match tensors with parameters.

    Raises:
        CheckpointError: tensors are missing or unexpected (named), or one has another shape than
            the config says.
        ConfigError, UnsupportedArchitecture: see ``registry.architecture``.
    """
    found = architecture(source.config)
    tensors, ignored, carried = dict(source.tensors), {}, set()
    for rule in found.rules:
        tensors = apply_rule(rule, tensors, found.config, ignored, carried)
    if found.config.tie_word_embeddings and HEAD in tensors:
        table = found.build().embedding_path
        if table in tensors:
            # A head in the file counts, whatever the config says
            found = replace(found, config=replace(found.config, tie_word_embeddings=False))
        else:
            tensors = {table if name == HEAD else name: t for name, t in tensors.items()}
    model = found.build()
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    useless = _find_useless(tensors.keys() - shapes.keys() - carried, tensors)
    ignored |= useless
    tensors = {name: tensor for name, tensor in tensors.items() if name not in useless}
    # The order of the source: reading in this order reads each file once
    resolved = Resolved(source, found, model, tensors, ignored, frozenset(carried))
    _check_names(shapes, resolved.parameters)
    _check_tensors(resolved, shapes)
    return resolved


def _find_useless(names: Iterable[str], tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Find tensors that cannot change the model's numbers: name -> what it is.

    Args:
        names: names of tensors that are no parameters of the network.
        tensors: all tensors.
    """
    found = {}
    for name in names:
        what = next((rule.what for rule in USELESS if re.search(rule.pattern, name)), None)
        if what is None and name.endswith(".bias") and _is_zero(tensors[name]):
            what = ZERO_BIASES
        if what is not None:
            found[name] = what
    return found


def _is_zero(bias: LazyTensor) -> bool:
    """Whether a bias is all zeros; one that is still to be downloaded is taken for such."""
    if prod(bias.shape) > MAX_BIAS:
        return False
    return not bias.local or not mx.any(bias.read_rows(0, bias.row_count)).item()


def _check_tensors(resolved: Resolved, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check shapes and dtypes.

    Raises:
        CheckpointError: a tensor does not fit its parameter.
    """
    integers = {
        f"{path}.{leaf}"
        for path, module in resolved.model.named_modules()
        for leaf in getattr(module, "integers", ())
    }
    for name, tensor in resolved.tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {shapes[name]}; "
                "the two files belong to different models"
            )
        if name in integers:
            if tensor.dtype not in INTEGER_DTYPES:
                raise CheckpointError(f"tensor {name} is {tensor.dtype}; it must hold integers")
        elif not isinstance(tensor, QuantizedTensor) and tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are allowed"
            )
    packed = {
        name for name, tensor in resolved.parameters.items() if isinstance(tensor, QuantizedTensor)
    }
    modules = resolved.model.named_modules()
    matrices = {f"{path}.weight" for path, module in modules if isinstance(module, Matrix)}
    if not packed <= matrices:
        raise CheckpointError(f"tensor {min(packed - matrices)} is quantized, and no matrix")


def _check_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            "the checkpoint's tensors are not those of its config.json"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; unexpected: {_some(extra)}" if extra else "")
            + ". Download it again, or compare config.json with the original's"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
