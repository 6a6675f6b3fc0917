"""Checkpoints in, smaller checkpoints out: ``convert``; ``prepare`` to see first what it will take.

Between ``prepare`` and ``run``, ``toward`` a ``Target`` and ``by_recipe`` give some matrices more bits than others.
"""

from mlxarch.quantize.budget import Target
from mlxarch.quantize.card import Origin
from mlxarch.quantize.conversion import Conversion, Summary, convert, prepare
from mlxarch.quantize.mixture import Recipe, by_recipe, toward

__all__ = ["Conversion", "Origin", "Recipe", "Summary", "Target", "by_recipe", "convert", "prepare", "toward"]
