"""Matching of a checkpoint with an architecture: a tensor for every parameter of the network."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.weight_mapping import (
    Ignore,
    Rule,
)
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import CheckpointError
from mlxarch.loading.registry import Architecture, architecture
from mlxarch.loading.weight_rules import apply_rule


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
    def parameters(self) -> dict[str, LazyTensor]:
        """Tensors that the network computes with, by path."""
        return {path: tensor for path, tensor in self.tensors.items() if path not in self.carried}

    @property
    def matrices(self) -> frozenset[str]:
        """Paths of weights that may be quantized: linear layers, experts and embeddings."""
        modules = self.model.named_modules()
        own = {f"{path}.weight" for path, m in modules if isinstance(m, Matrix) and m.quantizable}
        return frozenset(
            own | {path for path in self.carried if len(self.tensors[path].shape) == 2}
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
        """``matrices`` by their published names."""
        return frozenset(map(self.architecture.published_name, self.matrices))

    @property
    def published_exact(self) -> frozenset[str]:
        """``exact`` by their published names."""
        return frozenset(map(self.architecture.published_name, self.exact))


# Cached tables that RoPE computes itself
COMMON_RULES: tuple[Rule, ...] = (Ignore(r"\.rotary_emb\.inv_freq$", "RoPE frequencies"),)


def resolve(source: CheckpointSource) -> Resolved:
    """Find the architecture of a checkpoint, build its network and match tensors with parameters.

    Raises:
        CheckpointError: tensors are missing or unexpected (named), or one has another shape than
            the config says.
        ConfigError, UnsupportedArchitecture: see ``registry.architecture``.
    """
    found = architecture(source.config)
    tensors, ignored, carried = dict(source.tensors), {}, set()
    for rule in (*COMMON_RULES, *found.rules):
        tensors = apply_rule(rule, tensors, found.config, ignored, carried)
    if found.config.tie_word_embeddings and "lm_head.weight" in tensors:
        # A head in the file counts, whatever the config says
        found = replace(found, config=replace(found.config, tie_word_embeddings=False))
    model = found.build()
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    # The order of the source: reading in this order reads each file once
    resolved = Resolved(source, found, model, tensors, ignored, frozenset(carried))
    _check_names(shapes, resolved.parameters)
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {shapes[name]}; "
                "the two files belong to different models"
            )
        if not isinstance(tensor, QuantizedTensor) and tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are allowed"
            )
    packed = {
        name for name, tensor in resolved.parameters.items() if isinstance(tensor, QuantizedTensor)
    }
    matrices = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Matrix)
    }
    if not packed <= matrices:
        raise CheckpointError(f"tensor {min(packed - matrices)} is quantized, and no matrix")
    return resolved


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
