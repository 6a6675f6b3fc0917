"""A smaller Gemma 3n inside the whole one: narrower feed-forwards, fewer layers, the same numbers.

Its feed-forwards were trained so that the first features alone do most of the work (MatFormer, arXiv:2310.07707): a
slice takes the first rows of ``gate_proj`` and ``up_proj`` and the first columns of ``down_proj``. A layer that is left
out takes its columns of the per-layer embeddings with it, and the layers behind it move up. What is quantized stays as
it is packed, so that a slice of a quantized model is that of the original, quantized.
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

from mlxarch.errors import InvalidInput
from mlxarch.tensors import Columns, Packed, Rows, Tensor
from mlxarch.weights import Source, resolve

_LAYER = re.compile(r"^(?P<before>(?:(?:model|language_model)\.)+layers\.)(?P<index>\d+)(?=\.)")
_WHOLE = 35  # layers of the model that the published slices are slices of


@dataclass(frozen=True)
class Slice:
    """What to keep of a Gemma 3n.

    Attributes:
        ffn: features of the feed-forwards: one number for all layers that stay, or one for each; empty keeps all.
        skip: layers to leave out, as the whole model counts them.
    """

    ffn: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()


def names() -> tuple[str, ...]:
    """Of the published slices, smallest first."""
    return tuple(_table())


def slice_source(source: Source, wanted: str | Slice) -> Source:
    """The smaller model inside of ``source``: virtual tensors, so that nothing is read yet.

    Args:
        source: a Gemma 3n, quantized or not.
        wanted: what to keep, or the name of a published slice of Gemma 3n E4B, such as "e2b".

    Raises:
        CheckpointError, ConfigError: the source is not a sound checkpoint.
        InvalidInput: another architecture, no such slice, widths or layers that do not exist, a cut through a group of
            a quantized matrix, or a layer left out that others take their keys and values from.
    """
    found = resolve(source).architecture  # its errors come before any about the slice
    c: Any = found.config  # of models/gemma3n.py
    if found.name != "gemma3n":
        raise InvalidInput(f"only Gemma 3n is made to be sliced, and this is a {found.name}")
    cut = _published(wanted, c) if isinstance(wanted, str) else wanted
    kept = _kept(c, cut.skip)
    widths = _widths(c, cut.ffn, kept)
    places = {index: place for place, index in enumerate(kept)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        layer = _LAYER.match(name)
        if layer is None:
            tensors[name] = _of_layers(name, tensor, kept, c.num_hidden_layers)
        elif (place := places.get(int(layer["index"]))) is not None:
            tensors[_renumbered(name, place)] = _narrowed(name, tensor, widths[place])
    note = (
        f"a slice of {len(kept)} of {c.num_hidden_layers} layers"
        + (f", without {runs_in_words(cut.skip)}" if cut.skip else "")
        + f"; features of the feed-forwards: {_in_words(widths)}"
    )
    return replace(source, config=_config(source.config, c, kept, widths), tensors=tensors, notes=(*source.notes, note))


def parse_layers(text: str) -> tuple[int, ...]:
    """ "3,20-24" as the numbers it means.

    Raises:
        InvalidInput: it is written otherwise.
    """
    layers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        found = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not found:
            raise InvalidInput(f"layers are written as numbers and ranges, such as 3,20-24; found {text!r}")
        layers |= set(found)
    return tuple(sorted(layers))


def runs_in_words(numbers: Sequence[int]) -> str:
    """3, 20, 21, 22 as "3,20-22"."""
    return ",".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in _runs(numbers))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (start, stop)."""
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
    if c.num_hidden_layers != _WHOLE or len(sizes) != 1:
        raise InvalidInput(
            f"{name} is a slice of Gemma 3n E4B, whose {_WHOLE} layers are equally wide; this model has "
            f"{c.num_hidden_layers} layers, with feed-forwards of {', '.join(map(str, sorted(sizes)))} features. Slice "
            "E4B, or name widths and layers yourself"
        )
    skip, wide, [whole] = parse_layers(entry["skip"]), parse_layers(entry["wide"]), sizes
    return Slice(tuple(whole if i in wide else whole // 2 for i in range(_WHOLE) if i not in skip), skip)


def _hidden_sizes(c: Any) -> Sequence[int]:
    sizes = c.intermediate_size
    return [sizes] * c.num_hidden_layers if isinstance(sizes, int) else sizes


def _kept(c: Any, skip: Sequence[int]) -> list[int]:
    """The layers that stay.

    Raises:
        InvalidInput: one of ``skip`` does not exist, or is where layers that stay take their keys and values from.
    """
    count, first = c.num_hidden_layers, c.first_sharing_layer
    if outside := [index for index in skip if not 0 <= index < count]:
        raise InvalidInput(f"layers to leave out must lie in 0 … {count - 1}; found {outside[0]}")
    kept = [index for index in range(count) if index not in skip]
    for kind in sorted({c.kind(index) for index in kept if index >= first}):
        origin = max(index for index in range(first) if c.kind(index) == kind)
        if origin not in kept:
            raise InvalidInput(
                f"layer {origin} cannot be left out: its keys and values are those of all layers from {first} on of "
                f"its kind, {kind}, and these were trained with no other"
            )
    if not any(index < first for index in kept):
        raise InvalidInput("no layer would be left that has keys and values of its own; leave out fewer")
    return kept


def _widths(c: Any, ffn: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Features of the feed-forward of each layer that stays.

    Raises:
        InvalidInput: not one number for all or for each; or a layer has not so many.
    """
    whole = [_hidden_sizes(c)[index] for index in kept]
    wanted = list(ffn) * len(kept) if len(ffn) == 1 else list(ffn) or whole
    if len(wanted) != len(kept):
        raise InvalidInput(
            f"{len(kept)} layers stay, and {len(wanted)} widths are given; give one for all of them, or one for each"
        )
    for index, width, most in zip(kept, wanted, whole, strict=True):
        if type(width) is not int or not 1 <= width <= most:
            raise InvalidInput(f"the feed-forward of layer {index} has {most} features; found a width of {width!r}")
    return wanted


def _config(config: Mapping[str, Any], c: Any, kept: Sequence[int], widths: Sequence[int]) -> dict[str, Any]:
    """config.json of the slice."""
    changed = {
        "num_hidden_layers": len(kept),
        "num_kv_shared_layers": sum(index >= c.first_sharing_layer for index in kept),
        "intermediate_size": list(widths),
        "layer_types": [c.kind(index) for index in kept],
        "activation_sparsity_pattern": [c.activation_sparsity_pattern[index] for index in kept],
    }
    wrapped = isinstance(config.get("text_config"), dict)
    out = {**config, **({"text_config": {**config["text_config"], **changed}} if wrapped else changed)}
    places = {index: place for place, index in enumerate(kept)}
    for key in ("quantization", "quantization_config"):  # both may have settings for single matrices
        if isinstance(section := config.get(key), dict):
            out[key] = _moved(section, places)
    return out


def _moved(section: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    moved = {}
    for path, value in section.items():
        layer = _LAYER.match(path)
        if layer is None:
            moved[path] = value
        elif (place := places.get(int(layer["index"]))) is not None:
            moved[_renumbered(path, place)] = value
    return moved


def _renumbered(name: str, place: int) -> str:
    return _LAYER.sub(lambda found: f"{found['before']}{place}", name)


def _of_layers(name: str, tensor: Tensor, kept: Sequence[int], count: int) -> Tensor:
    """A tensor outside of the layers: two of them hold as many features for each."""
    if len(kept) == count:
        return tensor
    if name.endswith(".per_layer_model_projection.weight"):
        features = tensor.shape[-2] // count
        return _rows(name, tensor, np.concatenate([np.arange(i * features, (i + 1) * features) for i in kept]))
    if name.endswith(".embed_tokens_per_layer.weight"):
        features = tensor.shape[-1] // count
        return _columns(name, tensor, [(a * features, b * features) for a, b in _runs(kept)])
    return tensor


def _narrowed(name: str, tensor: Tensor, width: int) -> Tensor:
    """A tensor of a layer whose feed-forward keeps its first ``width`` features."""
    if re.search(r"\.mlp\.(gate|up)_proj\.weight$", name) and width < tensor.shape[-2]:
        return _rows(name, tensor, np.arange(width))
    if name.endswith(".mlp.down_proj.weight") and width < tensor.shape[-1]:
        return _columns(name, tensor, [(0, width)])
    return tensor


def _rows(name: str, tensor: Tensor, pick: np.ndarray) -> Tensor:
    if isinstance(tensor, Packed):
        return tensor.each_part(name, lambda part: Rows(part, pick))
    return Rows(tensor, pick)


def _columns(name: str, tensor: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    return tensor.columns(name, runs) if isinstance(tensor, Packed) else Columns(tensor, runs)


def _in_words(widths: Sequence[int]) -> str:
    """8192, 8192, 16384 as "8192 in 2 layers, 16384 in 1"."""
    sizes = sorted(set(widths))
    counts = ", ".join(f"{size} in {widths.count(size)}" for size in sizes)
    return str(sizes[0]) if len(sizes) == 1 else counts.replace(",", " layers,", 1)
