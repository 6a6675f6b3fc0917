"""Mixed precision by recipe: the bits of each matrix, given by patterns of its name."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxarch.blocks.moe.moe import Experts
from mlxarch.checkpoint.layout import plan_layout
from mlxarch.errors import QuantizationError
from mlxarch.loading.registry import Architecture
from mlxarch.quantization.scheme import Quantization, check_quantization
from mlxarch.quantize.conversion import Conversion
from mlxarch.system.dtypes import mlx_dtype

RECIPES = Path(__file__).with_name("recipes")
AUTO = "auto"  # given instead of a recipe's name: the bundled recipe for the model's architecture
KEYS = {"bits", "group_size", "matrices", "about", "architectures", "tied"}


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


@dataclass(frozen=True)
class Recipe:
    """Bits of each matrix by its name.

    Attributes:
        name: name of the recipe's file, without suffix.
        default: quantization of the matrices that no pattern matches; all of them have its group
            size.
        patterns: pairs of a shell pattern for matrix names without ``.weight`` and the bits; the
            first match counts.
        architectures: names of the model files that the recipe is made for; empty if it is for all.
        tied: whether it is for models whose embeddings are tied to the output head; None for both
            kinds.
    """

    name: str
    default: Quantization
    patterns: tuple[tuple[str, int], ...]
    architectures: tuple[str, ...] = ()
    tied: bool | None = None

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """Read a recipe: one of the package by its name, or a TOML file by its path.

        Raises:
            QuantizationError: there is no such recipe, or the file is not a valid one.
        """
        path = RECIPES / f"{name}.toml" if name in bundled_recipes() else Path(name)
        if not path.is_file():
            raise QuantizationError(
                f"recipe {name!r} is neither a TOML file nor one of "
                f"{', '.join(bundled_recipes())}; {AUTO} takes the one of these that is meant for "
                "the model"
            )
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QuantizationError(f"{path} is no TOML file: {error}") from error
        return cls._from_table(path, table)

    @classmethod
    def for_architecture(cls, architecture: Architecture) -> "Recipe":
        """Find the bundled recipe for an architecture: the one made for it, else that of its kind.

        The kinds are mixture of experts, dense with tied embeddings, and dense.
        """
        tied = architecture.config.tie_word_embeddings
        for recipe in map(cls.read, bundled_recipes()):
            if architecture.name in recipe.architectures and recipe.tied in (None, tied):
                return recipe
        if any(isinstance(module, Experts) for module in architecture.build().modules()):
            return cls.read("experts")
        return cls.read("tied" if tied else "dense")

    @classmethod
    def _from_table(cls, path: Path, table: Mapping[str, Any]) -> "Recipe":
        matrices = table.get("matrices", {})
        architectures = table.get("architectures", [])
        tied = table.get("tied")
        valid = (
            "bits" in table
            and not table.keys() - KEYS
            and isinstance(matrices, dict)
            and isinstance(architectures, list)
            and isinstance(tied, bool | None)
        )
        if not valid:
            raise QuantizationError(
                f"{path}: a recipe has bits, group_size, a table of matrices and, for those who "
                "read it, about, architectures and tied; found "
                f"{', '.join(sorted(table)) or 'nothing'}"
            )
        default = check_quantization(table["bits"], table.get("group_size"))
        for bits in matrices.values():
            check_quantization(bits, default.group_size)
        return cls(
            name=path.stem,
            default=default,
            patterns=tuple(matrices.items()),
            architectures=tuple(map(str, architectures)),
            tied=tied,
        )

    def unmatched_patterns(self, paths: Iterable[str]) -> list[str]:
        """Patterns that match none of the matrices at ``paths``."""
        names = [path.removesuffix(".weight") for path in paths]
        return [
            pattern
            for pattern, _ in self.patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]

    def bits_for(self, path: str) -> int:
        """Bits of the matrix at ``path``."""
        name = path.removesuffix(".weight")
        for pattern, bits in self.patterns:
            if fnmatchcase(name, pattern):
                return bits
        return self.default.bits


def by_recipe(conversion: Conversion, recipe: Recipe, group_size: int | None = None) -> Conversion:
    """Return the conversion with the bits that a recipe gives to each matrix.

    Args:
        conversion: conversion in affine mode; its method stays.
        recipe: recipe that gives the bits.
        group_size: weights that share a scale; None takes the recipe's.

    Raises:
        QuantizationError: the conversion is not to affine quantization.
    """
    if conversion.quantization is None or conversion.quantization.mode != "affine":
        raise QuantizationError(
            "a recipe chooses bits of mode affine; leave out the other mode, or the recipe"
        )
    default = replace(recipe.default, group_size=group_size or recipe.default.group_size)
    matrices = conversion.resolved.published_matrices
    quantizations = {path: replace(default, bits=recipe.bits_for(path)) for path in matrices}
    note = f"bits by the recipe {recipe.name}"
    # recipes for certain architectures have patterns that not all of these need
    if not recipe.architectures and (unmatched := recipe.unmatched_patterns(matrices)):
        note += f"; no matrix is called {' or '.join(unmatched)}"
    return replace_quantizations(replace(conversion, quantization=default), quantizations, note)


def replace_quantizations(
    conversion: Conversion, quantizations: Mapping[str, Quantization], note: str
) -> Conversion:
    """Return the conversion with a quantization for each matrix, and a note about it.

    Args:
        conversion: conversion to change.
        quantizations: published path of the matrix -> its quantization; other matrices get the
            conversion's own.
        note: put before the conversion's other notes.
    """
    resolved = conversion.resolved
    layout = plan_layout(
        resolved.published,
        resolved.published_matrices,
        conversion.quantization,
        mlx_dtype(conversion.dtype),
        conversion.limits.shard_bytes,
        resolved.published_exact,
        quantizations,
    )
    return replace(conversion, layout=replace(layout, notes=(note, *layout.notes)))
