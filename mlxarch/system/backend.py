"""Check that MLX can be imported; on Linux its back end is an optional extra of mlxarch."""

import os
import platform
from pathlib import Path

from mlxarch.errors import BackendMissing, ForkedProcess

_CPU = "pip install 'mlxarch[cpu]'"
_CUDA = "pip install 'mlxarch[cuda]'"
_DRIVER = Path("/proc/driver/nvidia/version")  # exists where NVIDIA's driver runs

_owner: int | None = None  # process that uses MLX


def claim_process() -> None:
    """Note that this process uses MLX; call before the evaluation of a model.

    Raises:
        ForkedProcess: it was forked from one that did. It would wait forever for a thread of MLX
            that it does not have.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif _owner != os.getpid():
        raise ForkedProcess(
            "this process was forked after MLX had been used, and MLX does not survive a fork; "
            "load models in the child only, or start it with multiprocessing's 'spawn' method"
        )


def require_backend() -> None:
    """Import ``mlx.core``.

    Raises:
        BackendMissing: it cannot be imported; the message has the command that installs it here.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendMissing(
            _explain(error, platform.system(), _installed_backends(), _DRIVER.exists())
        ) from error


def _installed_backends() -> list[str]:
    from importlib import metadata  # 20 ms, needed only on the way to an error

    names = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
    return [name for name in names if any(metadata.distributions(name=name))]


def _explain(error: ImportError, system: str, installed: list[str], has_nvidia: bool) -> str:
    if system != "Linux":
        return (
            f"MLX cannot be imported ({error}). It needs Apple silicon and an arm64 Python;"
            f" this one is {platform.machine()}. With such a Python: pip install --force-reinstall "
            "mlx"
        )
    choice = (
        f"{_CUDA} (this machine has an NVIDIA GPU) or {_CPU}"
        if has_nvidia
        else f"{_CPU}, or with an NVIDIA GPU {_CUDA}"
    )
    if not installed:
        return f"MLX has no back end here ({error}). Install one: {choice}"
    # All back ends install the same file: the last one installed wins, and uninstalling it removes
    # the library of the others.
    names = " and ".join(installed)
    clean = f"pip uninstall -y {' '.join(installed)}"
    if "libcuda.so" in str(error):
        return (
            f"{names} finds no NVIDIA driver ({error}). Install the driver, or run: "
            f"{clean} && {_CPU}"
        )
    return f"{names} is installed and cannot be loaded ({error}). Run: {clean}; then {choice}"
