"""Other settings for some matrices than for the rest: chosen for a target, or by a recipe."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.budget import Target
from mlxarch.quantize.conversion import DTYPE_NAMES, Conversion
from mlxarch.quantize.disk import size
from mlxarch.quantize.forecast import forecast
from mlxarch.quantize.formats import settings
from mlxarch.quantize.plan import make_plan
from mlxarch.registry import Architecture

RECIPES = Path(__file__).with_name("recipes")
AUTO = "auto"  # in place of a recipe's name: the one that is meant for the model


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


@dataclass(frozen=True)
class Recipe:
    """Settings by the names of matrices.

    Attributes:
        common: of all that no pattern names.
        patterns: shell patterns of names, without ``.weight``, and the bits; the first that fits counts.
        architectures: of the models that it is meant for, by the names of their files; empty where all are.
        tied: whether their embeddings are their head as well; None where it does not matter.
    """

    name: str
    common: Quantization
    patterns: tuple[tuple[str, int], ...]
    architectures: tuple[str, ...] = ()
    tied: bool | None = None

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """One that comes with the package, by its name, or a TOML file.

        Raises:
            QuantizationError: there is none, or it is not one.
        """
        path = RECIPES / f"{name}.toml" if name in presets() else Path(name)
        if not path.is_file():
            raise QuantizationError(
                f"recipe {name!r} is neither a TOML file nor one of {', '.join(presets())}; "
                f"{AUTO} takes the one of these that is meant for the model"
            )
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QuantizationError(f"{path} is no TOML file: {error}") from error
        return cls._checked(path, table)

    @classmethod
    def meant_for(cls, architecture: Architecture) -> "Recipe":
        """The one of those that come with the package.

        Raises:
            QuantizationError: there is none for this architecture.
        """
        tied = architecture.config.tie_word_embeddings
        for recipe in map(cls.read, presets()):
            if architecture.name in recipe.architectures and recipe.tied in (None, tied):
                return recipe
        raise QuantizationError(f"no recipe is meant for {architecture.name}; name one of {', '.join(presets())}")

    @classmethod
    def _checked(cls, path: Path, table: Mapping[str, Any]) -> "Recipe":
        unknown = table.keys() - {"bits", "group_size", "matrices", "about", "architectures", "tied"}
        matrices, architectures, tied = (
            table.get(key, usual) for key, usual in (("matrices", {}), ("architectures", []), ("tied", None))
        )
        lists = isinstance(matrices, dict) and isinstance(architectures, list)
        if unknown or not lists or not isinstance(tied, bool | None) or "bits" not in table:
            raise QuantizationError(
                f"{path}: a recipe has bits, group_size, a table of matrices and, for those who read it, about, "
                f"architectures and tied; found {', '.join(sorted(table)) or 'nothing'}"
            )
        common = settings(table["bits"], table.get("group_size"))
        for bits in matrices.values():
            settings(bits, common.group_size)
        return cls(path.stem, common, tuple(matrices.items()), tuple(map(str, architectures)), tied)

    def idle(self, paths: Iterable[str]) -> list[str]:
        """The patterns that fit none of the matrices at ``paths``."""
        names = [path.removesuffix(".weight") for path in paths]
        return [pattern for pattern, _ in self.patterns if not any(fnmatchcase(name, pattern) for name in names)]

    def bits_of(self, path: str) -> int:
        """Of the matrix at ``path``."""
        name = path.removesuffix(".weight")
        return next((bits for pattern, bits in self.patterns if fnmatchcase(name, pattern)), self.common.bits)


def toward(conversion: Conversion, target: Target, progress: Progress = silent) -> Conversion:
    """The same conversion with bits for each matrix that reach a target; a note tells the divergence to expect.

    Raises:
        QuantizationError: the target is out of reach, or the conversion is none to affine codes.
    """
    wanted = conversion.wanted
    if wanted is None or wanted.mode != "affine":
        raise QuantizationError("a target chooses bits of mode affine; leave out the other mode, or the target")
    packed = sum(entry.nbytes for entry in conversion.plan.entries.values() if entry.treatment == "quantized")
    room = None if target.size is None else target.size - (conversion.needed - packed)
    found = forecast(
        conversion.source,
        conversion.resolved,
        target,
        room,
        method=conversion.chosen,
        group_size=wanted.group_size,
        calibration=conversion.calibration,
        texts=conversion.texts,
        dtype=DTYPE_NAMES[conversion.dtype] if conversion.dtype else None,
        progress=progress,
    )
    note = f"bits chosen for {in_words(target)}; expected KL {found.kl:.3g} nats a token"
    return replace(_with(conversion, found.settings, note), forecast=found.kl)


def by_recipe(conversion: Conversion, recipe: Recipe, group_size: int | None = None) -> Conversion:
    """The same conversion with the bits of a recipe, in its groups or others.

    Raises:
        QuantizationError: the conversion is none to affine codes.
    """
    if conversion.wanted is None or conversion.wanted.mode != "affine":
        raise QuantizationError("a recipe chooses bits of mode affine; leave out the other mode, or the recipe")
    common = replace(recipe.common, group_size=group_size or recipe.common.group_size)
    matrices = conversion.resolved.published_matrices
    chosen = {path: replace(common, bits=recipe.bits_of(path)) for path in matrices}
    note = f"bits by the recipe {recipe.name}"
    if not recipe.architectures and (idle := recipe.idle(matrices)):  # those that come along are for several
        note += f"; no matrix is called {' or '.join(idle)}"
    return _with(replace(conversion, wanted=common), chosen, note)


def in_words(target: Target) -> str:
    """How a person reads it."""
    if target.size is not None:
        return f"a size of {size(target.size)}"
    return f"{target.bits:g} bits per weight" if target.bits is not None else f"a KL of {target.kl:g}"


def _with(conversion: Conversion, chosen: Mapping[str, Quantization], note: str) -> Conversion:
    resolved = conversion.resolved
    plan = make_plan(
        resolved.published,
        resolved.published_matrices,
        conversion.wanted,
        DTYPE_NAMES[conversion.dtype] if conversion.dtype else None,
        conversion.limits.shard,
        resolved.published_exact,
        chosen,
    )
    return replace(conversion, plan=replace(plan, notes=(note, *plan.notes)))
