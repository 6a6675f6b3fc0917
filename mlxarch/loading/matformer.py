"""MatFormer slicing: a sub-model with narrower feed-forwards and fewer layers, taken from the same weights.

MatFormer (arXiv:2310.07707) trains nested feed-forwards, whose first features work without the
others. A slice takes the first rows of ``gate_proj`` and ``up_proj`` and the first columns of
``down_proj``. A layer that is left out takes its columns of the per-layer embeddings along, and
later layers are renumbered. Quantized weights are cut between groups, so that slicing and
quantizing give the same result in either order.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.checkpoint.tensor_views import SelectedColumns, SelectedRows
from mlxarch.errors import InvalidInput
from mlxarch.loading.resolve import resolve

_LAYER = re.compile(r"^(?P<before>(?:(?:model|language_model)\.)+layers\.)(?P<index>\d+)(?=\.)")
_FULL_LAYERS = 35  # of Gemma 3n E4B, from which the published slices are taken


@dataclass(frozen=True)
class Slice:
    """Part of a MatFormer model to keep.

    Attributes:
        ffn: feed-forward widths: one for all remaining layers, or one for each; empty keeps all
            features.
        skip: numbers of the layers to leave out, as in the full model.
    """

    ffn: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()


def names() -> tuple[str, ...]:
    """Names of the published slices, smallest first."""
    return tuple(_table())


def slice_source(source: CheckpointSource, wanted: str | Slice) -> CheckpointSource:
    """Slice a checkpoint. Tensors stay lazy: nothing is read yet.

    Args:
        source: checkpoint of a Gemma 3n, quantized or not.
        wanted: the slice, or the name of a published slice of Gemma 3n E4B, e.g. "e2b".

    Raises:
        CheckpointError, ConfigError: the source is not a sound checkpoint.
        InvalidInput: another architecture, an unknown slice, widths or layers that do not exist, a
            cut through a group of a quantized matrix, or a skipped layer whose keys and values
            other layers read.
    """
    found = resolve(source).architecture  # its errors come before any about the slice
    c: Any = found.config
    if not getattr(c, "sliceable", False):
        raise InvalidInput(f"only Gemma 3n is made to be sliced, and this is a {found.name}")
    cut = _published(wanted, c) if isinstance(wanted, str) else wanted
    kept = _kept(c, cut.skip)
    widths = _widths(c, cut.ffn, kept)
    places = {index: place for place, index in enumerate(kept)}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        layer = _LAYER.match(name)
        if layer is None:
            tensors[name] = _select_layers(name, tensor, kept, c.num_hidden_layers)
        elif (place := places.get(int(layer["index"]))) is not None:
            tensors[_renumber(name, place)] = _narrow(name, tensor, widths[place])
    note = (
        f"a slice of {len(kept)} of {c.num_hidden_layers} layers"
        + (f", without {format_ranges(cut.skip)}" if cut.skip else "")
        + f"; features of the feed-forwards: {_format_widths(widths)}"
    )
    return replace(
        source,
        config=_config(source.config, c, kept, widths),
        tensors=tensors,
        notes=(*source.notes, note),
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer numbers and ranges: "3,20-24" is (3, 20, 21, 22, 23, 24).

    Raises:
        InvalidInput: the text has another form.
    """
    layers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        found = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not found:
            raise InvalidInput(
                f"layers are written as numbers and ranges, such as 3,20-24; found {text!r}"
            )
        layers |= set(found)
    return tuple(sorted(layers))


def format_ranges(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: 3, 20, 21, 22 is "3,20-22"."""
    return ",".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in _runs(numbers))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges (start, stop) of consecutive numbers."""
    groups = [list(g) for _, g in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [(group[0][1], group[-1][1] + 1) for group in groups]


@cache
def _table() -> dict[str, dict[str, Any]]:
    table = tomllib.loads(Path(__file__).with_name("slices.toml").read_text(encoding="utf-8"))
    return dict(sorted(table.items(), key=lambda pair: pair[1]["billions"]))


def _published(name: str, c: Any) -> Slice:
    entry = _table().get(name.lower())
    if entry is None:
        raise InvalidInput(f"no published slice is called {name!r}; there are {', '.join(names())}")
    sizes = set(_hidden_sizes(c))
    if c.num_hidden_layers != _FULL_LAYERS or len(sizes) != 1:
        raise InvalidInput(
            f"{name} is a slice of Gemma 3n E4B, whose {_FULL_LAYERS} layers are equally wide; this model has "
            f"{c.num_hidden_layers} layers, with feed-forwards of {', '.join(map(str, sorted(sizes)))} features. Slice "
            "E4B, or name widths and layers yourself"
        )
    skip = parse_layers(entry["skip"])
    wide = parse_layers(entry["wide"])
    [whole] = sizes
    return Slice(
        tuple(whole if i in wide else whole // 2 for i in range(_FULL_LAYERS) if i not in skip),
        skip,
    )


def _hidden_sizes(c: Any) -> Sequence[int]:
    sizes = c.intermediate_size
    return [sizes] * c.num_hidden_layers if isinstance(sizes, int) else sizes


def _kept(c: Any, skip: Sequence[int]) -> list[int]:
    """Numbers of the layers that remain.

    Raises:
        InvalidInput: a skipped layer does not exist, or remaining layers read its keys and values.
    """
    count = c.num_hidden_layers
    first = c.first_sharing_layer
    if outside := [index for index in skip if not 0 <= index < count]:
        raise InvalidInput(f"layers to leave out must lie in 0 … {count - 1}; found {outside[0]}")
    kept = [index for index in range(count) if index not in skip]
    for kind in sorted({c.layer_type(index) for index in kept if index >= first}):
        origin = max(index for index in range(first) if c.layer_type(index) == kind)
        if origin not in kept:
            raise InvalidInput(
                f"layer {origin} cannot be left out: its keys and values are those of all layers from {first} on of "
                f"its kind, {kind}, and these were trained with no other"
            )
    if not any(index < first for index in kept):
        raise InvalidInput(
            "no layer would be left that has keys and values of its own; leave out fewer"
        )
    return kept


def _widths(c: Any, ffn: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Feed-forward width of each remaining layer.

    Raises:
        InvalidInput: neither one width for all nor one for each, or a layer has fewer features.
    """
    whole = [_hidden_sizes(c)[index] for index in kept]
    if len(ffn) == 1:
        wanted = list(ffn) * len(kept)
    else:
        wanted = list(ffn) or whole
    if len(wanted) != len(kept):
        raise InvalidInput(
            f"{len(kept)} layers stay, and {len(wanted)} widths are given; give one for all of them, or one for each"
        )
    for index, width, most in zip(kept, wanted, whole, strict=True):
        if type(width) is not int or not 1 <= width <= most:
            raise InvalidInput(
                f"the feed-forward of layer {index} has {most} features; found a width of {width!r}"
            )
    return wanted


def _config(
    config: Mapping[str, Any], c: Any, kept: Sequence[int], widths: Sequence[int]
) -> dict[str, Any]:
    """config.json of the slice."""
    changed = {
        "num_hidden_layers": len(kept),
        "num_kv_shared_layers": sum(index >= c.first_sharing_layer for index in kept),
        "intermediate_size": list(widths),
        "layer_types": [c.layer_type(index) for index in kept],
        "activation_sparsity_pattern": [c.activation_sparsity_pattern[index] for index in kept],
    }
    wrapped = isinstance(config.get("text_config"), dict)
    out = {
        **config,
        **({"text_config": {**config["text_config"], **changed}} if wrapped else changed),
    }
    places = {index: place for place, index in enumerate(kept)}
    for key in ("quantization", "quantization_config"):  # both may have entries for single matrices
        if isinstance(section := config.get(key), dict):
            out[key] = _renumber_section(section, places)
    return out


def _renumber_section(section: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """Quantization section of config.json with the new layer numbers."""
    moved = {}
    for path, value in section.items():
        layer = _LAYER.match(path)
        if layer is None:
            moved[path] = value
        elif (place := places.get(int(layer["index"]))) is not None:
            moved[_renumber(path, place)] = value
    return moved


def _renumber(name: str, place: int) -> str:
    return _LAYER.sub(lambda found: f"{found['before']}{place}", name)


def _select_layers(name: str, tensor: LazyTensor, kept: Sequence[int], count: int) -> LazyTensor:
    """Tensor outside of the layers; two of them hold features for each layer, of which some remain."""
    if len(kept) == count:
        return tensor
    if name.endswith(".per_layer_model_projection.weight"):
        features = tensor.shape[-2] // count
        return _rows(
            name,
            tensor,
            np.concatenate([np.arange(i * features, (i + 1) * features) for i in kept]),
        )
    if name.endswith(".embed_tokens_per_layer.weight"):
        features = tensor.shape[-1] // count
        return _columns(name, tensor, [(a * features, b * features) for a, b in _runs(kept)])
    return tensor


def _narrow(name: str, tensor: LazyTensor, width: int) -> LazyTensor:
    """Tensor of a layer whose feed-forward keeps its first ``width`` features."""
    if re.search(r"\.mlp\.(gate|up)_proj\.weight$", name) and width < tensor.shape[-2]:
        return _rows(name, tensor, np.arange(width))
    if name.endswith(".mlp.down_proj.weight") and width < tensor.shape[-1]:
        return _columns(name, tensor, [(0, width)])
    return tensor


def _rows(name: str, tensor: LazyTensor, pick: np.ndarray) -> LazyTensor:
    if isinstance(tensor, QuantizedTensor):
        return tensor.map_components(name, lambda part: SelectedRows(part, pick))
    return SelectedRows(tensor, pick)


def _columns(name: str, tensor: LazyTensor, runs: Sequence[tuple[int, int]]) -> LazyTensor:
    return (
        tensor.select_columns(name, runs)
        if isinstance(tensor, QuantizedTensor)
        else SelectedColumns(tensor, runs)
    )


def _format_widths(widths: Sequence[int]) -> str:
    """8192, 8192, 16384 as "8192 in 2 layers, 16384 in 1"."""
    sizes = sorted(set(widths))
    counts = ", ".join(f"{size} in {widths.count(size)}" for size in sizes)
    return str(sizes[0]) if len(sizes) == 1 else counts.replace(",", " layers,", 1)
