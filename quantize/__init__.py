"""Checkpoints in, smaller checkpoints out: ``convert``; ``prepare`` to see first what it will take."""

from mlxarch.quantize.card import Origin
from mlxarch.quantize.conversion import Conversion, Summary, convert, prepare

__all__ = ["Conversion", "Origin", "Summary", "convert", "prepare"]
