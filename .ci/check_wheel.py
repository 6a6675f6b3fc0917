"""Refuse a wheel that would litter a user's site-packages or lacks a file: `python .ci/check_wheel.py WHEEL`."""

import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {"torch", "transformers", "mlx-lm", "mlx_lm"}


def files_of(folder: Path) -> list[Path]:
    """Every source and data file of the package, through the links to the folders beside it."""
    found = []
    for path in folder.iterdir():
        if path.is_dir():
            found += files_of(path) if path.name != "__pycache__" else []
        elif path.suffix != ".pyc":
            found.append(path)
    return found


def problems(wheel: Path) -> list[str]:
    """List the defects of a wheel, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in files_of(ROOT / "mlxarch")}
    requirements = [
        requirement.split(";")[0] for requirement in metadata.get_all("Requires-Dist", [])
    ]
    found = []
    if top != {"mlxarch"}:
        found.append(f"top-level names {sorted(top)}; allowed: mlxarch alone")
    if missing := sorted(sources - names):
        found.append(
            f"missing: {', '.join(missing)}; a package needs an __init__.py, and data a pattern under "
            "package-data in pyproject.toml"
        )
    if strays := sorted(name for name in names if name.endswith(".py") and name not in sources):
        found.append(f"not in the source tree: {', '.join(strays)}; remove build/ and build again")
    if tests := sorted(name for name in names if "test" in name.lower() or "fixture" in name):
        found.append(f"tests inside: {', '.join(tests)}")
    if heavy := sorted(
        name
        for name in requirements
        if name.strip().split("[")[0].split(">")[0].split("=")[0] in FOREIGN
    ):
        found.append(f"requires {', '.join(heavy)}")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = problems(path)
    for problem in found:
        print(f"{path.name}: {problem}", file=sys.stderr)
    if not found:
        print(
            f"{path.name}: one top-level name, every source file, {path.stat().st_size / 1e3:.0f} kB"
        )
    sys.exit(bool(found))
