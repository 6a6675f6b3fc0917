"""From the tensors of a checkpoint to the parameters of a model: names, quantized triples, and what must be there."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM, DecoderConfig, Quantization
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.renames import (
    Ignore,
    IgnoreExtraLayers,
    IgnoreFrom,
    Join,
    Rename,
    Rule,
    SplitHeads,
    SplitRows,
    Stack,
    Transpose,
)
from mlxarch.checkpoint import Checkpoint, Shard
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.expert_files import open_experts
from mlxarch.foreign import unpack_foreign
from mlxarch.registry import Architecture, architecture
from mlxarch.row_files import open_rows
from mlxarch.tensors import FLOATS, Joined, Packed, Rows, Shaped, Stacked, Stored, Tensor, Transposed

SIDECARS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "tiktoken.model", "tekken.json", "tokenizer.tok.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
)


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
    experts, files = open_experts(checkpoint.folder)
    table, row_files = open_rows(checkpoint.folder)
    tensors = pack(stored, checkpoint.config) | experts | table
    shards = (*checkpoint.shards, *files, *row_files)
    return Source(checkpoint.config, tensors, sidecars, shards, notes_on(tensors))


def notes_on(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What became of matrices that another program packed: one sentence for each kind."""
    kinds = Counter(tensor.origin for tensor in tensors.values() if tensor.origin)
    return tuple(f"{count} matrices {origin}" for origin, count in kinds.items())


def pack(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Join each quantized weight with its scales and biases, by the settings in ``config``."""
    if not config.get("quantization"):
        stored = unpack_foreign(stored, config)
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


@dataclass(frozen=True)
class Resolved:
    """A model's parameters, each with the tensor that fills it.

    Attributes:
        architecture: with ``tie_word_embeddings`` as the tensors have it.
        tensors: path of the weight -> Tensor, in the source's order; a Packed stands for its three arrays.
        ignored: names of tensors that the model has no use for, each with what it is.
        carried: those of ``ignored`` that stand in ``tensors`` all the same: a converted checkpoint has them.
    """

    architecture: Architecture
    model: CausalLM
    tensors: dict[str, Tensor]
    ignored: Mapping[str, str] = field(default_factory=dict)
    carried: Collection[str] = frozenset()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Path -> Tensor of what the model computes with."""
        return {path: tensor for path, tensor in self.tensors.items() if path not in self.carried}

    @property
    def matrices(self) -> frozenset[str]:
        """Paths of what a quantizer may pack: weights of linear layers, experts and embeddings."""
        modules = self.model.named_modules()
        own = {f"{path}.weight" for path, m in modules if isinstance(m, Matrix) and m.quantizable}
        return frozenset(own | {path for path in self.carried if len(self.tensors[path].shape) == 2})

    @property
    def exact(self) -> frozenset[str]:
        """Paths of the parameters that are never cast: a module names them in ``float32``."""
        modules = self.model.named_modules()
        return frozenset(f"{path}.{name}" for path, m in modules for name in getattr(m, "float32", ()))

    @property
    def published(self) -> dict[str, Tensor]:
        """``tensors`` by the names that a checkpoint of this ``model_type`` gives them, in the source's order."""
        return {self.architecture.published(path): tensor for path, tensor in self.tensors.items()}

    @property
    def published_matrices(self) -> frozenset[str]:
        """``matrices`` by these names."""
        return frozenset(map(self.architecture.published, self.matrices))

    @property
    def published_exact(self) -> frozenset[str]:
        """``exact`` by these names."""
        return frozenset(map(self.architecture.published, self.exact))


# What no architecture reads: tables that RoPE computes itself
COMMON: tuple[Rule, ...] = (Ignore(r"\.rotary_emb\.inv_freq$", "RoPE frequencies"),)


def resolve(source: Source) -> Resolved:
    """Find the architecture of a source and match its tensors with the model's parameters.

    Raises:
        CheckpointError: tensors are missing or unexpected (named), or one has another shape than the config says.
        ConfigError, UnsupportedArchitecture: see ``registry.architecture``.
    """
    found = architecture(source.config)
    tensors, ignored, carried = dict(source.tensors), {}, set()
    for rule in (*COMMON, *found.rules):
        tensors = _apply(rule, tensors, found.config, ignored, carried)
    if found.config.tie_word_embeddings and "lm_head.weight" in tensors:
        # the file brings a head of its own, which then counts, whatever the config says
        found = replace(found, config=replace(found.config, tie_word_embeddings=False))
    model = found.build()
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    # in the order of the source: who reads them in this order reads each file once
    resolved = Resolved(found, model, tensors, ignored, frozenset(carried))
    _check_names(shapes, resolved.parameters)
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {shapes[name]}; "
                "the two files belong to different models"
            )
        if not isinstance(tensor, Packed) and tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are allowed")
    packed = {name for name, tensor in resolved.parameters.items() if isinstance(tensor, Packed)}
    matrices = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Matrix)}
    if not packed <= matrices:
        raise CheckpointError(f"tensor {min(packed - matrices)} is quantized, and no matrix")
    return resolved


def _apply(
    rule: Rule, tensors: dict[str, Tensor], config: DecoderConfig, ignored: dict[str, str], carried: set[str]
) -> dict[str, Tensor]:
    """The tensors with one rule applied; what it leaves out is added to ``ignored`` with the reason, and to ``carried``
    where it stays among the tensors.
    """
    match rule:
        case Rename(pattern, to):
            return {re.sub(pattern, to, name): tensor for name, tensor in tensors.items()}
        case Ignore(pattern, what):
            ignored |= {name: what for name in tensors if re.search(pattern, name)}
        case IgnoreExtraLayers():
            extra = _from_layer(config.num_hidden_layers, tensors)
            ignored |= dict.fromkeys(extra, "layers that predict further tokens")
        case IgnoreFrom(first, pattern, what, carry):
            named = [name for name in _from_layer(getattr(config, first), tensors) if re.search(pattern, name)]
            ignored |= dict.fromkeys(named, what)
            carried |= set(named if carry else ())
        case Transpose(pattern):
            return {n: Transposed(t) if re.search(pattern, n) else t for n, t in tensors.items()}
        case Stack():
            return _stack(rule, tensors)
        case Join():
            return _join(rule, tensors)
        case SplitRows():
            return _split(rule, tensors)
        case SplitHeads():
            return _split_heads(rule, tensors, config)
        case _:
            assert_never(rule)
    return {name: tensor for name, tensor in tensors.items() if name not in ignored or name in carried}


def _from_layer(first: int, names: Iterable[str]) -> list[str]:
    layers = {name: re.search(r"\blayers\.(\d+)\.", name) for name in names}
    return [name for name, match in layers.items() if match and int(match[1]) >= first]


def _stack(rule: Stack, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out, groups = _grouped(rule.pattern, rule.to, "expert", tensors)
    for target, experts in groups.items():
        if len({(e.shape, e.dtype, type(e)) for e in experts}) > 1:
            raise CheckpointError(
                f"tensor {target} has experts of different shapes or types; download the checkpoint again"
            )
        first = experts[0]
        if isinstance(first, Packed):
            each = [expert for expert in experts if isinstance(expert, Packed) and expert.settings == first.settings]
            if len(each) < len(experts):
                raise CheckpointError(f"tensor {target} has experts that are quantized in different ways")
            parts = {part: Stacked([expert.parts[part] for expert in each]) for part in first.parts}
            out[target] = Packed(target, parts, first.settings)
        else:
            out[target] = Stacked(experts)
    return out


def _join(rule: Join, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out, groups = _grouped(rule.pattern, rule.to, "rank", tensors)
    for target, slices in groups.items():
        if any(len(s.shape) != 2 for s in slices) or len({(s.shape, s.dtype) for s in slices}) > 1:
            raise CheckpointError(
                f"tensor {target} has slices of different shapes or types; download the checkpoint again"
            )
        out[target] = Joined(slices, rule.axis)
    return out


def _grouped(
    pattern: str, to: str, key: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The tensors with the first of each group in its place, and the groups, in the order of the pattern's ``key``."""
    out: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(pattern, name)):
            out[name] = tensor
            continue
        target = name[: found.start()] + found.expand(to) + name[found.end() :]
        out.setdefault(target, tensor)  # holds the place in the order
        groups.setdefault(target, {})[int(found[key])] = tensor
    for target, members in groups.items():
        if missing := sorted(set(range(max(members) + 1)) - set(members)):
            raise CheckpointError(f"tensor {target} lacks {key} {missing[0]}; download the checkpoint again")
    return out, {target: [members[index] for index in sorted(members)] for target, members in groups.items()}


def _split(rule: SplitRows, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(rule.pattern, name)):
            out[name] = tensor
            continue
        count, rows = len(rule.to), tensor.shape[-1 if rule.vector else -2]
        if rows % count:
            raise CheckpointError(f"tensor {name} of shape {tensor.shape} does not hold {count} equal parts")
        for index, to in enumerate(rule.to):
            size = rows // count
            pick = np.arange(index, rows, count) if rule.interleaved else np.arange(index * size, (index + 1) * size)
            target = name[: found.start()] + found.expand(to) + name[found.end() :]
            if isinstance(tensor, Packed):
                out[target] = tensor.each_part(target, lambda part, pick=pick: Rows(part, pick))
            else:
                out[target] = Rows(tensor, pick, rule.vector)
    return out


def _split_heads(rule: SplitHeads, tensors: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A packed matrix is unpacked: the groups of the transposed are others."""
    heads, sizes = config.num_attention_heads, [getattr(config, key) for key in rule.sizes]
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(rule.pattern, name)):
            out[name] = tensor
            continue
        if len(tensor.shape) != 2 or tensor.shape[0] != heads * sum(sizes):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {heads} heads of {sum(sizes)} rows; "
                "the two files belong to different models"
            )
        rows = np.arange(tensor.shape[0]).reshape(heads, -1)
        for to, pick, size in zip(rule.to, (rows[:, : sizes[0]], rows[:, sizes[0] :]), sizes, strict=True):
            target = name[: found.start()] + found.expand(to) + name[found.end() :]
            part = Shaped(Rows(tensor, pick.flatten()), (heads, size, tensor.shape[1]))
            out[target] = Transposed(part) if to == rule.to[0] else part
    return out


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
