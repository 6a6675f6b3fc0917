"""Refuse a wheel that would litter a user's site-packages or lacks a file: `python .ci/check_wheel.py WHEEL`."""

import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"mlxarch/py.typed", "mlxarch/catalog.toml", "mlxarch/cli/main.py", "mlxarch/quantize/__init__.py"}
REQUIRED |= {f"mlxarch/configs/{path.name}" for path in (ROOT / "mlxarch" / "configs").glob("*.json")}
REQUIRED |= {f"mlxarch/quantize/texts/{path.name}" for path in (ROOT / "quantize" / "texts").iterdir()}
FOREIGN = {"torch", "transformers", "mlx-lm", "mlx_lm"}


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    sources = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    requirements = [requirement.split(";")[0] for requirement in metadata.get_all("Requires-Dist", [])]
    found = []
    if top != {"mlxarch"}:
        found.append(f"top-level names {sorted(top)}; allowed: mlxarch alone")
    if missing := sorted((REQUIRED | sources) - names):
        found.append(
            f"missing: {', '.join(missing)}; list every package in pyproject.toml, and data under package-data"
        )
    if strays := sorted(name for name in names if name.endswith(".py") and name not in sources):
        found.append(f"not in the source tree: {', '.join(strays)}; remove build/ and build again")
    if tests := sorted(name for name in names if "test" in name.lower() or "fixture" in name):
        found.append(f"tests inside: {', '.join(tests)}")
    if heavy := sorted(
        name for name in requirements if name.strip().split("[")[0].split(">")[0].split("=")[0] in FOREIGN
    ):
        found.append(f"requires {', '.join(heavy)}")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = problems(path)
    for problem in found:
        print(f"{path.name}: {problem}", file=sys.stderr)
    if not found:
        print(f"{path.name}: one top-level name, every source file, {path.stat().st_size / 1e3:.0f} kB")
    sys.exit(bool(found))
