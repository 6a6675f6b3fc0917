import sys

import pytest

from mlxarch.errors import BackendMissing
from mlxarch.system.backend import _explain, require_backend

# What `import mlx.core` says on Linux with the plain wheel, and with a CUDA back end where no driver is installed.
NO_LIBRARY = ImportError("libmlx.so: cannot open shared object file: No such file or directory")
NO_DRIVER = ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")


def test_a_machine_with_a_back_end_passes():
    require_backend()


def test_a_missing_back_end_is_our_error_and_keeps_the_cause(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)  # makes the import fail
    with pytest.raises(BackendMissing, match=r"pip .*install") as caught:
        require_backend()
    assert isinstance(caught.value.__cause__, ImportError)


def test_on_linux_the_extra_to_install_is_named():
    message = _explain(NO_LIBRARY, "Linux", [], has_nvidia=False)
    assert "libmlx.so" in message
    assert message.index("mlxarch[cpu]") < message.index("mlxarch[cuda]")


def test_with_an_nvidia_driver_the_cuda_extra_comes_first():
    message = _explain(NO_LIBRARY, "Linux", [], has_nvidia=True)
    assert message.index("mlxarch[cuda]") < message.index("mlxarch[cpu]")


def test_a_library_that_another_back_end_took_away_is_reinstalled_not_just_installed():
    message = _explain(NO_LIBRARY, "Linux", ["mlx-cpu", "mlx-cuda-13"], has_nvidia=False)
    assert "pip uninstall -y mlx-cpu mlx-cuda-13" in message


def test_a_cuda_back_end_without_a_driver_points_to_the_driver_and_to_the_cpu():
    message = _explain(NO_DRIVER, "Linux", ["mlx-cuda-13"], has_nvidia=False)
    assert "NVIDIA driver" in message
    assert "mlxarch[cpu]" in message


def test_on_a_mac_no_linux_extra_is_offered():
    message = _explain(NO_LIBRARY, "Darwin", [], has_nvidia=False)
    assert "mlxarch[" not in message
    assert "arm64" in message
