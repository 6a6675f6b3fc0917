"""Other settings for some matrices than for the rest: chosen for a target, or by a recipe."""

import tomllib
from collections.abc import Mapping
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

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Recipe:
    """Settings by the names of matrices.

    Attributes:
        common: of all that no pattern names.
        patterns: shell patterns of names, without ``.weight``, and the bits; the first that fits counts.
    """

    name: str
    common: Quantization
    patterns: tuple[tuple[str, int], ...]

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """One that comes with the package, by its name, or a TOML file.

        Raises:
            QuantizationError: there is none, or it is not one.
        """
        known = sorted(path.stem for path in RECIPES.glob("*.toml"))
        path = RECIPES / f"{name}.toml" if name in known else Path(name)
        if not path.is_file():
            raise QuantizationError(f"recipe {name!r} is neither a file nor one of {', '.join(known)}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QuantizationError(f"{path} is no TOML file: {error}") from error
        return cls._checked(path, table)

    @classmethod
    def _checked(cls, path: Path, table: Mapping[str, Any]) -> "Recipe":
        unknown = table.keys() - {"bits", "group_size", "matrices", "about"}
        matrices = table.get("matrices", {})
        if unknown or not isinstance(matrices, dict) or "bits" not in table:
            raise QuantizationError(
                f"{path}: a recipe has bits, group_size, about and a table of matrices; "
                f"found {', '.join(sorted(table)) or 'nothing'}"
            )
        common = settings(table["bits"], table.get("group_size"))
        for bits in matrices.values():
            settings(bits, common.group_size)
        return cls(path.stem, common, tuple(matrices.items()))

    def settings_of(self, path: str) -> Quantization:
        """Of the matrix at ``path``."""
        name = path.removesuffix(".weight")
        bits = next((bits for pattern, bits in self.patterns if fnmatchcase(name, pattern)), self.common.bits)
        return replace(self.common, bits=bits)


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
        calibration=conversion.calibration if conversion.calibration and conversion.calibration.is_text else None,
        dtype=DTYPE_NAMES[conversion.dtype] if conversion.dtype else None,
        progress=progress,
    )
    return _with(
        conversion, found.settings, f"bits chosen for {in_words(target)}; expected KL {found.kl:.2g} nats a token"
    )


def by_recipe(conversion: Conversion, recipe: Recipe) -> Conversion:
    """The same conversion with the bits of a recipe."""
    matrices = conversion.resolved.published_matrices
    return _with(conversion, {path: recipe.settings_of(path) for path in matrices}, f"bits by the recipe {recipe.name}")


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
