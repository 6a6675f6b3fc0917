"""Blueprint of a model: shapes and dtypes of its parameters, and the footprint at any bits.

A blueprint is made from a config.json alone, or from the headers of the weight files; no weights
are read. The network is built without weights too, and its activation memory is predicted by
listing the operations of a step (see ``activation_memory``).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM, Embedding, ExpertLinear
from mlxarch.blocks.layer import mixer_name, token_mixer
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.per_head_linear import PerHeadLinear
from mlxarch.checkpoint.lazy_tensor import DTYPES, FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.inspection.structure import ShapeOnlyTensor
from mlxarch.inspection.trace import trace
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import Resolved
from mlxarch.planner.activation_memory import (
    Peak,
    fill_caches,
    quantize_per_head_stand_ins,
    step_peak,
    use_stand_ins,
)
from mlxarch.planner.footprint import Footprint, Weight, WeightKind
from mlxarch.planner.layers import layer_cache, layer_experts
from mlxarch.quantization.formats import KV_GROUP_SIZE
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.embeddings import tables_of

LAYERS_PER_KIND = 2  # layers of each kind whose activations are simulated, as a sample of all
MAX_FUSED_HEAD_SIZE = 128  # largest head size of MLX's fused attention kernels for prefill
LOGITS_BYTES = 16  # for each entry of the vocabulary: logits, sorted, as probabilities, one spare


class Blueprint:
    """Shapes and dtypes of a model, from which its footprint at any bits is computed.

    Args:
        name: name for messages.
        network: the network without weights; every method leaves it as it was.
        tensors: parameters of the network by path.

    Attributes:
        max_context: context length that the model was trained for, in tokens.
        is_quantized: whether any of the weight matrices is stored quantized.
    """

    def __init__(self, name: str, network: CausalLM, tensors: Mapping[str, LazyTensor]) -> None:
        self.name = name
        self.tensors = tensors
        self._network = network
        modules = dict(network.named_modules())
        tables = tables_of(network)
        mixers = {name for name in map(mixer_name, network.layers) if name is not None}
        self._float32_parameters = frozenset(
            f"{path}.{leaf}"
            for path, module in modules.items()
            for leaf in getattr(module, "float32", ())
        )
        self._token_shares = {
            f"{path}.weight": module.lookups / module.weight.shape[0]
            for path, module in modules.items()
            if isinstance(module, Embedding)
        }
        self._quantizable_weights = frozenset(
            f"{path}.weight"
            for path, module in modules.items()
            if isinstance(module, Matrix) and module.quantizable
        )
        self._footprints: dict[tuple[int | None, int], Footprint] = {}
        self._activation_peaks: dict[tuple[Any, ...], Peak] = {}
        self._stand_ins: dict[tuple[bool | int, ...], _NetworkState] = {}
        self._kinds = {path: _weight_kind(path, modules, tables, mixers) for path in tensors}
        self._sampled_layers = _sample_layers(network)
        self._modules = list(network.modules())
        self._has_per_head_weights = any(
            isinstance(module, PerHeadLinear) for module in self._modules
        )
        with self._restored():  # a trace replaces the classes of modules
            self._footprint_without_weights = _footprint_without_weights(name, network)
        self.max_context = self._footprint_without_weights.max_context
        self.is_quantized = any(
            isinstance(tensor, QuantizedTensor) and path in self._quantizable_weights
            for path, tensor in tensors.items()
        )

    def activation_peak(
        self,
        context: int,
        chunk: int,
        float_bytes: int,
        fused: bool,
        kv: Quantization | None,
        quantized: bool = False,
        without_experts: bool = False,
    ) -> Peak:
        """Peak bytes beyond weights and KV cache during the last prefill chunk of a context.

        Args:
            context: tokens of the whole context.
            chunk: tokens of a prefill chunk.
            float_bytes: bytes of a float in computations.
            fused: whether attention runs in a fused kernel, which never stores the scores of all
                queries; a CPU has none.
            kv: quantization of the KV cache; None: not quantized.
            quantized: whether the weight matrices are quantized.
            without_experts: leave out the experts, as streamed experts never run at the same time
                as anything else.
        """
        quantized &= self._has_per_head_weights  # others change the weights alone
        key = (context, chunk, float_bytes, fused, kv, quantized, without_experts)
        if key not in self._activation_peaks:
            self._activation_peaks[key] = self._simulate_chunk(*key)
        return self._activation_peaks[key]

    def _simulate_chunk(
        self,
        context: int,
        chunk: int,
        float_bytes: int,
        fused: bool,
        kv: Quantization | None,
        quantized: bool,
        without_experts: bool,
    ) -> Peak:
        layers = self._sampled_layers
        tokens = min(chunk, context)
        with self._with_stand_ins(float_bytes, quantized, without_experts) as network:
            caches = network.make_caches(context, kv=kv)
            fill_caches(network, caches, context - tokens, layers)
            head_size = max(getattr(token_mixer(layer), "head_size", 0) for layer in network.layers)

            def is_skipped(shape: Sequence[int]) -> bool:
                """Whether an array holds the scores that a fused kernel never stores."""
                if not fused or head_size > MAX_FUSED_HEAD_SIZE:
                    return False
                return len(shape) > 3 and shape[-2] == tokens and shape[-1] >= tokens

            peak = step_peak(network, caches, tokens, layers, skip=is_skipped)
        logits = LOGITS_BYTES * self._footprint_without_weights.vocab_size
        return Peak(peak.allocated + logits, peak.touched + logits)

    @contextmanager
    def _with_stand_ins(
        self, float_bytes: int, quantized: bool, without_experts: bool
    ) -> Iterator[CausalLM]:
        """Give the network weights that take no memory, within the block.

        Args:
            quantized: quantize the matrices that each attention head has of its own.
            without_experts: leave the experts out.
        """
        key = (float_bytes, quantized, without_experts)
        network = self._network
        with self._restored():
            if key in self._stand_ins:
                self._stand_ins[key].apply()
            else:
                dtype = mx.float32 if float_bytes == 4 else mx.bfloat16
                use_stand_ins(network, dtype)
                if quantized:
                    quantize_per_head_stand_ins(network, Quantization(4, KV_GROUP_SIZE), dtype)
                if without_experts:
                    _leave_out_experts(network)
                self._stand_ins[key] = _NetworkState(network.modules())
            yield network

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Undo all changes to the modules of the network at the end of the block."""
        state = _NetworkState(self._modules)
        try:
            yield
        finally:
            state.apply()

    def footprint(self, bits: int | None = None, group_size: int = 64) -> Footprint:
        """Footprint of the model quantized to ``bits`` as ``mlxarch quantize`` does it.

        Tensors that are stored in a small float format with fewer bits stay as they are.

        Args:
            bits: bits of the weight matrices; 16: not quantized; None: as stored.
        """
        key = (bits, group_size)
        if key not in self._footprints:
            if bits is None:
                self._footprints[key] = self._footprint_as_stored()
            else:
                self._footprints[key] = self._footprint_quantized(bits, group_size)
        return self._footprints[key]

    def _footprint_as_stored(self) -> Footprint:
        bits = Counter(
            tensor.quantization.bits
            for tensor in self.tensors.values()
            if isinstance(tensor, QuantizedTensor)
        )
        most_common = bits.most_common(1)[0][0] if bits else 16
        arrays = {path: _stored_arrays(tensor) for path, tensor in self.tensors.items()}
        return self._footprint_of_arrays(most_common, arrays)

    def _footprint_quantized(self, bits: int, group_size: int) -> Footprint:
        from mlxarch.checkpoint.layout import plan_layout

        tensors = self.tensors
        quantization = None
        if bits < 16:
            quantization = Quantization(bits, group_size)
        else:
            tensors = {path: _dequantized(tensor) for path, tensor in tensors.items()}
        layout = plan_layout(
            tensors,
            self._quantizable_weights,
            quantization,
            None,
            keep_dtype=self._float32_parameters,
        )
        arrays = {
            path: [(tensor.shape, DTYPES[tensor.dtype]) for tensor in entry.tensors.values()]
            for path, entry in layout.entries.items()
        }
        default = layout.default_quantization
        return self._footprint_of_arrays(default.bits if default else 16, arrays)

    def _footprint_of_arrays(
        self, bits: int, arrays_by_path: Mapping[str, Sequence[tuple[tuple[int, ...], mx.Dtype]]]
    ) -> Footprint:
        weights = []
        for path, arrays in arrays_by_path.items():
            sizes = tuple(
                (prod(shape), dtype.size, dtype in FLOAT_DTYPES) for shape, dtype in arrays
            )
            kind, layer = self._kinds[path]
            exact = path in self._float32_parameters
            share = self._token_shares.get(path, 1.0)
            weights.append(Weight(path, kind, layer, sizes, exact, share))
        return replace(self._footprint_without_weights, weights=tuple(weights), bits=bits)


def blueprint_from_config(name: str, config: Mapping[str, Any]) -> Blueprint:
    """Return the blueprint of a config.json.

    Weights have 16 bits, except for experts that are published in MXFP4 according to the config.

    Raises:
        UnsupportedArchitecture, ConfigError: see ``registry.architecture``.
    """
    network = architecture(config).build()
    parameters = cast(dict[str, mx.array], dict(tree_flatten(network.parameters())))
    tensors: dict[str, LazyTensor] = {
        path: ShapeOnlyTensor(array.shape) for path, array in parameters.items()
    }
    section = config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == "mxfp4":
        for path, module in network.named_modules():
            if isinstance(module, ExpertLinear):
                weight = f"{path}.weight"
                tensors[weight] = _mxfp4_tensor(weight, parameters[weight].shape)
    return Blueprint(name, network, tensors)


def blueprint_from_checkpoint(name: str, checkpoint: Resolved) -> Blueprint:
    """Return the blueprint of the tensors that a folder or repository holds, exact to the byte."""
    return Blueprint(name, checkpoint.model, checkpoint.parameters)


def _mxfp4_tensor(path: str, shape: tuple[int, ...]) -> QuantizedTensor:
    quantization = Quantization(4, 32, "mxfp4")
    components: dict[str, LazyTensor] = {
        "weight": ShapeOnlyTensor(quantization.packed_shape(shape), mx.uint32),
        "scales": ShapeOnlyTensor(quantization.scales_shape(shape), mx.uint8),
    }
    return QuantizedTensor(path, components, quantization)


def _stored_arrays(tensor: LazyTensor) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Shapes and dtypes of the arrays that hold a tensor in memory."""
    arrays = tensor.components.values() if isinstance(tensor, QuantizedTensor) else [tensor]
    return [(array.shape, array.dtype) for array in arrays]


def _dequantized(tensor: LazyTensor) -> LazyTensor:
    return ShapeOnlyTensor(tensor.shape) if isinstance(tensor, QuantizedTensor) else tensor


def _weight_kind(
    path: str, modules: Mapping[str, nn.Module], tables: Collection[str], mixers: Collection[str]
) -> tuple[WeightKind, int | None]:
    """Kind of a parameter, and the index of its layer.

    Args:
        tables: paths of the embeddings that can be read from the disk.
        mixers: names of attention and of recurrent parts in a layer.
    """
    owner = path.rpartition(".")[0]
    module = modules.get(owner)
    names = path.split(".")
    layer = int(names[names.index("layers") + 1]) if "layers" in names else None
    if isinstance(module, ExpertLinear):
        return "experts", layer
    if isinstance(module, Embedding):
        return ("per-layer embeddings" if owner in tables else "embeddings"), layer
    if owner == "lm_head":
        return "head", layer
    if not isinstance(module, Matrix) or not module.quantizable:
        return "others", layer
    if layer is not None and names[names.index("layers") + 2] in mixers:
        return "attention", layer
    return ("feed-forward" if layer is not None else "others"), layer


def _sample_layers(network: CausalLM) -> list[int]:
    """Indices of a few layers of each kind."""
    seen: Counter[object] = Counter()
    sampled = []
    for index, layer in enumerate(cast(list[Any], network.layers)):
        parameters = cast(list[Any], tree_flatten(layer.parameters()))
        shapes = tuple(array.shape for _, array in parameters)
        kind = (getattr(token_mixer(layer), "span", None), shapes)
        seen[kind] += 1
        if seen[kind] <= LAYERS_PER_KIND:
            sampled.append(index)
    return sampled


def _footprint_without_weights(name: str, network: CausalLM) -> Footprint:
    layers = cast(list[Any], network.layers)
    mixers = list(map(token_mixer, layers))
    experts = tuple(map(layer_experts, layers))
    caches = trace(network, 1).caches
    return Footprint(
        name=name,
        bits=16,
        weights=(),
        caches=tuple(map(layer_cache, mixers, caches)),
        experts=experts,
        tied="lm_head" not in network,
        max_context=network.context_length,
        hidden_size=network.model.embed_tokens.weight.shape[1],
        vocab_size=network.vocab_size,
    )


# Temporary changes of the network ----------------------------------------------------------------


class _NetworkState:
    """Snapshot of the classes, arrays and attributes of modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(m, type(m), dict(m), dict(vars(m))) for m in modules]

    def apply(self) -> None:
        """Restore all modules."""
        for module, module_class, items, attributes in self._modules:
            module.__class__ = module_class
            module.clear()
            dict.update(module, items)  # nn.Module.update would only replace parameters
            vars(module).clear()
            vars(module).update(attributes)


class _NoExperts(nn.Module):
    """Replacement for experts whose outputs (B, L, k, dim) take no memory."""

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        return mx.broadcast_to(x[..., None, :], (*chosen.shape, x.shape[-1]))


def _leave_out_experts(network: CausalLM) -> None:
    """Replace the experts of every layer by ``_NoExperts``."""
    modules = dict(network.named_modules())
    for path, module in modules.items():
        if isinstance(getattr(module, "down_proj", None), ExpertLinear):
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, _NoExperts())
