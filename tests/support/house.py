"""Helpers for tests of the repository itself."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THOROUGH = bool(
    os.environ.get("MLXARCH_TEST_THOROUGH")
)  # as many mutants as a release wants, nothing by short cuts

MODEL_DOCSTRING = re.compile(
    r"""\A[^\n]+\ \([^(),]+,\ 20\d\d\)[^\n]*(\n[^\n]+)*\n   # name (maker, year), and what else the file covers
    \n(\ {4}[^\n]*[─│┬┴├┤+][^\n]*\n|\ {4}[^\n]+\n)+         # the drawing, indented
    \nStands\ out:\ \S(.|\n)*
    \nSource:\ \S(.|\n)*config\.json""",
    re.VERBOSE,
)
