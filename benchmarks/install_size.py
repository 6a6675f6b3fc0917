"""Size of `pip install mlxarch`: packages, megabytes, import times; fails if torch or transformers is among them.

    python benchmarks/install_size.py dist/mlxarch-*.whl [--extras mlx-cpu,gguf]

The wheel goes into an empty environment in a temporary folder. Times are the best of five fresh processes.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNWANTED = ("torch", "torchvision", "transformers", "mlx-lm")
MB = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Install the wheel into an empty environment and measure it."
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--extras",
        default="mlx-cpu" if platform.system() == "Linux" else "",
        help="default here: %(default)r",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlxarch-size-") as folder:
        return measure(arguments.wheel.resolve(), arguments.extras, Path(folder))


def measure(wheel: Path, extras: str, folder: Path) -> int:
    """Print the table; 1 if an unwanted package came along, else 0."""
    requirement = f"{wheel}[{extras}]" if extras else str(wheel)
    downloads, venv = folder / "wheels", folder / "venv"
    run(sys.executable, "-m", "pip", "download", "-qq", "-d", downloads, requirement)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        *downloads.iterdir(),
    )
    listing = run(sys.executable, "-m", "pip", "--python", python, "list", "--format", "json")
    installed = {package["name"].lower(): package["version"] for package in json.loads(listing)}

    print(
        f"mlxarch {installed['mlxarch']}[{extras}], Python {platform.python_version()}, {platform.platform()}"
    )
    print(f"packages           {len(installed)}: {', '.join(sorted(installed))}")
    print(f"download           {size(downloads) / MB:.1f} MB, installed {size(venv) / MB:.1f} MB")
    largest = sorted(downloads.iterdir(), key=lambda path: path.stat().st_size, reverse=True)[:3]
    print(
        "largest downloads  "
        + ", ".join(
            f"{path.name.split('-')[0]} {path.stat().st_size / MB:.1f} MB" for path in largest
        )
    )
    print(f"python -c pass     {seconds(python, '-c', 'pass') * 1e3:.0f} ms")
    print(
        f"import mlxarch     {seconds(python, '-c', 'import mlxarch') * 1e3:.0f} ms, process included"
    )
    print(
        f"mlxarch --help     {seconds(python, '-I', venv / 'bin' / 'mlxarch', '--help') * 1e3:.0f} ms, process included"
    )
    unwanted = sorted(set(UNWANTED) & set(installed))
    print(f"torch, transformers: {'PRESENT: ' + ', '.join(unwanted) if unwanted else 'absent'}")
    return bool(unwanted)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(str(part) for part in command[:6])} …")
    return done.stdout


def seconds(*command: object) -> float:
    """The best wall time of five runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(*command)
        times.append(time.perf_counter() - start)
    return min(times)


def size(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


if __name__ == "__main__":
    sys.exit(main())
