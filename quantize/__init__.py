"""Quantization of checkpoints: ``convert`` one, or ``prepare`` a conversion and run it.

``toward`` a ``Target`` or ``by_recipe``, a prepared conversion gets a number of bits for each
matrix.
"""

from mlxarch.quantize.conversion import Conversion
from mlxarch.quantize.convert_checkpoint import convert, prepare
from mlxarch.quantize.mixed_precision.bit_allocation import Target
from mlxarch.quantize.mixed_precision.recipes import Recipe, by_recipe
from mlxarch.quantize.mixed_precision.targets import toward
from mlxarch.quantize.output.model_card import Origin
from mlxarch.quantize.output.summary import Summary

__all__ = [
    "Conversion",
    "Origin",
    "Recipe",
    "Summary",
    "Target",
    "by_recipe",
    "convert",
    "prepare",
    "toward",
]
