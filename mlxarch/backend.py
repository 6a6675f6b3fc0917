"""Is there an MLX to compute with? On Linux its back end is an extra of mlxarch, so it may be absent."""

import platform
from pathlib import Path

from mlxarch.errors import BackendMissing

_CPU = "pip install 'mlxarch[cpu]'"
_CUDA = "pip install 'mlxarch[cuda]'"
_DRIVER = Path("/proc/driver/nvidia/version")  # exists where NVIDIA's driver runs


def require_backend() -> None:
    """Import ``mlx.core``, or raise BackendMissing with the command that makes the import work on this machine."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendMissing(_explain(error, platform.system(), _installed_backends(), _DRIVER.exists())) from error


def _installed_backends() -> list[str]:
    from importlib import metadata  # 20 ms, needed only on the way to an error

    names = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
    return [name for name in names if any(metadata.distributions(name=name))]


def _explain(error: ImportError, system: str, installed: list[str], has_nvidia: bool) -> str:
    if system != "Linux":
        return (
            f"MLX cannot be imported ({error}). It needs Apple silicon and an arm64 Python;"
            f" this one is {platform.machine()}. With such a Python: pip install --force-reinstall mlx"
        )
    choice = (
        f"{_CUDA} (this machine has an NVIDIA GPU) or {_CPU}"
        if has_nvidia
        else f"{_CPU}, or with an NVIDIA GPU {_CUDA}"
    )
    if not installed:
        return f"MLX has no back end here ({error}). Install one: {choice}"
    # All back ends bring the same file: the one installed last wins, and removing it takes the other's library away.
    clean = f"pip uninstall -y {' '.join(installed)}"
    if "libcuda.so" in str(error):
        return (
            f"{' and '.join(installed)} finds no NVIDIA driver ({error}). Install the driver, or run: {clean} && {_CPU}"
        )
    return f"{' and '.join(installed)} is installed and cannot be loaded ({error}). Run: {clean}; then {choice}"
