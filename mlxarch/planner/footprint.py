"""Memory footprint of a model: bytes of weights and KV cache by kind, from shapes and dtypes."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from mlxarch.kv_cache import CompressedSizes
from mlxarch.quantization.formats import KV_GROUP_SIZE
from mlxarch.quantization.kv_vectors import vector_bytes
from mlxarch.quantization.scheme import Quantization

WeightKind = Literal[
    "attention", "feed-forward", "experts", "embeddings", "head", "per-layer embeddings", "others"
]


@dataclass(frozen=True)
class Weight:
    """A parameter and the arrays that hold it.

    Attributes:
        path: path of the parameter in the model.
        kind: part of the model that it belongs to.
        layer: index of its layer; None outside of the layers.
        arrays: (elements, bytes of an element, whether they are floats) of each array; a quantized
            parameter has three: packed weights, scales and biases.
        float32: computed in float32 on every machine.
        token_share: part of an embedding table that one token reads.
    """

    path: str
    kind: WeightKind
    layer: int | None
    arrays: tuple[tuple[int, int, bool], ...]
    float32: bool = False
    token_share: float = 1.0

    @property
    def stored_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(count * itemsize for count, itemsize, _ in self.arrays)

    def memory_bytes(self, float_bytes: int) -> int:
        """Bytes in memory, where floats, scales included, have the compute dtype."""
        float_size = 4 if self.float32 else float_bytes
        return sum(
            count * (float_size if is_float else itemsize)
            for count, itemsize, is_float in self.arrays
        )


@dataclass(frozen=True)
class LayerCache:
    """KV cache or state of a layer.

    Attributes:
        kind: attention span of the layer.
        vectors: (heads, features) of each vector that is kept per token, usually key and value.
        window: number of newest tokens that are kept; None keeps all.
        state: floats of a recurrent state that are always in float32, and the others.
        compressed: sizes of a cache whose entries stand for several tokens; it is not quantized.
    """

    kind: Literal["full", "sliding", "chunked", "latent", "state", "compressed"]
    vectors: tuple[tuple[int, int], ...]
    window: int | None = None
    state: tuple[int, int] = (0, 0)
    compressed: CompressedSizes | None = None

    @property
    def can_go_back(self) -> bool:
        """Whether it can forget its newest tokens without a copy of an earlier state."""
        return self.window is None and not any(self.state) and self.compressed is None

    @property
    def grows(self) -> bool:
        """Whether it keeps every token."""
        return self.window is None and bool(self.vectors)

    def capacity(self, context: int) -> int:
        """Cache capacity in tokens for a planned context."""
        return context if self.window is None else min(context, self.window)

    def snapshot_bytes(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Bytes of a copy to which it can go back: of a state and a window, not of all tokens."""
        kept = replace(self, vectors=()) if self.grows else self
        return 0 if self.can_go_back else kept.nbytes(context, float_bytes, kv_bits)

    def nbytes(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Bytes of the cache for a planned context."""
        if self.compressed is not None:
            return self.compressed.elements(context) * float_bytes
        kv = Quantization(kv_bits, KV_GROUP_SIZE) if kv_bits else None
        token = sum(heads * vector_bytes(size, kv, float_bytes) for heads, size in self.vectors)
        exact, others = self.state
        return self.capacity(context) * token + 4 * exact + float_bytes * others


@dataclass(frozen=True)
class LayerExperts:
    """Experts of one layer.

    Attributes:
        count: number of experts.
        per_token: experts that the router chooses for each token.
        activation_size: floats that each token takes while its experts run.
    """

    count: int
    per_token: int
    activation_size: int = 0


class _WeightSums(NamedTuple):
    """Sums over all weights for one size of floats.

    Attributes:
        by_kind: bytes of the weights in memory, by kind.
        experts: bytes of all experts of each layer that has any.
        loading: bytes beyond those of all weights at the peak of loading.
    """

    by_kind: dict[str, int]
    experts: dict[int, int]
    loading: int


@dataclass(frozen=True)
class Footprint:
    """Everything that determines the memory of a model.

    Attributes:
        name: name of the model.
        bits: bits of most of its matrices; 16 if they are not quantized.
        weights: every parameter.
        caches: KV cache of each layer; None for a layer that shares the cache of another.
        experts: experts of each layer; None for a dense layer.
        tied: whether the embedding table is also the output head.
        max_context: context length that the model was trained for, in tokens.
        hidden_size: features of the residual stream.
        vocab_size: number of tokens in the vocabulary.
    """

    name: str
    bits: int
    weights: tuple[Weight, ...]
    caches: tuple[LayerCache | None, ...]
    experts: tuple[LayerExperts | None, ...]
    tied: bool
    max_context: int
    hidden_size: int
    vocab_size: int
    # by bytes of a float: a planner asks for the same sums for every context that it tries
    _sums: dict[int, _WeightSums] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights on the disk."""
        return sum(weight.stored_bytes for weight in self.weights)

    def _weight_sums(self, float_bytes: int) -> _WeightSums:
        """Sums over all weights, computed once."""
        if float_bytes not in self._sums:
            self._sums[float_bytes] = self._sum_weights(float_bytes)
        return self._sums[float_bytes]

    def _sum_weights(self, float_bytes: int) -> _WeightSums:
        by_kind: Counter[str] = Counter()
        experts: Counter[int] = Counter()
        # bytes of each group that is loaded together, and of those that are converted
        loaded: Counter[int | str] = Counter()
        converted: Counter[int | str] = Counter()
        for weight in self.weights:
            size = weight.memory_bytes(float_bytes)
            by_kind[weight.kind] += size
            if weight.kind == "experts" and weight.layer is not None:
                experts[weight.layer] += size
            group = weight.path if weight.layer is None else weight.layer
            loaded[group] += size
            converted[group] += sum(
                count * itemsize
                for count, itemsize, is_float in weight.arrays
                if is_float and itemsize != float_bytes
            )
        total = 0
        peak = 0
        for group, size in loaded.items():
            total += size
            peak = max(peak, total + converted[group])
        return _WeightSums(dict(by_kind), dict(experts), peak - total)

    def weight_bytes(self, float_bytes: int) -> dict[str, int]:
        """Bytes of the weights in memory, by kind."""
        return dict(self._weight_sums(float_bytes).by_kind)

    def row_bytes(self, float_bytes: int) -> int:
        """Bytes of the rows of per-layer embeddings that one token reads."""
        tables = (weight for weight in self.weights if weight.kind == "per-layer embeddings")
        return round(sum(table.token_share * table.memory_bytes(float_bytes) for table in tables))

    def loading_overhead(self, float_bytes: int) -> int:
        """Bytes beyond those of all weights at the peak of loading.

        Layers are loaded in the order of the files. Floats that are converted to the compute dtype
        are held twice until their layer is complete.
        """
        return self._weight_sums(float_bytes).loading

    def expert_bytes(self, float_bytes: int) -> list[int]:
        """Bytes of one expert of each layer, 0 for a dense layer."""
        total = self._weight_sums(float_bytes).experts
        return [
            total.get(layer, 0) // experts.count if experts else 0
            for layer, experts in enumerate(self.experts)
        ]

    def kv_bytes(
        self, context: int, float_bytes: int, kv_bits: int | None = None
    ) -> dict[str, int]:
        """Bytes of the KV cache, by kind of layer."""
        total: Counter[str] = Counter()
        for cache in self.caches:
            if cache:
                total[f"{cache.kind} layers"] += cache.nbytes(context, float_bytes, kv_bits)
        return dict(total)

    @property
    def has_states(self) -> bool:
        """Whether there are layers that go back to copies only: recurrent or compressed ones."""
        return any(
            cache is not None and (any(cache.state) or cache.compressed is not None)
            for cache in self.caches
        )

    def snapshot_bytes(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Bytes of the caches that keep a window or a state only.

        They cannot be rewound, so a session keeps this much for each position it can return to.
        """
        return sum(
            cache.snapshot_bytes(context, float_bytes, kv_bits) for cache in self.caches if cache
        )

    def growth_bytes(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Extra bytes of caches that grow on demand.

        They are over-allocated by an eighth, and the largest is held twice while it is copied.
        """
        sizes = [
            cache.nbytes(context, float_bytes, kv_bits)
            for cache in self.caches
            if cache and cache.grows
        ]
        return sum(sizes) // 8 + max(sizes, default=0)
